"""Figures of the ablation study on digits: every arm over its seeds, as JSON and as a Markdown table."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import fmean

from cv_lightning.evaluation.curves import mean_between
from cv_lightning.evaluation.runs import Curve, read_curves, read_figures
from cv_lightning.types import DataError

FOUND_AT = 0.5
"""Tool-use success in training at which an arm counts as having found the tool."""
EARLY = (6, 25)
"""Iterations, both included, whose tool-use success shows how fast the tool is adopted."""
LAST_ITERATIONS = 5
"""Number of iterations at the end over which training figures are averaged."""
COLUMNS = {
    "tool_use_success_training": ("tool-use success, end of training", 2),
    "accuracy_training": ("accuracy, end of training", 2),
    "calls_training": ("calls, end of training", 2),
    "spurious_training": ("unnecessary rotations, end of training", 3),
    "tool_use_success_early": ("tool-use success, iterations 6-25", 2),
    "found_at": ("tool found at iteration", 0),
    "tool_use_success_greedy": ("test, greedy: tool-use success", 2),
    "accuracy_greedy": ("test, greedy: accuracy", 2),
    "tool_use_success_sampled": ("test, sampled: tool-use success", 2),
    "calls_sampled": ("test, sampled: calls", 2),
    "spurious_sampled": ("test, sampled: unnecessary rotations", 3),
}
"""Title and decimals of the table's columns, by their figure."""
TRAINING = {
    "tool_use_success": "tool-use success",
    "accuracy": "accuracy, tool needed",
    "tool_calls_mean": "calls",
    "spurious": "unnecessary rotations on upright images",
}
"""Titles of the metrics of training rollouts."""
Figures = dict[str, float]
"""Figures by the keys of `COLUMNS`."""


def seed_figures(folder: Path, arm: str) -> Figures:
    """Figures of one arm and seed; empty where it was neither trained nor tested.

    Args:
        folder: Folder of the seed: `<arm>/metrics.csv`, `eval/<arm>_<greedy|sampled>_tool/metrics.json`.
        arm: Name of the arm; an SFT has no training figures.

    Returns:
        Figures over tasks that need the tool, except unnecessary rotations (upright tasks) and calls (all tasks).
        `found_at` is infinite where tool-use success never reached `FOUND_AT` in training.
    """
    figures: dict[str, float | None] = {}
    if (folder / arm / "model").is_dir():  # training is finished
        figures |= _training(read_curves(folder / arm / "metrics.csv"))
    tests = [folder / "eval" / f"{arm}_{mode}_tool" / "metrics.json" for mode in ("greedy", "sampled")]
    if all(path.is_file() for path in tests):
        greedy, sampled = map(read_figures, tests)
        figures |= {
            "tool_use_success_greedy": greedy["tool_use_success"]["value"],
            "accuracy_greedy": greedy["accuracy"]["value"],
            "tool_use_success_sampled": sampled["tool_use_success"]["value"],
            "calls_sampled": sampled["tool_calls_mean"],
            "spurious_sampled": sampled["spurious"]["value"],
        }
    return {key: value for key, value in figures.items() if value is not None}


def _training(curves: list[Curve]) -> Figures:
    last = int(max((max(curve.steps) for curve in curves if curve.steps), default=0))
    means = {"tool_use_success_early": mean_between(curves, "rollout/tool_use_success", *EARLY)}
    for name in TRAINING:
        key = f"{name.replace('tool_calls_mean', 'calls')}_training"
        means[key] = mean_between(curves, f"rollout/{name}", last - LAST_ITERATIONS + 1, last)
    found = {key: mean for key, (mean, count) in means.items() if count}
    for curve in curves:
        if curve.name == "rollout/tool_use_success":
            pairs = zip(curve.steps, curve.values, strict=True)
            found["found_at"] = next((step for step, value in pairs if value >= FOUND_AT), math.inf)
    return found


def study(folder: Path, arms: Iterable[str]) -> dict[str, dict[str, Figures]]:
    """Figures by arm and seed folder (`seed0`, ...) of what is finished so far.

    Raises:
        DataError: No arm is finished.
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
    """Curves of all trained seeds, by title of the metric and label of the arm."""
    found: dict[str, dict[str, list[Curve]]] = {}
    for arm in arms:
        trained = [path.parent for path in sorted(folder.glob(f"seed*/{arm}/model"))]
        curves = [curve for run in trained for curve in read_curves(run / "metrics.csv")]
        for name, title in TRAINING.items():
            if wanted := [curve for curve in curves if curve.name == f"rollout/{name}"]:
                found.setdefault(title, {})[label(arm)] = wanted
    return found


def markdown(found: dict[str, dict[str, Figures]], label: Callable[[str], str]) -> str:
    """One row per arm: the mean over its seeds and, in brackets, least and largest."""
    lines = ["| arm | seeds | " + " | ".join(title for title, _ in COLUMNS.values()) + " |"]
    lines.append("|---" * (len(COLUMNS) + 2) + "|")
    for arm, by_seed in found.items():
        cells = [
            _cell([figures[key] for figures in by_seed.values() if key in figures], digits)
            for key, (_, digits) in COLUMNS.items()
        ]
        lines.append(f"| {label(arm)} | {len(by_seed)} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _cell(values: list[float], digits: int) -> str:
    texts = ["never" if math.isinf(value) else f"{value:.{digits}f}" for value in values]
    if len(set(texts) - {"never"}) == 0:
        return texts[0] if texts else "-"
    if len(values) == 1 or "never" in texts:
        return ", ".join(texts)
    return f"{fmean(values):.{max(digits, 1)}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"


def to_json(found: dict[str, dict[str, Figures]]) -> dict[str, dict[str, dict[str, float | None]]]:
    """JSON values; infinite becomes null."""
    return {
        arm: {
            seed: {key: None if math.isinf(value) else value for key, value in figures.items()}
            for seed, figures in by_seed.items()
        }
        for arm, by_seed in found.items()
    }
