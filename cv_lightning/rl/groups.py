"""Groups of scored trajectories: their advantages, which are masked, and which the loss counts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cv_lightning.rl.advantages import AdvantageConfig, batch_advantages
from cv_lightning.types import EndState, Group, Trajectory


@dataclass(frozen=True, kw_only=True)
class MaskConfig:
    """Trajectories that count in their group's mean and deviation, but are not learned from. All off: learn from all.

    Where the loss is masked a policy is not pushed away from what only a limit of ours cut short.
    """

    over_length: bool = False
    """Those cut at a token limit: `over_length` (overlong filtering, DAPO, 2503.14476)."""
    over_turns: bool = False
    """Those that ran out of turns or images: `max_turns`, `max_images` (compact filtering, DeepSWE, 2025)."""
    broken: bool = False
    """Those with neither a call nor an answer, or too many malformed calls: `no_answer`, `parse_errors` (void turns,
    SimpleTIR, 2509.02479)."""

    @property
    def states(self) -> frozenset[EndState]:
        """The end states that are masked."""
        masked: set[EndState] = set()
        masked |= {EndState.OVER_LENGTH} if self.over_length else set()
        masked |= {EndState.MAX_TURNS, EndState.MAX_IMAGES} if self.over_turns else set()
        masked |= {EndState.NO_ANSWER, EndState.PARSE_ERRORS} if self.broken else set()
        return frozenset(masked)


def assign_advantages(
    groups: Sequence[Group],
    config: AdvantageConfig,
    reduce_sum: Callable[[list[float]], Sequence[float]] | None = None,
    advantage_rewards: Callable[[Sequence[Trajectory]], Sequence[float]] | None = None,
) -> None:
    """Set `advantage` on the scored trajectories; the unscored ones are left out of their group's statistics.

    Call it on every rank, also on one without groups (see `batch_advantages`).

    Args:
        groups: of this rank.
        config: the method.
        reduce_sum: sums over ranks; None: one rank.
        advantage_rewards: called exactly once, with all scored trajectories; None: their totals.
    """
    scored = [[t for t in group.trajectories if t.reward is not None] for group in groups]
    flat = [trajectory for members in scored for trajectory in members]
    given = [t.reward.total for t in flat if t.reward is not None]
    rewards = iter(given if advantage_rewards is None else advantage_rewards(flat))
    values = batch_advantages([[next(rewards) for _ in members] for members in scored], config, reduce_sum)
    for group in groups:
        for trajectory in group.trajectories:
            trajectory.advantage = None
    for members, advantages in zip(scored, values, strict=True):
        for trajectory, advantage in zip(members, advantages, strict=True):
            trajectory.advantage = float(advantage)


def carries_signal(group: Group) -> bool:
    """True if any trajectory of the group has an advantage other than 0."""
    return any(t.advantage for t in group.trajectories)


def is_trainable(trajectory: Trajectory) -> bool:
    """True if the loss counts it: scored, and some token sampled."""
    return trajectory.advantage is not None and any(trajectory.loss_mask)
