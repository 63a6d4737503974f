"""Which curves the report draws together, and how they are thinned."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

from cv_lightning.evaluation.runs import Curve

MAX_POINTS = 400
"""Points of a curve on the page; longer ones are averaged in equal stretches."""
MAX_SERIES = 8
"""Lines of one chart that can still be told apart."""


@dataclass(frozen=True, slots=True)
class ChartRule:
    """Metrics that belong to one heading."""

    title: str
    pattern: str
    shared: bool = False
    """One chart with one axis; else one small chart a metric."""
    note: str = ""


RULES = (
    ChartRule(
        "Reward components",
        r"^reward/(?!.*(_frac|_s|judge))",
        shared=True,
        note="Mean over the iteration's trajectories; each component unweighted, `total` is their weighted sum.",
    ),
    ChartRule(
        "Accuracy and tool use",
        r"(accuracy(_all|_upright)?|must_use|spurious|tool_used_frac)$",
        shared=True,
        note="While sampling for training. must_use: answered on an upright image after a fitting crop; "
        "spurious: an upright image was turned.",
    ),
    ChartRule("Lengths", r"(turns|tokens|tool_calls|length|images|parse_errors)\w*_(mean|max)$|(^|/)tokens$"),
    ChartRule("How trajectories end", r"end_\w+_frac$"),
    ChartRule("Policy update", r"entropy|(^|/|_)kl(_|$)|ratio|clip|parity|mismatch|loss|grad|(^|/)lr"),
    ChartRule("Times and speed", r"^time/|_s$|_per_s$|seconds"),
)


def chart_groups(curves: list[Curve]) -> list[dict[str, Any]]:
    """Sort curves under headings, thin them, and give them as JSON values for the page's script."""
    left = list(curves)
    groups = []
    for rule in (*RULES, ChartRule("Further metrics", "")):
        found = [curve for curve in left if re.search(rule.pattern, curve.name)]
        left = [curve for curve in left if curve not in found]
        if not found:
            continue
        together = found[:MAX_SERIES] if rule.shared else []
        charts = [_chart("", together)] if together else []
        charts += [_chart(curve.name, [curve]) for curve in found if curve not in together]
        groups.append({"title": rule.title, "note": rule.note, "charts": charts})
    return groups


def _chart(title: str, curves: list[Curve]) -> dict[str, Any]:
    return {"title": title, "series": [_series(curve) for curve in curves]}


def _series(curve: Curve) -> dict[str, Any]:
    steps, values = thin(curve.steps, curve.values, MAX_POINTS)
    return {"name": curve.name, "x": steps, "y": [_significant(value) for value in values], "n": len(curve.values)}


def thin(steps: list[float], values: list[float], most: int) -> tuple[list[float], list[float]]:
    """Average consecutive points so that at most `most` are left."""
    if len(steps) <= most:
        return steps, values
    width = math.ceil(len(steps) / most)
    stretches = [slice(start, start + width) for start in range(0, len(steps), width)]
    return [_mean(steps[part]) for part in stretches], [_mean(values[part]) for part in stretches]


def _mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)


def _significant(value: float) -> float:
    return float(f"{value:.5g}")
