"""What lies in a run folder: evaluations, training trajectories, metric curves, timings, configs.

Layout: `RUN/eval/<name>/` and `RUN/rl/` are trajectory stores; `RUN/<stage>/metrics.csv` is what Lightning's
CSVLogger wrote; `RUN/timing.json` holds seconds per stage. Every part may be missing.
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
        """Name for people: `SFT, greedy, tool off`; other names as they stand."""
        match = EVALUATION_NAME.fullmatch(self.name.removeprefix("eval/"))
        if match is None:
            return {"rl": "RL training", ".": "training"}.get(
                self.name, self.name.removeprefix("eval/").replace("_", " ")
            )
        stage = match["stage"].upper() if len(match["stage"]) <= 3 else match["stage"].replace("_", " ").capitalize()
        return f"{stage}, {match['mode']}" + (", tool off" if match["tool"] == "notool" else "")


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
    """Seconds by stage."""
    configs: dict[str, str] = field(default_factory=dict)
    """Text of every resolved config, by path below the run."""
    records: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Command, commit and versions, by path below the run."""


def find_stores(folder: Path) -> list[Path]:
    """Stores of a run: evaluations first, SFT before RL, greedy before sampled, with the tool before without."""
    found = [path.parent for path in folder.glob("**/trajectories") if path.is_dir()]
    return sorted(found, key=lambda path: _order(str(path.relative_to(folder))))


def _order(name: str) -> tuple[int, ...] | tuple[int, str]:
    match = EVALUATION_NAME.fullmatch(name.removeprefix("eval/"))
    if match is None:
        return (2 if name.startswith("eval/") else 3, name)
    stages = ("base", "sft", "rl")
    stage = stages.index(match["stage"]) if match["stage"] in stages else len(stages)
    return (1, int(match["mode"] == "sampled"), stage, int(match["tool"] == "notool"))


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
    for path in sorted(folder.glob("**/metrics.csv")):
        stage = str(path.parent.relative_to(folder)) if path.parent != folder else "run"
        if found := read_curves(path):
            curves[stage] = found
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
    """Seconds by stage from `timing.json`; empty where there is none."""
    path = folder / "timing.json"
    return _read_json(path) if path.is_file() else {}


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
    with path.open(newline="", encoding="utf-8", errors="replace") as file:
        rows = list(csv.DictReader(file))
    curves: dict[str, Curve] = {}
    for number, row in enumerate(rows):
        step = _cell(row.get("iteration"))
        step = _cell(row.get("step")) if step is None else step
        for name, text in row.items():
            if name in (None, "step", "epoch", "iteration"):
                continue
            value = _cell(text)
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
