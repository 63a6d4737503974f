"""Content of a run's report: headlines, tables, intervals, examples and facts, from the run's own records.

An application adds names and order of its stages, and sections of its own, with `RunSections`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import yaml

from cv_lightning.evaluation.metrics import EvalSummary
from cv_lightning.evaluation.runs import Run, Store, mismatch_max
from cv_lightning.evaluation.statistics import Rate
from cv_lightning.viewer.gallery import Gallery
from cv_lightning.viewer.overview import is_smoke

MODES = ("greedy", "sampled")
SMOKE = "Smoke run ({}): every stage ran once, small, to see that it works. No learning is claimed."


class EvaluatedStore(NamedTuple):
    """One evaluation of the run."""

    store: Store
    figures: EvalSummary
    label: str


class StageColumn(NamedTuple):
    """A column of a table of stages."""

    stage: str
    label: str
    mode: str


class FigureRow(NamedTuple):
    """One figure of several evaluations."""

    title: str
    note: str
    cells: list[Rate | None]
    """One value per column; None without a measurement."""


class StageTable(NamedTuple):
    """Stages and decodings side by side."""

    columns: list[StageColumn]
    rows: list[FigureRow]


@dataclass(frozen=True, kw_only=True)
class Section:
    """A section that an application adds to the page."""

    id: str
    title: str
    lead: str = ""
    texts: Sequence[tuple[str, Sequence[str]]] = ()
    """Headings with their sentences."""
    table: StageTable | None = None
    rows_title: str = ""
    rows: Sequence[tuple[str, str, str]] = ()
    """Rows of label, value and note."""
    charts: list[dict[str, Any]] = field(default_factory=list)
    """Charts of `evaluation.curves`; only one section of a page may have some."""


class RunSections:
    """An application's additions to the report of one of its runs. This base class adds nothing.

    Args:
        run: The run.
    """

    stages: ClassVar[Mapping[str, str]] = {}
    """Names of stages for people, in the order of the tables; further stages follow by name."""
    kinds: ClassVar[Sequence[str]] = ()
    """Kinds of tasks in the order of the tables; further kinds follow by name."""
    apart: ClassVar[Collection[str]] = ()
    """Stages that have a section of their own instead of a place in the main tables."""
    settings: ClassVar[Collection[str]] = ()
    """Further config keys in the table of main settings."""
    data_names: ClassVar[Mapping[str, str]] = {}
    """Names of DataModules without files, for people, by class name."""

    def __init__(self, run: Run) -> None:
        self.run = run

    def title(self) -> str:
        """Title of the page; empty: what was trained on what, from the run's configs."""
        return ""

    def banner(self) -> str:
        """A warning over the results; empty for none."""
        return SMOKE.format("fast_dev_run") if is_smoke(self.run) else ""

    def lead(self) -> list[str]:
        """Sentences under the title."""
        return []

    def facts(self) -> list[tuple[str, str]]:
        """Facts about the run: name and value."""
        return []

    def sections(self, evaluated: Sequence[EvaluatedStore]) -> list[Section]:
        """Sections between results and curves."""
        return []

    def label(self, stage: str) -> str:
        """Name of a stage for people."""
        return self.stages.get(stage, stage.replace("_", " ") or "model")

    def stage_order(self, stage: str) -> tuple[int, str]:
        """Sort key of stages."""
        return _order(list(self.stages), stage)

    def kind_order(self, kind: str) -> tuple[int, str]:
        """Sort key of kinds of tasks."""
        return _order(self.kinds, kind)

    def main_stages(self, evaluated: Sequence[EvaluatedStore]) -> list[str]:
        """Stages of the main tables that were evaluated with the tool, in order."""
        found = {entry.store.stage for entry in evaluated if entry.store.mode and entry.store.tool}
        return sorted(found - set(self.apart), key=self.stage_order)


def _order(known: Sequence[str], name: str) -> tuple[int, str]:
    return (known.index(name) if name in known else len(known), name)


# ------------------------------------------------------------------------------------------------ results
COMPARED = (
    ("Accuracy", "tasks that need the tool", True, "accuracy"),
    ("Accuracy with the tool disabled", "the same tasks", False, "accuracy"),
    ("Tool-use success", "tasks that need the tool", True, "tool_use_success"),
    ("Accuracy, upright", "tasks that need no tool", True, "accuracy_upright"),
    ("Unnecessary rotations", "upright tasks in which the image was rotated", True, "spurious"),
)


def figures_of(evaluated: Sequence[EvaluatedStore]) -> dict[tuple[str, str, bool], EvalSummary]:
    """Figures of the evaluations that have a record, by stage, mode and tool."""
    return {(e.store.stage, e.store.mode, e.store.tool): e.figures for e in evaluated if e.store.mode}


def stage_table(evaluated: Sequence[EvaluatedStore], stages: Sequence[str], app: RunSections) -> StageTable | None:
    """The main figures of stages side by side; None unless one of them was evaluated with the tool."""
    by_key = figures_of(evaluated)
    columns = [
        StageColumn(stage, app.label(stage), mode)
        for mode in MODES
        for stage in stages
        if (stage, mode, True) in by_key
    ]
    rows = []
    for title, note, tool, name in COMPARED:
        figures = [by_key.get((column.stage, column.mode, tool)) for column in columns]
        cells: list[Rate | None] = [getattr(found, name) if found else None for found in figures]
        if count := max((cell.n for cell in cells if cell), default=0):
            rows.append(FigureRow(title, f"{note}, n = {count}", cells))
    return StageTable(columns, rows) if columns else None


def headlines(evaluated: Sequence[EvaluatedStore], app: RunSections) -> list[dict[str, Any]]:
    """Figures before and after: greedy (else sampled) ones of the application's last two stages."""
    by_key = figures_of(evaluated)
    stages = [stage for stage in app.main_stages(evaluated) if stage in app.stages][-2:]
    modes = [mode for mode in MODES if all((stage, mode, True) in by_key for stage in stages)]
    if len(stages) < 2 or not modes:
        return []
    before, after = (by_key[stage, modes[0], True] for stage in stages)
    off = by_key.get((stages[1], modes[0], False))
    tasks = f"of {after.accuracy.n} held-out tasks that need the tool, {modes[0]}"
    found = [
        ("Tool-use success", "tool_use_success", tasks),
        ("Accuracy", "accuracy", tasks + (f"; with the tool disabled {off.accuracy.value:.3f}" if off else "")),
        ("Unnecessary rotations on upright images", "spurious", f"of {after.spurious.n} upright tasks, {modes[0]}"),
    ]
    also = [(mode, *(by_key[stage, mode, True] for stage in stages)) for mode in modes[1:]]
    return [
        {
            "title": title,
            "stages": [app.label(stage) for stage in stages],
            "before": getattr(before, name),
            "after": getattr(after, name),
            "also": [(mode, getattr(first, name), getattr(second, name)) for mode, first, second in also],
            "note": note,
        }
        for title, name, note in found
    ]


def interval_rows(evaluated: Sequence[EvaluatedStore], app: RunSections) -> list[dict[str, Any]]:
    """Rows of the interval charts, by kind of task and evaluation."""
    rows = []
    for entry in evaluated:
        store = entry.store
        if store.stage in app.apart:
            continue
        label = app.label(store.stage) + ("" if store.tool else ", tool disabled")
        for kind, figures in sorted(entry.figures.by_kind.items(), key=lambda item: app.kind_order(item[0])):
            for name in ("accuracy", "tool_use_success") if store.tool else ("accuracy",):
                found: Rate = getattr(figures, name)
                row: dict[str, Any] = {"metric": name, "kind": kind, "rate": found}
                row |= {"label": label if store.mode else entry.label}
                row |= {"stage": store.stage, "mode": store.mode, "off": not store.tool}
                rows += [row] if found.n else []
    return rows


# ------------------------------------------------------------------------------------------------ examples
def examples(gallery: Gallery, evaluated: Sequence[EvaluatedStore], app: RunSections) -> list[dict[str, Any]]:
    """One task of each kind as the last two stages answered it, chosen by a hash of its id, not by the outcome.

    Returns:
        For each task `kind`, `mode`, `labels`, and the numbers of its trajectories `before` and `after` in the gallery.
    """
    by_store: dict[str, dict[str, int]] = {}
    kinds: dict[str, str] = {}
    for number, trajectory in enumerate(gallery.trajectories):
        group = gallery.groups[trajectory["group"]]
        by_store.setdefault(gallery.stores[group["store"]]["name"], {}).setdefault(group["task"]["id"], number)
        kinds[group["task"]["id"]] = group["task"]["kind"]
    names = {(e.store.stage, e.store.mode): e.store.name for e in evaluated if e.store.tool}
    stages = app.main_stages(evaluated)[-2:]
    for mode in MODES if len(stages) == 2 else ():
        before, after = (by_store.get(names.get((stage, mode), ""), {}) for stage in stages)
        chosen: dict[str, str] = {}
        for task in sorted(before.keys() & after.keys(), key=_draw):
            chosen.setdefault(kinds[task], task)
        if chosen:
            labels = [app.label(stage) for stage in stages]
            return [
                {"kind": kind, "mode": mode, "labels": labels, "before": before[task], "after": after[task]}
                for kind, task in sorted(chosen.items(), key=lambda item: app.kind_order(item[0]))
            ]
    return []


def _draw(task: str) -> bytes:
    return hashlib.blake2b(task.encode(), digest_size=8).digest()


# ------------------------------------------------------------------------------------------------ the run
def lead(run: Run, num_trajectories: int, num_evaluations: int, app: RunSections) -> str:
    """The sentences under the title."""
    sets = f"{len(run.stores)} set{'' if len(run.stores) == 1 else 's'}"
    evaluations = f", {num_evaluations} of them evaluations" if num_evaluations else ""
    stored = [f"{num_trajectories:,} stored trajectories in {sets}{evaluations}."] if run.stores else []
    return " ".join([f"Run {run.folder.resolve().name}.", *app.lead(), *stored])


def facts(run: Run, app: RunSections) -> list[tuple[str, str]]:
    """Facts about the run: name and value."""
    found = app.facts()
    for stage, curves in run.curves.items():
        if (mismatch := mismatch_max(curves)) is not None:
            found.append((f"{app.label(stage)}: engine versus trainer", f"log-probabilities within {mismatch:.1e}"))
    record = next(iter(run.records.values()), {})
    for name in ("commit", "started", "python", "devices"):
        if record.get(name):
            value = record[name]
            found.append((name, ", ".join(map(str, value)) if isinstance(value, list) else str(value)))
    if isinstance(record.get("versions"), dict):
        found.append(("versions", ", ".join(f"{name} {number}" for name, number in record["versions"].items())))
    return found


MAIN_SETTINGS = frozenset(
    "temperature num_samples lr seed_everything num_steps num_iterations tasks_per_iteration kl_weight kl.weight"
    " num_minibatches clip_low clip_high".split()
)


def settings(run: Run, app: RunSections) -> list[tuple[str, str, str]]:
    """(config file, key, value) of the main settings; the page shows the whole files below them."""
    wanted = MAIN_SETTINGS.union(app.settings)
    found = []
    for path, text in run.configs.items():
        try:
            config = yaml.safe_load(text)
        except yaml.YAMLError:
            continue
        for name, value in _leaves(config):
            key = name.rpartition(".")[2]
            if value is not None and (key in wanted or name in wanted):
                found.append((path, key if key in wanted else name, str(value)))
    return list(dict.fromkeys(found))


def _leaves(value: Any, parent: str = "") -> Iterator[tuple[str, Any]]:
    """`parent.key` and value of every leaf."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        if isinstance(item, dict | list):
            yield from _leaves(item, str(key))
        else:
            yield f"{parent}.{key}", item
