"""Intervals of rates and means: pure functions, no dependence on trajectories."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np

NUM_RESAMPLES = 2000


class Rate(NamedTuple):
    """A mean with its 95 % interval."""

    value: float
    """NaN where `n` is 0."""
    low: float
    high: float
    n: int
    """Number of trajectories it is a mean of."""

    def __str__(self) -> str:
        if self.n == 0:
            return "-"
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def wilson(num_hits: float, n: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's score interval of a proportion of `n` independent trials; (nan, nan) where `n` is 0."""
    if n == 0:
        return math.nan, math.nan
    share = num_hits / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def bootstrap(values: Sequence[float], clusters: Sequence[Hashable], seed: int = 0) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean, resampling whole clusters (tasks).

    Args:
        values: one number per trajectory.
        clusters: the task of each; trajectories of one task are not independent.
        seed: of the resampling; the same values give the same interval.
    """
    if not values:
        return math.nan, math.nan
    index: dict[Hashable, int] = {}
    ids = np.array([index.setdefault(cluster, len(index)) for cluster in clusters])
    sums, counts = np.bincount(ids, weights=np.asarray(values, float)), np.bincount(ids)
    draws = np.random.default_rng(seed).integers(0, len(index), size=(NUM_RESAMPLES, len(index)))
    means = sums[draws].sum(axis=1) / counts[draws].sum(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def rate(values: Sequence[float], clusters: Sequence[Hashable]) -> Rate:
    """Mean with an interval: Wilson's for yes/no values of one trajectory per task, else the cluster bootstrap."""
    n = len(values)
    if n == 0:
        return Rate(math.nan, math.nan, math.nan, 0)
    mean = math.fsum(values) / n
    independent = len(set(clusters)) == n and all(value in (0, 1) for value in values)
    low, high = wilson(math.fsum(values), n) if independent else bootstrap(values, clusters)
    return Rate(mean, low, high, n)
