"""Advantage estimators: from the rewards of groups to advantages, in float64."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

Rewards = NDArray[np.float64]
ReduceSum = Callable[[list[float]], Sequence[float]]


def one_rank(values: list[float]) -> list[float]:
    """The sum over ranks where there is one."""
    return values


class AdvantageEstimator(ABC):
    """How rewards become advantages. The constructor's arguments are its config, checked there."""

    def __repr__(self) -> str:
        """The class and its attributes, for the record of a run."""
        return f"{type(self).__name__}({', '.join(f'{name}={value}' for name, value in vars(self).items())})"

    @abstractmethod
    def __call__(self, groups: Sequence[Rewards], reduce_sum: ReduceSum = one_rank) -> list[Rewards]:
        """Advantages of all groups of an iteration. Called on every rank, also on one without groups.

        Args:
            groups: [n] each, float64: finite rewards of the scored trajectories of this rank's groups. There may be no
                group, and a group may be empty.
            reduce_sum: Element-wise sum of a list of floats over ranks; a collective, to be called equally often on
                every rank, whatever the groups.

        Returns:
            One float64 array per group, of its length.
        """


class GRPO(AdvantageEstimator):
    """Reward less the group's mean, over the group's sample deviation (DeepSeekMath, 2402.03300; the recipe).

    Args:
        epsilon: Added to the deviation.
    """

    def __init__(self, epsilon: float = 1e-6) -> None:
        self.epsilon = _checked(epsilon)

    def __call__(self, groups: Sequence[Rewards], reduce_sum: ReduceSum = one_rank) -> list[Rewards]:
        """Advantages of all groups, see `AdvantageEstimator`."""
        centred = [centre(group) for group in groups]
        return [c / (float(c.std(ddof=1)) + self.epsilon) if c.any() else c for c in centred]


class DrGRPO(AdvantageEstimator):
    """Reward less the group's mean (Dr.GRPO, 2503.20783): with dense rewards a division would magnify noise."""

    def __call__(self, groups: Sequence[Rewards], reduce_sum: ReduceSum = one_rank) -> list[Rewards]:
        """Advantages of all groups, see `AdvantageEstimator`."""
        return [centre(group) for group in groups]


class RLOO(AdvantageEstimator):
    """Reward less the mean of the group's others (2402.14740)."""

    def __call__(self, groups: Sequence[Rewards], reduce_sum: ReduceSum = one_rank) -> list[Rewards]:
        """Advantages of all groups, see `AdvantageEstimator`."""
        centred = [centre(group) for group in groups]
        return [c * (c.size / (c.size - 1)) if c.size > 1 else c for c in centred]


class ReinforcePlusPlusBaseline(AdvantageEstimator):
    """Reward less the group's mean, over the deviation of all ranks' batch (REINFORCE++ with a baseline, 2501.03262).

    As each group is centred, so is the batch: no mean is subtracted, and groups of equal rewards stay at exactly 0.

    Args:
        epsilon: Added to the deviation.
    """

    def __init__(self, epsilon: float = 1e-6) -> None:
        self.epsilon = _checked(epsilon)

    def __call__(self, groups: Sequence[Rewards], reduce_sum: ReduceSum = one_rank) -> list[Rewards]:
        """Advantages of all groups, see `AdvantageEstimator`; one sum over ranks."""
        centred = [centre(group) for group in groups]
        moments = [float(sum(c.size for c in centred)), float(sum((c**2).sum() for c in centred))]
        count, squares = reduce_sum(moments)
        deviation = (squares / max(count - 1, 1)) ** 0.5
        return [c / (deviation + self.epsilon) for c in centred]


def centre(rewards: Rewards) -> Rewards:
    """Rewards less their mean; exactly 0, whatever the mean rounds to, where all are equal or there is one."""
    if rewards.size < 2 or rewards.max() == rewards.min():
        return np.zeros_like(rewards)
    return np.asarray(rewards - rewards.mean(), dtype=np.float64)


def estimate_advantages(
    estimator: AdvantageEstimator, groups: Sequence[Sequence[float]], reduce_sum: ReduceSum = one_rank
) -> list[Rewards]:
    """What an estimator makes of the rewards of an iteration, checked on both sides.

    Args:
        estimator: The method.
        groups: Rewards of this rank's groups; may be empty, as may a group.
        reduce_sum: Sums a list of floats over ranks.

    Returns:
        One float64 array per group.

    Raises:
        ValueError: A reward is NaN or infinite (leave an unscored trajectory out of its group instead), or the
            estimator's advantages are not as many as the rewards, or not finite.
    """
    arrays = [np.asarray(group, dtype=np.float64) for group in groups]
    for array in arrays:
        if not np.isfinite(array).all():
            raise ValueError(
                f"rewards must be finite; leave unscored trajectories out of their group: {array.tolist()}"
            )
    found = [np.asarray(advantages, dtype=np.float64) for advantages in estimator(arrays, reduce_sum)]
    name = type(estimator).__name__
    if [a.shape for a in found] != [a.shape for a in arrays]:
        raise ValueError(f"{name} gave advantages of shapes {[a.shape for a in found]}; one per reward, group by group")
    if not all(np.isfinite(a).all() for a in found):
        raise ValueError(f"{name} gave advantages that are not finite")
    return found


def _checked(epsilon: float) -> float:
    if not epsilon > 0:
        raise ValueError(f"model.algorithm.advantage.epsilon must be above 0, not {epsilon}")
    return epsilon
