"""Advantage estimators: rewards of groups in, advantages out, in float64."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from cv_lightning.ranges import PositiveFloat, check_ranges

KEY = "model.init_args.algorithm.advantage.init_args"
"""Place of an estimator's arguments in a config, for messages."""
Rewards = NDArray[np.float64]
ReduceSum = Callable[[list[float]], Sequence[float]]


def one_rank(values: list[float]) -> list[float]:
    """`reduce_sum` of a run with one rank."""
    return values


class AdvantageEstimator(ABC):
    """A method that turns rewards into advantages. The constructor's arguments are its config, checked there."""

    def __repr__(self) -> str:
        """The class and its attributes, for the record of a run."""
        return f"{type(self).__name__}({', '.join(f'{name}={value}' for name, value in vars(self).items())})"

    @abstractmethod
    def __call__(self, groups: Sequence[Rewards], reduce_sum: ReduceSum = one_rank) -> list[Rewards]:
        """Advantages of all groups of an iteration. It is called on every rank, also on one without groups.

        Args:
            groups: Finite rewards of the scored trajectories of each group of this rank, float64 [n]. The list and a
                group may be empty.
            reduce_sum: Element-wise sum of a list of floats over ranks. It is a collective: call it equally often on
                every rank, whatever the groups are.

        Returns:
            One float64 array per group, of the group's length.
        """


class GRPO(AdvantageEstimator):
    """Reward minus the group's mean, divided by its sample deviation (DeepSeekMath, 2402.03300; the recipe).

    Args:
        epsilon: Added to the deviation.
    """

    def __init__(self, epsilon: PositiveFloat = 1e-6) -> None:
        check_ranges(GRPO.__init__, KEY, locals())
        self.epsilon = epsilon

    def __call__(self, groups: Sequence[Rewards], reduce_sum: ReduceSum = one_rank) -> list[Rewards]:
        """Advantages of all groups, see `AdvantageEstimator`."""
        centred = [centre(group) for group in groups]
        return [c / (float(c.std(ddof=1)) + self.epsilon) if c.any() else c for c in centred]


class DrGRPO(AdvantageEstimator):
    """Reward minus the group's mean (Dr.GRPO, 2503.20783); with dense rewards, dividing would amplify noise."""

    def __call__(self, groups: Sequence[Rewards], reduce_sum: ReduceSum = one_rank) -> list[Rewards]:
        """Advantages of all groups, see `AdvantageEstimator`."""
        return [centre(group) for group in groups]


class RLOO(AdvantageEstimator):
    """Reward minus the mean of the group's other rewards (2402.14740)."""

    def __call__(self, groups: Sequence[Rewards], reduce_sum: ReduceSum = one_rank) -> list[Rewards]:
        """Advantages of all groups, see `AdvantageEstimator`."""
        centred = [centre(group) for group in groups]
        return [c * (c.size / (c.size - 1)) if c.size > 1 else c for c in centred]


class ReinforcePlusPlusBaseline(AdvantageEstimator):
    """Reward minus the group's mean, divided by the deviation over all ranks (REINFORCE++ with baseline, 2501.03262).

    The batch's mean is not subtracted, because centred groups make it 0; groups of equal rewards stay at exactly 0.

    Args:
        epsilon: Added to the deviation.
    """

    def __init__(self, epsilon: PositiveFloat = 1e-6) -> None:
        check_ranges(ReinforcePlusPlusBaseline.__init__, KEY, locals())
        self.epsilon = epsilon

    def __call__(self, groups: Sequence[Rewards], reduce_sum: ReduceSum = one_rank) -> list[Rewards]:
        """Advantages of all groups, see `AdvantageEstimator`."""
        centred = [centre(group) for group in groups]
        moments = [float(sum(c.size for c in centred)), float(sum((c**2).sum() for c in centred))]
        count, squares = reduce_sum(moments)
        deviation = (squares / max(count - 1, 1)) ** 0.5
        return [c / (deviation + self.epsilon) for c in centred]


def centre(rewards: Rewards) -> Rewards:
    """Rewards minus their mean; exactly 0 if all are equal, however the mean is rounded."""
    if rewards.size < 2 or rewards.max() == rewards.min():
        return np.zeros_like(rewards)
    return np.asarray(rewards - rewards.mean(), dtype=np.float64)


def estimate_advantages(
    estimator: AdvantageEstimator, groups: Sequence[Sequence[float]], reduce_sum: ReduceSum = one_rank
) -> list[Rewards]:
    """Advantages of an iteration, with the estimator's input and output checked.

    Returns:
        One float64 array per group.

    Raises:
        ValueError: A reward is not finite (leave an unscored trajectory out of its group instead), or the estimator's
            advantages are not finite or differ from the rewards in number.
    """
    arrays = [np.asarray(group, dtype=np.float64) for group in groups]
    if wrong := [array.tolist() for array in arrays if not np.isfinite(array).all()]:
        raise ValueError(f"rewards must be finite; leave unscored trajectories out of their group: {wrong[0]}")
    found = [np.asarray(advantages, dtype=np.float64) for advantages in estimator(arrays, reduce_sum)]
    name = type(estimator).__name__
    if [a.shape for a in found] != [a.shape for a in arrays]:
        raise ValueError(
            f"{name} gave advantages of shapes {[a.shape for a in found]}; give one per reward of each group"
        )
    if not all(np.isfinite(a).all() for a in found):
        raise ValueError(f"{name} gave advantages that are not finite")
    return found
