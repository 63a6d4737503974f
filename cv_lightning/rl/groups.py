"""Groups of scored trajectories: their advantages, which are masked, and which the loss counts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cv_lightning.rl.advantages import AdvantageEstimator, ReduceSum, estimate_advantages, one_rank
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
    estimator: AdvantageEstimator,
    mask: MaskConfig | None = None,
    reduce_sum: ReduceSum = one_rank,
    rewards_of: Callable[[Sequence[Trajectory]], Sequence[float]] | None = None,
) -> None:
    """Set `advantage` on the scored trajectories; the unscored ones are left out of their group's statistics.

    It stays None where a trajectory has no reward or is masked, and is 0.0 throughout a group of equal rewards. Call
    it on every rank, also on one without groups.

    Args:
        groups: Of this rank.
        estimator: The method.
        mask: Which trajectories count in the statistics only; None: none.
        reduce_sum: Sums over ranks.
        rewards_of: Called exactly once, with all scored trajectories; None: their totals.
    """
    scored = [[t for t in group.trajectories if t.reward is not None] for group in groups]
    flat = [trajectory for members in scored for trajectory in members]
    totals = [t.reward.total for t in flat if t.reward is not None]
    rewards = iter(totals if rewards_of is None else rewards_of(flat))
    values = estimate_advantages(estimator, [[next(rewards) for _ in members] for members in scored], reduce_sum)
    masked = frozenset() if mask is None else mask.states
    for group in groups:
        for trajectory in group.trajectories:
            trajectory.advantage = None
    for members, advantages in zip(scored, values, strict=True):
        for trajectory, advantage in zip(members, advantages, strict=True):
            trajectory.advantage = None if trajectory.end_state in masked else float(advantage)


def has_reward_variance(group: Group, mask: MaskConfig) -> bool:
    """True if rewards of the group differ and not all of its scored trajectories are masked."""
    scored = [t for t in group.trajectories if t.reward is not None]
    totals = {t.reward.total for t in scored if t.reward is not None}
    return len(totals) > 1 and any(t.end_state not in mask.states for t in scored)


def has_advantage(group: Group) -> bool:
    """True if any trajectory of the group has an advantage other than 0."""
    return any(t.advantage for t in group.trajectories)


def is_trainable(trajectory: Trajectory) -> bool:
    """True if the loss counts it: scored, and some token sampled."""
    return trajectory.advantage is not None and any(trajectory.loss_mask)
