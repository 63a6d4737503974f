"""The ablation study on digits: the figures of every arm over its seeds, as JSON and as a Markdown table."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from cv_lightning.evaluation.curves import mean_between
from cv_lightning.evaluation.runs import Curve, read_curves, read_figures
from cv_lightning.types import DataError

FOUND_AT = 0.5
"""Share of tool-use success while training from which on an arm has found the tool."""
EARLY = (6, 25)
"""Iterations, both included, whose tool-use success says how fast the tool is taken up."""
LAST_ITERATIONS = 5
"""Iterations at the end that training figures are means of."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyColumn:
    """One column of the table."""

    key: str
    title: str
    digits: int = 2


COLUMNS = (
    StudyColumn(key="tool_use_success_training", title="tool-use success, end of training"),
    StudyColumn(key="accuracy_training", title="accuracy, end of training"),
    StudyColumn(key="calls_training", title="calls, end of training"),
    StudyColumn(key="spurious_training", title="needless turning, end of training", digits=3),
    StudyColumn(key="tool_use_success_early", title="tool-use success, iterations 6-25"),
    StudyColumn(key="found_at", title="tool found at iteration", digits=0),
    StudyColumn(key="tool_use_success_greedy", title="test, greedy: tool-use success"),
    StudyColumn(key="accuracy_greedy", title="test, greedy: accuracy"),
    StudyColumn(key="tool_use_success_sampled", title="test, sampled: tool-use success"),
    StudyColumn(key="calls_sampled", title="test, sampled: calls"),
    StudyColumn(key="spurious_sampled", title="test, sampled: needless turning", digits=3),
)
TRAINING = {
    "tool_use_success": "tool-use success",
    "accuracy": "accuracy, tool needed",
    "tool_calls_mean": "calls",
    "spurious": "needless turning of upright",
}
"""Metrics of the rollouts, and what they are called."""


def seed_figures(folder: Path, arm: str) -> dict[str, float]:
    """Figures of one arm and seed; empty where it was neither trained nor tested.

    Args:
        folder: of the seed: `<arm>/metrics.csv`, `eval/<arm>_<greedy|sampled>_tool/metrics.json`.
        arm: its name; of an SFT there are no training figures.

    Returns:
        By the keys of `COLUMNS`; `found_at` is infinite where tool-use success never reached `FOUND_AT` while
        training. Over tasks that need the tool, but for needless turning (upright tasks) and calls (all tasks).
    """
    figures: dict[str, float | None] = {}
    if (folder / arm / "model").is_dir():  # training is finished
        figures |= _training(read_curves(folder / arm / "metrics.csv"))
    tests = {mode: folder / "eval" / f"{arm}_{mode}_tool" / "metrics.json" for mode in ("greedy", "sampled")}
    if all(path.is_file() for path in tests.values()):
        greedy, sampled = (read_figures(path) for path in tests.values())
        figures |= {
            "tool_use_success_greedy": greedy["tool_use_success"]["value"],
            "accuracy_greedy": greedy["accuracy"]["value"],
            "tool_use_success_sampled": sampled["tool_use_success"]["value"],
            "calls_sampled": sampled["tool_calls_mean"],
            "spurious_sampled": sampled["spurious"]["value"],
        }
    return {key: value for key, value in figures.items() if value is not None}


def _training(curves: list[Curve]) -> dict[str, float]:
    last = int(max((max(curve.steps) for curve in curves if curve.steps), default=0))
    found: dict[str, float] = {}
    for name in TRAINING:
        mean, count = mean_between(curves, f"rollout/{name}", last - LAST_ITERATIONS + 1, last)
        if count:
            found[f"{name.replace('tool_calls_mean', 'calls')}_training"] = mean
    early, count = mean_between(curves, "rollout/tool_use_success", *EARLY)
    if count:
        found["tool_use_success_early"] = early
    curve = next((curve for curve in curves if curve.name == "rollout/tool_use_success"), None)
    if curve is None:
        return found  # of an SFT: nothing is rolled out
    pairs = zip(curve.steps, curve.values, strict=True)
    return found | {"found_at": next((step for step, value in pairs if value >= FOUND_AT), math.inf)}


def study(folder: Path, arms: Iterable[str]) -> dict[str, dict[str, dict[str, float]]]:
    """Figures by arm and seed folder (`seed0`, ...) of what is finished so far.

    Raises:
        DataError: nothing has.
    """
    seeds = sorted(path for path in folder.glob("seed*") if path.is_dir())
    found = {arm: {seed.name: figures for seed in seeds if (figures := seed_figures(seed, arm))} for arm in arms}
    found = {arm: by_seed for arm, by_seed in found.items() if by_seed}
    if not found:
        raise DataError(f"{folder}: no arm is finished yet (expected seed*/<arm>/metrics.csv)")
    return found


def training_curves(
    folder: Path, arms: Iterable[str], label: Callable[[str], str]
) -> dict[str, dict[str, list[Curve]]]:
    """By title of the metric, by label of the arm: the curve of every seed that is trained."""
    found: dict[str, dict[str, list[Curve]]] = {}
    for arm in arms:
        trained = [path.parent for path in sorted(folder.glob(f"seed*/{arm}/model"))]
        curves = [curve for run in trained for curve in read_curves(run / "metrics.csv")]
        for name, title in TRAINING.items():
            if wanted := [curve for curve in curves if curve.name == f"rollout/{name}"]:
                found.setdefault(title, {})[label(arm)] = wanted
    return found


def markdown(found: dict[str, dict[str, dict[str, float]]], label: Callable[[str], str]) -> str:
    """One row per arm: the mean over its seeds and, in brackets, least and largest."""
    lines = ["| arm | seeds | " + " | ".join(column.title for column in COLUMNS) + " |"]
    lines.append("|---" * (len(COLUMNS) + 2) + "|")
    for arm, by_seed in found.items():
        cells = [_cell([seed.get(column.key) for seed in by_seed.values()], column.digits) for column in COLUMNS]
        lines.append(f"| {label(arm)} | {len(by_seed)} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _cell(values: Sequence[float | None], digits: int) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    if any(math.isinf(value) for value in known):
        return "never" if all(map(math.isinf, known)) else ", ".join(_number(value, digits) for value in known)
    if len(known) == 1:
        return _number(known[0], digits)
    return f"{fmean(known):.{max(digits, 1)}f} ({_number(min(known), digits)}-{_number(max(known), digits)})"


def _number(value: float, digits: int) -> str:
    return "never" if math.isinf(value) else f"{value:.{digits}f}"


def to_json(found: dict[str, dict[str, dict[str, float]]]) -> dict[str, Any]:
    """JSON values; infinite becomes null."""
    return {
        arm: {
            seed: {key: None if math.isinf(value) else value for key, value in figures.items()}
            for seed, figures in by_seed.items()
        }
        for arm, by_seed in found.items()
    }
