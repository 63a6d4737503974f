"""Advantages of groups of scored trajectories, and which trajectories are masked or counted in the loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cv_lightning.rl.advantages import AdvantageEstimator, ReduceSum, estimate_advantages, one_rank
from cv_lightning.types import EndState, Group, Trajectory

MASKED_STATES = {
    "over_length": {EndState.OVER_LENGTH},
    "over_turns": {EndState.MAX_TURNS, EndState.MAX_IMAGES},
    "broken": {EndState.NO_ANSWER, EndState.PARSE_ERRORS},
}


@dataclass(frozen=True, kw_only=True)
class MaskConfig:
    """Trajectories that count in their group's mean and deviation but have no loss. All off: learn from all.

    Masking keeps the policy from being pushed away from trajectories that only one of our limits cut short.
    """

    over_length: bool = False
    """Mask those cut at a token limit: `over_length` (overlong filtering, DAPO, 2503.14476)."""
    over_turns: bool = False
    """Mask those that ran out of turns or images: `max_turns`, `max_images` (compact filtering, DeepSWE, 2025)."""
    broken: bool = False
    """Mask those with neither a call nor an answer, or with too many malformed calls: `no_answer`, `parse_errors`
    (void turns, SimpleTIR, 2509.02479)."""

    @property
    def states(self) -> frozenset[EndState]:
        """The end states that are masked."""
        return frozenset[EndState]().union(*(found for name, found in MASKED_STATES.items() if getattr(self, name)))


def assign_advantages(
    groups: Sequence[Group],
    estimator: AdvantageEstimator,
    mask: MaskConfig | None = None,
    reduce_sum: ReduceSum = one_rank,
    rewards_of: Callable[[Sequence[Trajectory]], Sequence[float]] | None = None,
) -> None:
    """Set `advantage` on the scored trajectories of all groups. Call it on every rank, also on one without groups.

    It is None for a trajectory that has no reward or is masked, and 0.0 throughout a group of equal rewards. Unscored
    trajectories do not count in their group's statistics.

    Args:
        groups: Groups of this rank.
        estimator: Advantage estimator.
        mask: Which trajectories count in the statistics only; None: none.
        reduce_sum: Sum over ranks.
        rewards_of: Called exactly once with all scored trajectories; None: their total rewards.
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
    """True if the group's rewards differ and not all of its scored trajectories are masked."""
    scored = [t for t in group.trajectories if t.reward is not None]
    totals = {t.reward.total for t in scored if t.reward is not None}
    return len(totals) > 1 and any(t.end_state not in mask.states for t in scored)


def has_advantage(group: Group) -> bool:
    """True if any trajectory of the group has an advantage other than 0."""
    return any(t.advantage for t in group.trajectories)


def is_trainable(trajectory: Trajectory) -> bool:
    """True if the loss counts the trajectory: it has an advantage and a sampled token."""
    return trajectory.advantage is not None and any(trajectory.loss_mask)
