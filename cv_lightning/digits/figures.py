"""The quickstart's results in one file: accuracy and tool use after SFT and RL, with the tool and without, by kind.

All figures are computed from the stored trajectories of `RUN/eval/<stage>_<greedy|sampled>_<tool|notool>/`.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

from cv_lightning.digits.stages import EVALUATION_NAME, kind_order, read_timing, stage_order, training_minutes
from cv_lightning.evaluation.metrics import EvalSummary, summarise
from cv_lightning.evaluation.runs import mismatch_max, read_curves
from cv_lightning.files import write_json
from cv_lightning.trajectory import read_groups
from cv_lightning.types import DataError

STAGES = ("sft", "rl")
MODES = {"sampled": "_sampled", "greedy": ""}
"""Decoding and the suffix of its key in the summary."""
Evaluations = dict[tuple[str, str, str], EvalSummary]
"""By stage, mode (greedy, sampled) and tool (tool, notool)."""


def evaluations(run: Path) -> Evaluations:
    """Figures of every evaluation in `RUN/eval`.

    Raises:
        DataError: There is none.
    """
    found: Evaluations = {}
    for folder in sorted((run / "eval").glob("*")):
        match = EVALUATION_NAME.fullmatch(folder.name)
        if match is not None and (folder / "trajectories").is_dir():
            found[match["stage"], match["mode"], match["tool"]] = summarise(read_groups(folder))
    if not found:
        raise DataError(
            f"{run}: no evaluations (expected eval/<stage>_<greedy|sampled>_<tool|notool>/trajectories/*.jsonl); "
            "run `cv-lightning test` into this folder first"
        )
    return found


def summary(run: Path, found: Evaluations, seed: int | None = None) -> dict[str, Any]:
    """The content of `summary.json`.

    Args:
        run: The run's folder, for timings and training metrics.
        found: Its evaluations.
        seed: Seed of the run; by default that of `timing.json`, else the number in a folder name like `...-seed3`.

    Returns:
        seed, minutes (SFT, RL and their evaluations; None unless each was timed), mismatch_max, then `<stage>_sampled`
        and `<stage>` (greedy) for SFT, RL and any other evaluated stage; figures that were not measured are None.
    """
    timing = read_timing(run)
    curves = read_curves(path) if (path := run / "rl" / "metrics.csv").is_file() else []
    named = re.search(r"seed(\d+)", run.resolve().name)
    known = [seed, timing.get("seed"), named and named[1]]
    result: dict[str, Any] = {
        "seed": next((int(value) for value in known if value is not None), None),
        "minutes": training_minutes(timing),
        "mismatch_max": mismatch_max(curves),
    }
    others = sorted({stage for stage, _, _ in found} - set(STAGES), key=stage_order)
    for stage in (*STAGES, *others):
        for mode, suffix in MODES.items():
            result[stage + suffix] = stage_figures(found, stage, mode)
    return result


def stage_figures(found: Evaluations, stage: str, mode: str) -> dict[str, Any] | None:
    """The figures of one stage and decoding; None where it was not evaluated with the tool."""
    with_tool, without = found.get((stage, mode, "tool")), found.get((stage, mode, "notool"))
    if with_tool is None:
        return None
    off = without.by_kind if without else {}
    by_kind = {
        kind: {
            "n": figures.n,
            "accuracy": _number(figures.accuracy.value),
            "tool_use_success": _number(figures.tool_use_success.value),
            "turns": _number(figures.turns),
            "accuracy_tool_off": _number(off[kind].accuracy.value) if kind in off else None,
        }
        for kind, figures in sorted(with_tool.by_kind.items(), key=lambda item: kind_order(item[0]))
    }
    rates = ("accuracy", "tool_use_success", "spurious", "accuracy_upright")
    figures = {name: _number(getattr(with_tool, name).value) for name in rates}
    return figures | {"accuracy_tool_off": _number(without.accuracy.value) if without else None, "by_kind": by_kind}


def write_summary(run: str | Path, seed: int | None = None) -> tuple[dict[str, Any], Evaluations]:
    """Compute `RUN/summary.json` and write it, atomically.

    Returns:
        The content of the file, and the evaluations with their intervals.

    Raises:
        DataError: The run has no evaluations.
    """
    run = Path(run)
    found = evaluations(run)
    result = summary(run, found, seed)
    write_json(run / "summary.json", result)
    return result, found


def _number(value: float) -> float | None:
    return None if math.isnan(value) else round(value, 6)
