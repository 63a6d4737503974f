"""What lies in a run folder: evaluations, training trajectories, metric curves, timings, configs.

Layout: `RUN/eval/<name>/`, `RUN/rl/` and `RUN/rl_accuracy/` are trajectory stores; `RUN/<stage>/metrics.csv` is what
Lightning's CSVLogger wrote, `RUN/<stage>/fit_config.yaml` the resolved config; `RUN/timing.json` holds seconds per
stage. Every part may be missing.
"""

from __future__ import annotations

import csv
import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cv_lightning.types import DataError

EVALUATION_NAME = re.compile(r"(?P<stage>\w+)_(?P<mode>greedy|sampled)_(?P<tool>tool|notool)")
STAGES = {"base": "before training", "sft": "SFT", "rl": "RL", "rl_accuracy": "RL, accuracy reward only"}
"""Stages that a run may have, in order, and what people call them."""
NOT_SECONDS = ("seed", "ranks", "iterations", "per_kind")
"""What `timing.json` holds besides seconds."""


def stage_label(stage: str) -> str:
    """Name of a stage for people."""
    return STAGES.get(stage, stage.replace("_", " "))


def stage_order(stage: str) -> tuple[int, str]:
    """Sort key of stages: the known ones as they follow each other, then the others by name."""
    known = list(STAGES)
    return (known.index(stage) if stage in known else len(known), stage)


@dataclass(slots=True, kw_only=True)
class Store:
    """One trajectory store of a run."""

    name: str
    """Path below the run: `rl`, `eval/sft_greedy_tool`, ...; `.` for the run's own folder."""
    path: Path

    @property
    def is_evaluation(self) -> bool:
        """True for the stores below `eval`."""
        return self.name.startswith("eval/")

    @property
    def label(self) -> str:
        """Name for people: `SFT, greedy, tool off`; `RL training`."""
        match = EVALUATION_NAME.fullmatch(self.name.removeprefix("eval/"))
        if match is not None:
            off = ", tool off" if match["tool"] == "notool" else ""
            return f"{stage_label(match['stage'])}, {match['mode']}{off}"
        if self.is_evaluation:
            return stage_label(self.name.removeprefix("eval/"))
        stage, _, rest = stage_label(self.name).partition(",")
        return "training" if self.name == "." else f"{stage} training" + (f",{rest}" if rest else "")


@dataclass(slots=True, kw_only=True)
class Curve:
    """One metric over a stage."""

    name: str
    steps: list[float]
    values: list[float]
    """Finite; rows in which the metric is empty are left out."""


@dataclass(slots=True, kw_only=True)
class Run:
    """Everything a run folder holds."""

    folder: Path
    stores: list[Store]
    curves: dict[str, list[Curve]] = field(default_factory=dict)
    """By stage (`sft`, `rl`, ...)."""
    timing: dict[str, float] = field(default_factory=dict)
    """Seconds by stage, `seed` and `ranks`."""
    configs: dict[str, str] = field(default_factory=dict)
    """Text of every resolved config, by path below the run."""
    records: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Command, commit and versions, by path below the run."""


def find_stores(folder: Path) -> list[Path]:
    """Stores of a run: evaluations first, SFT before RL, greedy before sampled, with the tool before without."""
    found = [path.parent for path in folder.glob("**/trajectories") if path.is_dir()]
    return sorted(found, key=lambda path: _order(str(path.relative_to(folder))))


def _order(name: str) -> tuple[object, ...]:
    match = EVALUATION_NAME.fullmatch(name.removeprefix("eval/"))
    if match is None:
        return (2 if name.startswith("eval/") else 3, *stage_order(name))
    return (1, match["mode"] == "sampled", *stage_order(match["stage"]), match["tool"] == "notool")


def load_run(folder: str | Path) -> Run:
    """Read a run folder.

    Raises:
        DataError: the folder does not exist, or has neither trajectories nor metrics.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{folder}: no such run folder; give the folder that fit or test wrote (runs/...)")
    stores = [Store(name=str(path.relative_to(folder)), path=path) for path in find_stores(folder)]
    curves = {}
    files = {str(path.parent.relative_to(folder)): path for path in folder.glob("**/metrics.csv")}
    for stage in sorted(files, key=stage_order):
        if found := read_curves(files[stage]):
            curves["run" if stage == "." else stage] = found
    if not stores and not curves:
        raise DataError(f"{folder}: holds no run: neither trajectories/*.jsonl nor metrics.csv, here or below")
    return Run(
        folder=folder,
        stores=stores,
        curves=curves,
        timing=read_timing(folder),
        configs={str(p.relative_to(folder)): p.read_text() for p in sorted(folder.glob("**/*config.yaml"))},
        records={str(p.relative_to(folder)): _read_json(p) for p in sorted(folder.glob("**/*run.json"))},
    )


def read_timing(folder: Path) -> dict[str, float]:
    """Numbers of `timing.json`: seconds by stage, and `NOT_SECONDS`; empty where there is none."""
    path = folder / "timing.json"
    found = _read_json(path) if path.is_file() else {}
    return {name: value for name, value in found.items() if isinstance(value, int | float)}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text())
    except ValueError as error:
        raise DataError(f"{path}: not JSON ({error}); it was cut off while being written: delete it") from error
    if not isinstance(data, dict):
        raise DataError(f"{path}: expected a JSON object")
    return data


# ------------------------------------------------------------------------------------------------ metrics.csv
def read_curves(path: Path) -> list[Curve]:
    """Curves of a CSVLogger file, in order of its columns; a torn last row and unreadable cells are left out.

    The horizontal axis is the column `iteration` where a row has it, else `step`.
    """
    text = path.read_text(encoding="utf-8", errors="replace")
    # the last cell of a row without its newline may be half a number
    rows = list(csv.DictReader(text[: text.rfind("\n") + 1].splitlines()))
    curves: dict[str, Curve] = {}
    for number, row in enumerate(rows):
        step = _cell(row.get("iteration"))
        step = _cell(row.get("step")) if step is None else step
        for name, cell in row.items():
            if name in (None, "step", "epoch", "iteration"):
                continue
            value = _cell(cell)
            if value is not None:
                curve = curves.setdefault(name, Curve(name=name, steps=[], values=[]))
                curve.steps.append(float(number) if step is None else step)
                curve.values.append(value)
    return list(curves.values())


def _cell(text: str | None) -> float | None:
    try:
        value = float(text or "")
    except (TypeError, ValueError):
        return None
    return value if math.isfinite(value) else None


def parity_max(curves: list[Curve]) -> float | None:
    """Largest engine-versus-trainer difference that any iteration logged; None where none did."""
    values = [value for curve in curves if re.search(r"parity.*max$", curve.name) for value in curve.values]
    return max(values, default=None)
