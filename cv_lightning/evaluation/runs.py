"""Contents of a run folder: evaluations, trajectories of training, curves and configs.

A folder with `trajectories/` in it is a store; below `eval/` it is an evaluation, with its settings in
`evaluation.json`. The logger writes `metrics.csv`; `*config.yaml` is a resolved config, and `*run.json` has command and
versions. Every part may be missing.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from cv_lightning.renames import migrate_config, new_metric
from cv_lightning.settings import flatten
from cv_lightning.types import DataError

METRICS = "metrics.csv"
"""File with the metrics of a training run."""
EVALUATION_RECORD = "evaluation.json"
"""File of an evaluation's folder with its config fingerprint: setting, model and everything else that matters."""


@dataclass(slots=True, kw_only=True)
class Store:
    """One trajectory store of a run."""

    name: str
    """Path below the run: `rl`, `eval/sft_greedy_tool`, ...; `.` for the run's own folder."""
    path: Path
    stage: str = ""
    """Prefix of an evaluation (`eval_prefix`), which distinguishes models; without a record the folder's name."""
    mode: str = ""
    """Decoding of an evaluation, `greedy` or `sampled`; empty without a record."""
    tool: bool = True
    """False for an evaluation without the tool."""

    @property
    def is_evaluation(self) -> bool:
        """True for the stores below `eval`."""
        return self.name.startswith("eval/")

    @property
    def label(self) -> str:
        """Name to display: `sft, greedy, tool disabled`; `rl training`."""
        return self.label_with({})

    def label_with(self, names: Mapping[str, str]) -> str:
        """Name to display.

        Args:
            names: Names of stages to display, by stage.
        """
        if not self.is_evaluation:
            stage, comma, rest = names.get(self.name, self.name.replace("_", " ")).partition(",")
            return "training" if self.name == "." else f"{stage} training{comma}{rest}"
        stage = names.get(self.stage, self.stage.replace("_", " "))
        return ", ".join(part for part in (stage, self.mode, "" if self.tool else "tool disabled") if part)


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
    configs: dict[str, str] = field(default_factory=dict)
    """Text of every resolved config, by path below the run."""
    records: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Command, commit and versions, by path below the run."""


OWNER = ".owner-{verb}.json"
"""Record of the process that writes into a run's folder; its modification time is a heartbeat."""
OWNER_STALE_S = 60.0
"""Age of a heartbeat in seconds above which its owner counts as gone."""


def find_stores(folder: Path) -> list[Path]:
    """Folders of the stores of a run, sorted by name, evaluations first."""
    found = [path.parent for path in folder.glob("**/trajectories") if path.is_dir()]
    return sorted(found, key=lambda path: (not path.is_relative_to(folder / "eval"), str(path)))


def load_run(folder: str | Path) -> Run:
    """Read a run folder.

    Raises:
        DataError: The folder does not exist, or has neither trajectories nor metrics.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{folder}: no such run folder; give the folder that fit or test wrote (runs/...)")
    stores = [_store(folder, path) for path in find_stores(folder)]
    curves = {}
    for path in sorted(folder.glob(f"**/{METRICS}")):
        if found := read_curves(path):
            stage = str(path.parent.relative_to(folder))
            curves["run" if stage == "." else stage] = found
    if not stores and not curves:
        raise DataError(f"{folder}: holds no run: neither trajectories/*.jsonl nor metrics.csv, here or below")
    return Run(
        folder=folder,
        stores=stores,
        curves=curves,
        configs={str(p.relative_to(folder)): p.read_text() for p in sorted(folder.glob("**/*config.yaml"))},
        records={str(p.relative_to(folder)): read_json(p) for p in sorted(folder.glob("**/*run.json"))},
    )


def _store(folder: Path, path: Path) -> Store:
    """A store as its record describes it."""
    store = Store(name=str(path.relative_to(folder)), path=path, stage=path.name)
    record = read_json(path / EVALUATION_RECORD) if (path / EVALUATION_RECORD).is_file() else {}
    if store.is_evaluation and isinstance(setting := record.get("identity", {}).get("setting"), dict):
        store.stage = path.name.removesuffix(setting["name"]).strip("_")
        store.mode = "sampled" if setting["temperature"] else "greedy"
        store.tool = setting["tool"]
    return store


def read_json(path: Path) -> dict[str, Any]:
    """Read a file that holds a JSON object.

    Raises:
        DataError: It holds something else.
    """
    try:
        data = json.loads(path.read_text())
    except ValueError as error:
        raise DataError(f"{path}: not JSON ({error}); it was cut off while being written: delete it") from error
    if not isinstance(data, dict):
        raise DataError(f"{path}: expected a JSON object")
    return data


def read_figures(path: Path) -> dict[str, Any]:
    """Figures of an evaluation's `metrics.json`, under the names of today.

    Raises:
        DataError: It is not a JSON object.
    """
    return {new_metric(name): value for name, value in read_json(path).items()}


# ------------------------------------------------------------------------------------------------ metrics.csv
def read_rows(path: Path) -> list[dict[str, float]]:
    """Rows of a `metrics.csv` by today's names; a torn last row is left out, and an empty cell is absent.

    Values that are not finite stay; unreadable cells are NaN.
    """
    text = path.read_text(encoding="utf-8", errors="replace")
    # the last cell of a row without its newline may be half a number
    rows = csv.DictReader(text[: text.rfind("\n") + 1].splitlines())
    return [{new_metric(name): _cell(cell) for name, cell in row.items() if name and cell} for row in rows]


def read_curves(path: Path) -> list[Curve]:
    """Curves of a `metrics.csv`, in the order of its columns; a torn last row and unreadable cells are left out.

    The horizontal axis is the column `iteration` where a row has it, else `step`.
    """
    curves: dict[str, Curve] = {}
    for number, row in enumerate(read_rows(path)):
        cells = {name: value for name, value in row.items() if math.isfinite(value)}
        step = cells.get("iteration", cells.get("step", float(number)))
        for name, value in cells.items():
            if name not in ("step", "epoch", "iteration"):
                curve = curves.setdefault(name, Curve(name=name, steps=[], values=[]))
                curve.steps.append(step)
                curve.values.append(value)
    return list(curves.values())


def read_config(text: str) -> dict[str, Any]:
    """A stored config under today's names; empty if it cannot be read."""
    try:
        config = yaml.safe_load(text)
        return migrate_config(config)[0] if isinstance(config, dict) else {}
    except (yaml.YAMLError, DataError, AttributeError, KeyError, TypeError):  # it may have been edited
        return {}


def read_settings(text: str) -> dict[str, Any]:
    """Settings of a stored config by dotted name, under today's names; empty if it cannot be read."""
    config = read_config(text)
    return flatten(config) if config else {}


def _cell(text: object) -> float:
    """Number in a cell; NaN for an empty or unreadable one."""
    try:
        return float(str(text))
    except ValueError:
        return math.nan


def mismatch_max(curves: list[Curve]) -> float | None:
    """Largest train-inference mismatch that any iteration logged; None where none did."""
    values = [value for curve in curves if curve.name.endswith("mismatch_max") for value in curve.values]
    return max(values, default=None)
