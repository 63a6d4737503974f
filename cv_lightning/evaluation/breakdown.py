"""Further figures of an evaluation: rule and judge, effects of the tool, and the score by kinds of questions."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

from cv_lightning.evaluation.metrics import Figures, mean_of, rate_of, rate_of_events
from cv_lightning.evaluation.outcome import ANSWERED, Outcome, grouped
from cv_lightning.evaluation.statistics import NONE, Rate, pass_at_k, rate, rate_of_columns
from cv_lightning.orientations import ORIENTATIONS

TRANSFORMS = ("identity", *ORIENTATIONS)
"""Columns of a robustness table: Source and the five orientations."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Breakdown(Figures):
    """Figures of one evaluation. Trajectories with an infrastructure error do not count, except a judge's."""

    score: Rate
    """Mean score over all scored tasks: by the benchmark's own metric where it has one, else accuracy."""
    score_bounds: tuple[float, float] | None
    """The score if all answers on which the judge failed were wrong, and if all were right; None without any. The
    scored ones are not a fair sample, since the judge is asked only where the rule says no."""
    metrics: tuple[str, ...]
    """Names of the benchmarks' own metrics in `score`; empty: accuracy."""
    accuracy_rule: Rate
    """Accuracy by rule alone over all tasks; answers that went to the judge count as wrong."""
    accuracy_judged: Rate
    """Accuracy by rule or judge over all scored tasks; n = 0 where no judge was asked."""
    num_judged: int
    """Answers that the judge decided on."""
    num_unjudged: int
    """Answers on which the judge or a user's metric failed: unscored, not wrong."""
    orientation_fixed: Rate
    """Fraction of the trajectories of turned tasks whose last image was upright."""
    tool_on_upright: Rate
    """Fraction of the trajectories of tasks that need no tool in which it was called."""
    operations_mean: float
    """Operations that contributed to a returned image, per answered trajectory."""
    length_mean: float
    """Tokens of the whole sequence, with prompt, images and tool responses."""
    crop_iou: Rate
    """Best overlap of a crop with the ground-truth box, over trajectories with crops."""
    crops_faithful: Rate
    """Fraction of crops that contain the evidence: 90 % of the ground-truth box."""
    crops_faithful_when_right: Rate
    """Fraction of crops that contain the evidence, over trajectories with a right answer."""
    pass_at_k: dict[int, Rate]
    """Probability that one of k tries is right, for k = 1, 2, 4, ..., over tasks with as many; empty for one sample per
    task."""
    by_transform: dict[str, Rate]
    """Score of uncorrupted images by orientation (Source is `identity`); only those that occurred."""
    mean_of_six: Rate
    """Mean of Source and the five orientations, as in the paper's table; n = 0 where one is missing."""
    mean_of_transformed: Rate
    """Mean of the five orientations without Source; n = 0 where one is missing."""
    by_corruption: dict[str, dict[int, Rate]]
    """Score by corruption and severity; 0 is that of all uncorrupted images. Empty without corruptions."""
    by_source: dict[str, Rate]
    as_given: dict[str, Rate]
    """Score by data source of unchanged tasks, comparable with published scores."""
    by_category: dict[str, Rate]
    """Score by category of the data set; empty without categories."""


def breakdown(everything: Sequence[Outcome]) -> Breakdown:
    """Compute every figure from the outcomes."""
    valid = [outcome for outcome in everything if outcome.counts]
    unjudged = [outcome for outcome in valid if outcome.is_unjudged]
    unscored = [outcome for outcome in valid if outcome.correct is None or outcome.score is None]
    judged = [outcome for outcome in valid if outcome.scored_by == "judge"]
    answered = [outcome for outcome in valid if outcome.end_state in ANSWERED]
    scored = [outcome for outcome in valid if outcome.score is not None]
    clean = [outcome for outcome in scored if not outcome.variant.severity]
    crop_counts = attrgetter("num_crops_showing"), attrgetter("num_crops")
    return Breakdown(
        score=rate_of(scored, lambda o: o.score),
        score_bounds=_bounds(valid),
        metrics=tuple(sorted({o.metric for o in scored if o.metric})),
        accuracy_rule=rate_of(valid, _right_by_rule),
        accuracy_judged=rate_of(valid, lambda o: o.correct) if judged or unjudged else NONE,
        num_judged=len(judged),
        num_unjudged=len(unscored),
        orientation_fixed=rate_of(valid, lambda o: o.fixed),
        tool_on_upright=rate_of(valid, lambda o: o.num_calls > 0 if o.is_upright else None),
        operations_mean=mean_of(o.num_operations for o in answered),
        length_mean=mean_of(o.num_tokens for o in valid),
        crop_iou=rate_of(valid, lambda o: o.crop_iou),
        crops_faithful=rate_of_events(valid, *crop_counts),
        crops_faithful_when_right=rate_of_events([o for o in valid if o.right], *crop_counts),
        pass_at_k=_pass_at(scored),
        by_transform=_by(clean, lambda o: o.variant.orientation, TRANSFORMS),
        mean_of_six=mean_of_columns(clean, TRANSFORMS),
        mean_of_transformed=mean_of_columns(clean, ORIENTATIONS),
        by_corruption=_by_corruption(scored, clean),
        by_source=_by(scored, lambda o: o.variant.data_source),
        as_given=_by([o for o in scored if o.variant.as_given], lambda o: o.variant.data_source),
        by_category=_by([o for o in scored if o.category], lambda o: o.category),
    )


def _bounds(valid: Sequence[Outcome]) -> tuple[float, float] | None:
    scores = [outcome.score for outcome in valid]
    if not any(score is None for score in scores):
        return None
    return mean_of(score or 0.0 for score in scores), mean_of(1.0 if score is None else score for score in scores)


def _by_corruption(scored: Sequence[Outcome], clean: Sequence[Outcome]) -> dict[str, dict[int, Rate]]:
    corrupted = grouped([outcome for outcome in scored if outcome.variant.severity], lambda o: o.variant.corruption)
    beside = {0: rate_of(clean, lambda o: o.score)} if clean else {}
    return {name: beside | _by(found, lambda o: o.variant.severity) for name, found in corrupted.items()}


def _right_by_rule(outcome: Outcome) -> float | None:
    if outcome.is_unjudged:
        return 0.0  # the judge is asked only where the rule says no
    return None if outcome.correct is None else float(outcome.correct and outcome.scored_by == "rule")


def _by(found: Sequence[Outcome], key: Callable[[Outcome], Any], order: Sequence[Hashable] = ()) -> dict[Any, Rate]:
    """Mean score by a key; in the given order, then sorted by the key itself."""
    groups = grouped(found, key)
    names = dict.fromkeys([*(name for name in order if name in groups), *groups])
    return {name: rate_of(groups[name], lambda o: o.score) for name in names}


def mean_of_columns(found: Sequence[Outcome], columns: Sequence[str]) -> Rate:
    """Unweighted mean of the columns of a robustness table; `n` is the number of images, 0 where a column is empty.

    A question with variants in several columns is resampled with all of them.

    Args:
        found: Scored outcomes.
        columns: Orientations.
    """
    shown = [[outcome for outcome in found if outcome.variant.orientation == name] for name in columns]
    if not all(shown):
        return NONE
    scores = [[outcome.score or 0.0 for outcome in column] for column in shown]
    return rate_of_columns(scores, [[outcome.variant.cluster for outcome in column] for column in shown])


def _pass_at(scored: Sequence[Outcome]) -> dict[int, Rate]:
    """pass@k for powers of two, over the tasks that have as many scored samples."""
    tasks = grouped(scored, lambda o: o.task_id)
    most = max((len(samples) for samples in tasks.values()), default=0)
    if most < 2:
        return {}
    found = {}
    for k in (2**power for power in range(most.bit_length())):
        enough = [samples for samples in tasks.values() if len(samples) >= k]
        chances = [pass_at_k(len(samples), sum(bool(o.right) for o in samples), k) for samples in enough]
        found[k] = rate(chances, [samples[0].variant.cluster for samples in enough])
    return found
