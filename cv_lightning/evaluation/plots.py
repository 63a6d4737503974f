"""Figures of an evaluation (scores with intervals) and of an ablation study (training curves of its arms)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from cv_lightning.evaluation.runs import Curve
from cv_lightning.evaluation.statistics import Rate
from cv_lightning.evaluation.tables import COLUMN_NAMES, Evaluated
from cv_lightning.files import whole_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SMOOTH = 7
"""Iterations over which a point of a study's lines is averaged."""


def plot_results(found: Mapping[str, Evaluated], path: Path) -> None:
    """Write a PNG: one panel for every way in which the evaluations can be split, one colour per evaluation."""
    from matplotlib.figure import Figure  # takes a second

    panels = [(title, series) for title, series in _panels(found).items() if any(series.values())]
    figure = Figure(figsize=(max(6.0, 5.5 * len(panels)), 4.2), layout="constrained")
    for number, (title, series) in enumerate(panels, start=1):
        _bars(figure.add_subplot(1, len(panels), number), title, series)
    named = dict(pair for axes in figure.axes for pair in zip(*axes.get_legend_handles_labels()[::-1], strict=True))
    if named:
        figure.legend(list(named.values()), list(named), loc="outside upper center", ncols=len(named), fontsize=8)
    _save(figure, path, 120)


def plot_study(curves: Mapping[str, Mapping[str, Sequence[Curve]]], path: Path) -> None:
    """Write a PNG: a panel for each metric, a line for each arm, a band from least to largest seed.

    Args:
        curves: One curve per seed, by title of the panel and name of the arm. Averaged over `SMOOTH` iterations.
        path: The file.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6 * len(curves), 4.6), layout="constrained")
    arms = list(dict.fromkeys(arm for by_arm in curves.values() for arm in by_arm))
    for number, (title, by_arm) in enumerate(curves.items(), start=1):
        axes = figure.add_subplot(1, len(curves), number)
        for arm, seeds in by_arm.items():
            lines = [dict(zip(curve.steps, _smooth(curve.values), strict=True)) for curve in seeds]
            steps = sorted(set.intersection(*map(set, lines)))
            values = [[line[step] for line in lines] for step in steps]
            colour, dashes = f"C{arms.index(arm) % 10}", "--" if arms.index(arm) >= len(arms) / 2 else "-"
            axes.plot(steps, [fmean(several) for several in values], dashes, color=colour, label=arm, lw=1.4)
            axes.fill_between(steps, [*map(min, values)], [*map(max, values)], color=colour, alpha=0.12, lw=0)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("iteration", fontsize=8)
        axes.set_ylim(bottom=0)
        axes.tick_params(labelsize=8)
    named = dict(zip(*figure.axes[0].get_legend_handles_labels()[::-1], strict=True))
    figure.legend([*named.values()], [*named], loc="outside lower center", ncols=3, fontsize=8)
    _save(figure, path, 110)


def _save(figure: Figure, path: Path, dpi: int) -> None:
    with whole_file(path) as temporary:
        figure.savefig(temporary, dpi=dpi, format="png")


def _smooth(values: Sequence[float]) -> list[float]:
    """Centred means, over fewer values at the ends."""
    half = SMOOTH // 2
    return [fmean(values[max(0, at - half) : at + half + 1]) for at in range(len(values))]


def _panels(found: Mapping[str, Evaluated]) -> dict[str, dict[str, dict[str, Rate]]]:
    """Rates by title of the panel, by evaluation, by label."""
    panels: dict[str, dict[str, dict[str, Rate]]] = defaultdict(dict)
    for name, entry in found.items():
        part = entry.breakdown
        turned = {COLUMN_NAMES.get(key, key): value for key, value in part.by_transform.items()}
        kinds = {kind: value.accuracy for kind, value in entry.summary.by_kind.items()}
        severities = {
            f"{corruption} {level}": value
            for corruption, rates in part.by_corruption.items()
            for level, value in rates.items()
        }
        panels["score"][name] = {"score": part.score, "tool-use success": entry.summary.tool_use_success}
        panels["by orientation"][name] = turned if len(turned) > 1 else {}
        panels["by kind"][name] = kinds if len(kinds) > 1 else {}
        panels["by severity"][name] = severities
    return panels


def _bars(axes: Any, title: str, series: Mapping[str, Mapping[str, Rate]]) -> None:
    labels = list(dict.fromkeys(label for rates in series.values() for label in rates))
    width = 0.8 / len(series)
    for offset, (name, rates) in enumerate(series.items()):
        shown = [(at, rates[label]) for at, label in enumerate(labels) if label in rates and rates[label].n]
        if not shown:
            continue
        places = [at - 0.4 + (offset + 0.5) * width for at, _ in shown]
        values = [value.value for _, value in shown]
        errors = [(max(0.0, value.value - value.low), max(0.0, value.high - value.value)) for _, value in shown]
        axes.bar(places, values, width, label=name)
        axes.errorbar(places, values, [*zip(*errors, strict=True)], fmt="none", ecolor="black", lw=1)
    axes.set_xticks(range(len(labels)), labels, rotation=30, ha="right", fontsize=8)
    axes.set_ylim(0, 1)
    axes.set_title(title, fontsize=10)
