"""Grouping and thinning of the curves that the report draws."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from cv_lightning.evaluation.runs import Curve

MAX_POINTS = 400
"""Points of a curve on the page; longer curves are averaged over equal intervals."""
MAX_SERIES = 8
"""Lines of one chart that can still be distinguished."""


@dataclass(frozen=True, slots=True)
class ChartRule:
    """Metrics that belong under one heading."""

    title: str
    pattern: str
    """Pattern of the metrics' names; its group `series`, if any, is the name in the legend."""
    shared: bool = False
    """One chart with one axis; else one small chart per metric."""
    note: str = ""
    folded: bool = False
    """Drawn only when a reader opens it."""


RULES = (
    ChartRule("Loss", r"^sft/(?P<series>loss)$", shared=True, note="Mean over the trained tokens."),
    ChartRule(
        "Accuracy and tool use",
        r"^rollout/(?P<series>accuracy|accuracy_upright|tool_use_success|spurious|tool_used_frac)$",
        shared=True,
        note="While sampling for training. accuracy and tool_use_success: tasks that need the tool; accuracy_upright: "
        "those that need none; spurious: share of those in which the image was turned.",
    ),
    ChartRule(
        "Reward",
        r"^reward/(?P<series>\w+)$",
        shared=True,
        note="Mean over the iteration's trajectories: each component unweighted; total is their weighted sum.",
    ),
    ChartRule(
        "Accuracy by source",
        r"^reward[/_]by_source/(?:digits/)?(?P<series>.*)/answer_accuracy$",
        shared=True,
        note="Right answers while sampling for training.",
    ),
    ChartRule("Policy update", r"^(policy|sft)/"),
    ChartRule("Rollouts", r"^rollout/(?!end_|.*_per_s$)"),
    ChartRule("How trajectories end", r"^rollout/end_"),
    ChartRule("Times and speed", r"^(time|engine)/|_per_s$", folded=True),
    ChartRule("Reward by source and by transform", r"^reward[/_]by_", folded=True),
    ChartRule("Further metrics", r"", folded=True),
)
UNITS = (
    (r"tokens_per_s$", "tokens per second"),
    (r"_per_s$", "per second"),
    (r"_s(_max|_mean)?$", "seconds"),
    (r"_frac$|/accuracy|answer_accuracy$|tool_use_success|spurious$", "fraction"),
    (r"^reward[/_]", "reward"),
    (r"^sft/loss$", "nats per token"),
    (r"entropy|kl$|mismatch|log_?prob", "nats"),
    (r"length|tokens", "tokens"),
    (r"/lr$", "learning rate"),
    (r"grad_norm$", "gradient norm"),
)
"""Units of metrics by a pattern of their names, the first that fits; others are counts or have no unit."""
COMPARED = ("rollout/tool_use_success", "rollout/accuracy", "rollout/spurious", "rollout/turns_mean")
"""Metrics by which runs are compared during training."""


def chart_groups(curves: Sequence[Curve]) -> list[dict[str, Any]]:
    """Curves under their headings, thinned, as JSON values for the page's script; constant ones are listed last."""
    num_rows = max((len(curve.values) for curve in curves), default=0)
    still = [curve for curve in curves if 1 < len(curve.values) == num_rows and len(set(curve.values)) == 1]
    left = [curve for curve in curves if curve not in still]
    groups = []
    for rule in RULES:
        found = [curve for curve in left if re.search(rule.pattern, curve.name)]
        left = [curve for curve in left if curve not in found]
        if found:
            groups.append(_group(rule, found))
    if still:
        listed = ", ".join(f"{curve.name} {curve.values[0]:.4g}" for curve in still)
        groups.append({"title": "Metrics that did not change", "note": f"{listed}.", "charts": [], "folded": True})
    return groups


def unit_of(name: str) -> str:
    """Label of the vertical axis of a metric; its own last word where no unit is known."""
    last = name.rpartition("/")[2].removesuffix("_mean").removesuffix("_max")
    return next((unit for pattern, unit in UNITS if re.search(pattern, name)), last.replace("_", " "))


def _group(rule: ChartRule, found: list[Curve]) -> dict[str, Any]:
    """Charts of one heading."""
    matches = {curve.name: re.search(rule.pattern, curve.name) for curve in found}
    names = {
        name: match["series"] if match and "series" in match.groupdict() else name for name, match in matches.items()
    }
    charts, apart = [], list(found)
    if rule.shared:
        together, apart = found[:MAX_SERIES], found[MAX_SERIES:]
        charts.append(_chart("", together, [names[curve.name] for curve in together], big=True))
    charts += [_chart(curve.name, [curve], [curve.name]) for curve in apart]
    return {"title": rule.title, "note": rule.note, "charts": charts, "folded": rule.folded}


def compared_charts(curves: Mapping[str, Sequence[Curve]]) -> list[dict[str, Any]]:
    """One chart for each of `COMPARED`, with a line for each training run that logged it.

    Args:
        curves: Curves by the label of the training run.
    """
    charts = []
    for name in COMPARED:
        found = [(label, curve) for label, logged in curves.items() for curve in logged if curve.name == name]
        if found:
            charts.append(_chart(name.partition("/")[2], [c for _, c in found], [label for label, _ in found]))
    return charts


def _chart(title: str, curves: list[Curve], names: list[str], *, big: bool = False) -> dict[str, Any]:
    series = []
    for curve, name in zip(curves, names, strict=True):
        steps, values = thin(curve.steps, curve.values, MAX_POINTS)
        y = [float(f"{value:.5g}") for value in values]
        series.append({"name": name, "x": steps, "y": y, "n": len(curve.values)})
    return {"title": title, "big": big, "unit": unit_of(curves[0].name), "series": series}


def thin(steps: list[float], values: list[float], most: int) -> tuple[list[float], list[float]]:
    """Average consecutive points so that at most `most` are left."""
    if len(steps) <= most:
        return steps, values
    width = math.ceil(len(steps) / most)
    parts = [slice(start, start + width) for start in range(0, len(steps), width)]
    return [fmean(steps[part]) for part in parts], [fmean(values[part]) for part in parts]


def mean_between(curves: Sequence[Curve], name: str, first: float, last: float) -> tuple[float, int]:
    """Mean of a metric over iterations `first` to `last`, both included, and how many logged it; (NaN, 0) for none."""
    values = [
        value
        for curve in curves
        if curve.name == name
        for step, value in zip(curve.steps, curve.values, strict=True)
        if first <= step <= last
    ]
    return (fmean(values), len(values)) if values else (math.nan, 0)
