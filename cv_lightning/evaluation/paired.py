"""Paired differences of two evaluations of the same questions: gain, harm, score, tool calls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import NamedTuple

from cv_lightning.evaluation.metrics import Figures
from cv_lightning.evaluation.outcome import Outcome, grouped
from cv_lightning.evaluation.statistics import Difference, Rate, paired_difference, rate

FLIPPED_AT = 0.5
"""Change of a question's fraction of right answers from which on it counts as flipped."""
EXTREMES = (-1.0, 1.0)
"""Smallest and largest difference of scores."""


class Pair(NamedTuple):
    """A question in both evaluations: the means over its samples."""

    task_id: str
    cluster: str
    """The unit of resampling: see `ImageVariant.cluster`."""
    scored: bool
    """False where a judge left an answer of either unscored; `right` and `score` have no meaning then."""
    right: tuple[float, float]
    score: tuple[float, float]
    calls: tuple[float, float]

    @property
    def change(self) -> float:
        """Change of the fraction of right answers."""
        return self.right[1] - self.right[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class PairedSummary(Figures):
    """Second minus first, over the questions that were scored in both."""

    num_pairs: int
    num_unscored: int
    """Questions that both answered but a judge left unscored in one. The rest is not a fair sample: the judge is asked
    only where the rule says no."""
    score: Difference
    """Difference of the mean score (the benchmark's own metric where it has one)."""
    accuracy: Difference
    """Difference of the fraction of right answers: see `Outcome.right`."""
    gain: Rate
    """Fraction of questions that only the second gets right."""
    harm: Rate
    """Fraction of questions that only the first gets right."""
    calls: Difference
    """Tool calls per trajectory."""


def pair_outcomes(first: Sequence[Outcome], second: Sequence[Outcome]) -> list[Pair]:
    """The questions that were answered in both evaluations, sorted by id."""
    sides = [grouped([o for o in side if o.counts], lambda o: o.task_id) for side in (first, second)]
    pairs = []
    for name, one in sides[0].items():
        if (other := sides[1].get(name)) is None:
            continue
        pairs.append(
            Pair(
                task_id=name,
                cluster=one[0].variant.cluster,
                scored=all(outcome.right is not None for outcome in (*one, *other)),
                right=_means(one, other, lambda outcome: bool(outcome.right)),
                score=_means(one, other, lambda outcome: outcome.score or 0.0),
                calls=_means(one, other, lambda outcome: outcome.num_calls),
            )
        )
    return pairs


def _means(one: Sequence[Outcome], other: Sequence[Outcome], value: Callable[[Outcome], float]) -> tuple[float, float]:
    return fmean(map(value, one)), fmean(map(value, other))


def summarise_pairs(pairs: Sequence[Pair]) -> PairedSummary:
    """Differences with intervals and tests; gain and harm."""
    scored = [pair for pair in pairs if pair.scored]
    clusters = [pair.cluster for pair in scored]
    changes = [pair.change for pair in scored]
    return PairedSummary(
        num_pairs=len(scored),
        num_unscored=len(pairs) - len(scored),
        score=paired_difference([pair.score[1] - pair.score[0] for pair in scored], clusters, EXTREMES),
        accuracy=paired_difference(changes, clusters, EXTREMES),
        gain=rate([float(change >= FLIPPED_AT) for change in changes], clusters),
        harm=rate([float(change <= -FLIPPED_AT) for change in changes], clusters),
        calls=paired_difference([pair.calls[1] - pair.calls[0] for pair in scored], clusters),
    )
