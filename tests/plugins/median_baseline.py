"""An advantage estimator of one's own: the group's median as the baseline."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cv_lightning.rl.advantages import AdvantageEstimator, ReduceSum, Rewards, one_rank


class MedianBaseline(AdvantageEstimator):
    """Reward less the group's median, which a single lucky trajectory does not move.

    Args:
        scale: Multiplies every advantage.
    """

    def __init__(self, scale: float = 1.0) -> None:
        self.scale = scale

    def __call__(self, groups: Sequence[Rewards], reduce_sum: ReduceSum = one_rank) -> list[Rewards]:
        """Advantages of all groups of an iteration."""
        return [self.scale * (group - np.median(group)) if group.size else group for group in groups]
