"""Two evaluations of the same questions: paired differences, what was gained and what was lost."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, NamedTuple

from cv_lightning.evaluation.metrics import json_value
from cv_lightning.evaluation.outcome import Outcome
from cv_lightning.evaluation.statistics import Difference, Rate, paired_difference, rate

FLIPPED_AT = 0.5
"""Change of a question's share of right answers from which on it counts as flipped."""
SHARES = (-1.0, 1.0)
"""What differences of scores are between."""


class Pair(NamedTuple):
    """A question in both evaluations: the means over its samples."""

    task_id: str
    """In the first."""
    cluster: str
    """What is resampled together: see `Shown.cluster`."""
    group: str
    """What `by` splits by."""
    scored: bool
    """False where a judge left an answer of either unscored; the next two are then without meaning."""
    right: tuple[float, float]
    score: tuple[float, float]
    calls: tuple[float, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class PairedSummary:
    """Second minus first, over the questions that were scored in both."""

    num_pairs: int
    num_unscored: int
    """Questions that both answered and a judge left unscored in one. What is left is not a fair sample: the judge is
    asked only where the rule says no."""
    score: Difference
    """Of the mean score (the benchmark's own metric where it has one)."""
    accuracy: Difference
    """Of the share of right answers: see `Outcome.right`."""
    gain: Rate
    """Share of questions that only the second gets right."""
    harm: Rate
    """Share of questions that only the first gets right."""
    calls: Difference
    """Tool calls per trajectory."""

    def to_json(self) -> dict[str, Any]:
        """JSON values; NaN is null."""
        return {name: json_value(getattr(self, name)) for name in self.__slots__}


def pair_outcomes(
    first: Sequence[Outcome],
    second: Sequence[Outcome],
    key: Callable[[Outcome], str | None] = lambda outcome: outcome.task_id,
    by: Callable[[Outcome], str] = lambda outcome: "",
) -> list[Pair]:
    """The questions that were answered in both, in order of their ids.

    Args:
        first: one evaluation.
        second: the other.
        key: of an outcome's question, the same in both; None leaves it out.
        by: what the pairs may be split by, taken from the first.
    """
    sides = [_by_question(side, key) for side in (first, second)]
    pairs = []
    for name in sorted(sides[0].keys() & sides[1].keys()):
        one, other = sides[0][name], sides[1][name]
        pairs.append(
            Pair(
                task_id=one[0].task_id,
                cluster=one[0].shown.cluster,
                group=by(one[0]),
                scored=all(outcome.right is not None for outcome in (*one, *other)),
                right=(_mean(one, _right), _mean(other, _right)),
                score=(_mean(one, _score), _mean(other, _score)),
                calls=(_mean(one, _calls), _mean(other, _calls)),
            )
        )
    return pairs


def _by_question(side: Sequence[Outcome], key: Callable[[Outcome], str | None]) -> dict[str, list[Outcome]]:
    found = defaultdict(list)
    for outcome in side:
        name = key(outcome)
        if name is not None and outcome.counts:
            found[name].append(outcome)
    return found


def _mean(samples: Sequence[Outcome], value: Callable[[Outcome], float]) -> float:
    return fmean(value(outcome) for outcome in samples)


def _right(outcome: Outcome) -> float:
    return float(bool(outcome.right))


def _score(outcome: Outcome) -> float:
    return outcome.score or 0.0


def _calls(outcome: Outcome) -> float:
    return float(outcome.num_calls)


def summarise_pairs(pairs: Sequence[Pair]) -> PairedSummary:
    """Differences with intervals and tests; gain and harm."""
    scored = [pair for pair in pairs if pair.scored]
    clusters = [pair.cluster for pair in scored]
    changes = [pair.right[1] - pair.right[0] for pair in scored]
    return PairedSummary(
        num_pairs=len(scored),
        num_unscored=len(pairs) - len(scored),
        score=paired_difference([pair.score[1] - pair.score[0] for pair in scored], clusters, SHARES),
        accuracy=paired_difference(changes, clusters, SHARES),
        gain=rate([float(change >= FLIPPED_AT) for change in changes], clusters),
        harm=rate([float(change <= -FLIPPED_AT) for change in changes], clusters),
        calls=paired_difference([pair.calls[1] - pair.calls[0] for pair in scored], clusters),
    )


def split(pairs: Sequence[Pair]) -> dict[str, list[Pair]]:
    """Pairs by their group, in order of its name."""
    groups = defaultdict(list)
    for pair in pairs:
        groups[pair.group].append(pair)
    return dict(sorted(groups.items()))
