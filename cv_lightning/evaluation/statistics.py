"""Intervals and tests of rates, means and paired differences. Pure functions of numbers."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

NUM_RESAMPLES = 2000
SAME = 1e-9
"""Means of clusters that differ by less differ only by rounding."""


class Rate(NamedTuple):
    """A mean with its 95 % interval."""

    value: float
    """NaN where `n` is 0."""
    low: float
    high: float
    n: int
    """Number of trajectories."""

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]" if self.n else "-"


NONE = Rate(math.nan, math.nan, math.nan, 0)
"""The rate of nothing."""


def wilson(num_hits: float, n: int) -> tuple[float, float]:
    """Wilson's 95 % score interval of a proportion of `n` independent trials; (nan, nan) where `n` is 0."""
    if n == 0:
        return math.nan, math.nan
    value, z = num_hits / n, 1.959964
    centre = (value + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(value * (1 - value) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def _numbered(*columns: Sequence[Hashable]) -> tuple[list[npt.NDArray[np.int64]], int]:
    """Clusters of each column as numbers from 0, the same number for the same cluster, and how many there are."""
    index: dict[Hashable, int] = {}
    return [np.array([index.setdefault(name, len(index)) for name in names]) for names in columns], len(index)


def bootstrap(
    values: Sequence[float], clusters: Sequence[Hashable], extremes: tuple[float, float] | None = None
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean, resampling whole clusters (tasks); the same values give the same one.

    Where all clusters have the same mean, no resample differs, which says nothing about clusters that were not drawn:
    the interval is then what the mean could be if as many others as Wilson's bound allows were at an extreme.

    Args:
        values: One number per trajectory.
        clusters: The task of each; trajectories of one task are not independent.
        extremes: Smallest and largest possible value; None: unbounded, where equal clusters give no width.
    """
    if not values:
        return math.nan, math.nan
    (ids,), size = _numbered(clusters)
    sums = np.bincount(ids, weights=np.asarray(values, float)).astype(float)
    counts = np.bincount(ids).astype(float)
    if extremes is not None and np.ptp(sums / counts) < SAME:
        mean, unseen = math.fsum(values) / len(values), wilson(0, size)[1]
        return mean - unseen * (mean - extremes[0]), mean + unseen * (extremes[1] - mean)
    rng = np.random.default_rng(0)
    # equal clusters are drawn together: how often each kind occurs in a resample is multinomial
    kinds, times = np.unique(np.stack([sums, counts], axis=1), axis=0, return_counts=True)
    if 4 * len(kinds) <= size:
        drawn = rng.multinomial(size, times / size, size=NUM_RESAMPLES) @ kinds
        means = drawn[:, 0] / drawn[:, 1]
    else:
        draws = (rng.integers(0, size, size=(part, size)) for part in _parts(size))
        means = np.concatenate([sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1) for drawn in draws])
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def _parts(num_clusters: int) -> list[int]:
    """Numbers of resamples of about a million draws each, so that memory stays small."""
    size = max(1, min(NUM_RESAMPLES, 1_000_000 // num_clusters))
    return [min(size, NUM_RESAMPLES - start) for start in range(0, NUM_RESAMPLES, size)]


def rate(values: Sequence[float], clusters: Sequence[Hashable]) -> Rate:
    """Mean of values in [0, 1] with an interval.

    Wilson's for yes/no values of one trajectory per task, else the cluster bootstrap.
    """
    n = len(values)
    if n == 0:
        return NONE
    independent = len(set(clusters)) == n and all(value in (0, 1) for value in values)
    low, high = wilson(math.fsum(values), n) if independent else bootstrap(values, clusters, extremes=(0, 1))
    return Rate(math.fsum(values) / n, low, high, n)


def rate_of_columns(columns: Sequence[Sequence[float]], clusters: Sequence[Sequence[Hashable]]) -> Rate:
    """Mean of the means of columns, each weighing the same; the clusters are resampled over all columns together.

    Args:
        columns: Values in [0, 1] of each column, none empty.
        clusters: The cluster of each value; one that is in several columns enters a resample with all of them.

    Returns:
        `n` is the number of clusters.
    """
    ids, size = _numbered(*clusters)
    sums = [np.bincount(at, weights=np.asarray(v, float), minlength=size) for at, v in zip(ids, columns, strict=True)]
    counts = [np.bincount(at, minlength=size) for at in ids]
    value = math.fsum(math.fsum(column) / len(column) for column in columns) / len(columns)
    # [kinds, 2 columns]; as in `bootstrap`, equal clusters are drawn together
    kinds, often = np.unique(np.stack([*sums, *counts], axis=1).astype(float), axis=0, return_counts=True)
    rng, means = np.random.default_rng(0), []
    for times in _parts(len(kinds)):
        totals = rng.multinomial(size, often / size, size=times) @ kinds
        totals = totals[(totals[:, len(columns) :] > 0).all(axis=1)]  # a resample may miss a column
        means.append((totals[:, : len(columns)] / totals[:, len(columns) :]).mean(axis=1))
    found = np.concatenate(means)
    if not len(found) or np.ptp(found) < SAME:
        unseen = wilson(0, size)[1]
        return Rate(value, value * (1 - unseen), value + unseen * (1 - value), size)
    low, high = np.percentile(found, [2.5, 97.5])
    return Rate(value, float(low), float(high), size)


# ------------------------------------------------------------------------------------------------ pairs
class Difference(NamedTuple):
    """Mean of paired differences, with its 95 % interval and a test of no difference."""

    value: float
    """NaN where `n` is 0."""
    low: float
    high: float
    p: float
    """Two-sided; NaN where `n` is 0."""
    test: str
    """`mcnemar` (exact) or `wilcoxon` (signed rank)."""
    n: int
    """Number of differences."""

    def __str__(self) -> str:
        return f"{self.value:+.3f} [{self.low:+.3f}, {self.high:+.3f}], p {self.p:.2g}" if self.n else "-"


def paired_difference(
    differences: Sequence[float], clusters: Sequence[Hashable], extremes: tuple[float, float] | None = None
) -> Difference:
    """Summarise differences: bootstrap interval of the mean, and a test of no difference.

    The test is McNemar's (exact) where each cluster has one difference of -1, 0 or 1, else Wilcoxon's signed rank of
    the clusters' means.

    Args:
        differences: Second minus first.
        clusters: The cluster of each; the forms of one question are not independent.
        extremes: As for `bootstrap`.
    """
    from scipy import stats  # takes half a second, and training does not need it

    n = len(differences)
    if n == 0:
        return Difference(math.nan, math.nan, math.nan, math.nan, "mcnemar", 0)
    low, high = bootstrap(differences, clusters, extremes=extremes)
    means = _cluster_means(differences, clusters)
    test, p = "mcnemar", 1.0
    if len(means) == n and all(value in (-1, 0, 1) for value in differences):
        gained, lost = sum(value == 1 for value in differences), sum(value == -1 for value in differences)
        if gained + lost:
            p = float(stats.binomtest(gained, gained + lost).pvalue)
    else:
        test = "wilcoxon"
        if any(means):
            p = float(stats.wilcoxon(means).pvalue)
    return Difference(math.fsum(differences) / n, low, high, p, test, n)


def _cluster_means(values: Sequence[float], clusters: Sequence[Hashable]) -> list[float]:
    groups = defaultdict(list)
    for value, cluster in zip(values, clusters, strict=True):
        groups[cluster].append(value)
    # thirds that cancel leave a difference that is not exactly zero, which signed ranks would count
    return [round(math.fsum(group) / len(group), 9) for group in groups.values()]


# ------------------------------------------------------------------------------------------------ several tries
def pass_at_k(num_samples: int, num_right: int, k: int) -> float:
    """Unbiased estimate of the chance that one of `k` tries is right (Chen et al., 2107.03374).

    Args:
        num_samples: Number of tries, at least `k`.
        num_right: Number of right ones.
        k: At least 1.
    """
    if not 1 <= k <= num_samples or not 0 <= num_right <= num_samples:
        raise ValueError(f"pass@{k} cannot be estimated from {num_right} right of {num_samples} tries")
    return 1.0 - math.comb(num_samples - num_right, k) / math.comb(num_samples, k)
