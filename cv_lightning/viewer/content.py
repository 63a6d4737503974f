"""What the report says: headlines, tables, interval charts, examples and facts, computed from figures and records."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import Any, NamedTuple

from cv_lightning.digits.ablation import FULL, REDUCED, needless_turns
from cv_lightning.digits.figures import kind_order, training_minutes
from cv_lightning.evaluation.metrics import EvalSummary
from cv_lightning.evaluation.runs import EVALUATION_NAME, NOT_SECONDS, Run, Store, parity_max, stage_label
from cv_lightning.evaluation.statistics import Rate
from cv_lightning.viewer.gallery import Gallery

MODES = ("greedy", "sampled")
Key = tuple[str, str, str]
"""(stage, mode, tool) of a quickstart evaluation."""


@dataclass(slots=True)
class Evaluated:
    """One evaluation of the run, for the tables."""

    store: Store
    figures: EvalSummary

    @property
    def key(self) -> Key:
        """(stage, mode, tool) of a quickstart evaluation; the store's name otherwise."""
        match = EVALUATION_NAME.fullmatch(self.store.name.removeprefix("eval/"))
        return (match["stage"], match["mode"], match["tool"]) if match else (self.store.name, "", "tool")


class Column(NamedTuple):
    """A column of a comparison."""

    stage: str
    mode: str

    @property
    def label(self) -> str:
        """Name of the stage for people."""
        return stage_label(self.stage)


class Row(NamedTuple):
    """A figure of several evaluations."""

    title: str
    note: str
    cells: list[Rate | None]
    """One per column; None where it was not measured."""


class Comparison(NamedTuple):
    """A table: stages and decodings side by side."""

    columns: list[Column]
    rows: list[Row]


# ------------------------------------------------------------------------------------------------ results
COMPARED = (
    ("Accuracy", "tasks that need the tool", "tool", "accuracy"),
    ("… with the tool switched off", "the same tasks", "notool", "accuracy"),
    ("Must-use", "tasks that need the tool", "tool", "must_use"),
    ("Accuracy, upright", "tasks that need no tool", "tool", "accuracy_upright"),
    ("Needless turning", "upright tasks in which the picture was turned", "tool", "spurious"),
)


def comparison(evaluated: list[Evaluated], stages: tuple[str, ...]) -> Comparison | None:
    """The main figures of some stages side by side; None unless one of them was evaluated with the tool."""
    by_key = {entry.key: entry.figures for entry in evaluated}
    columns = [Column(stage, mode) for mode in MODES for stage in stages if (stage, mode, "tool") in by_key]
    rows = []
    for title, note, tool, name in COMPARED:
        figures = [by_key.get((column.stage, column.mode, tool)) for column in columns]
        cells: list[Rate | None] = [getattr(found, name) if found else None for found in figures]
        count = max((cell.n for cell in cells if cell), default=0)
        if count:
            rows.append(Row(title, f"{note}, n = {count}", cells))
    return Comparison(columns, rows) if columns else None


def headlines(evaluated: list[Evaluated]) -> list[dict[str, Any]]:
    """Before and after: the greedy (else sampled) figures of SFT and of RL, where both were evaluated."""
    by_key = {entry.key: entry.figures for entry in evaluated}
    modes = [mode for mode in MODES if ("sft", mode, "tool") in by_key and ("rl", mode, "tool") in by_key]
    if not modes:
        return []
    before, after = by_key["sft", modes[0], "tool"], by_key["rl", modes[0], "tool"]
    off = by_key.get(("rl", modes[0], "notool"))
    tasks = f"of {after.accuracy.n} held-out tasks that need the tool, {modes[0]}"
    found = [
        ("Uses the tool as needed", "must_use", f"must-use: {tasks}"),
        ("Accuracy", "accuracy", tasks + (f"; with the tool switched off {off.accuracy.value:.3f}" if off else "")),
        ("Turns upright images for nothing", "spurious", f"of {after.spurious.n} upright tasks, {modes[0]}"),
    ]
    also = [(by_key["sft", mode, "tool"], by_key["rl", mode, "tool"], mode) for mode in modes[1:]]
    return [
        {
            "title": title,
            "before": getattr(before, name),
            "after": getattr(after, name),
            "also": [(mode, getattr(first, name), getattr(second, name)) for first, second, mode in also],
            "note": note,
        }
        for title, name, note in found
    ]


def interval_rows(evaluated: list[Evaluated]) -> list[dict[str, Any]]:
    """By kind and evaluation: the numbers of the interval charts; the ablation has its own section."""
    rows = []
    for entry in evaluated:
        stage, mode, tool = entry.key
        if stage == REDUCED:
            continue
        for kind, figures in sorted(entry.figures.by_kind.items(), key=lambda item: kind_order(item[0])):
            for name in ("accuracy", "must_use"):
                found: Rate = getattr(figures, name)
                if found.n and (name == "accuracy" or tool == "tool"):
                    label = stage_label(stage) + (", tool off" if tool == "notool" else "")
                    rows.append(
                        {
                            "metric": name,
                            "kind": kind,
                            "label": label if mode else entry.store.label,
                            "stage": stage,
                            "mode": mode,
                            "off": tool == "notool",
                            "rate": found,
                        }
                    )
    return rows


def ablation(run: Run, evaluated: list[Evaluated]) -> dict[str, Any] | None:
    """The run with the accuracy and format reward only beside the other; None where there is none."""
    table = comparison(evaluated, (FULL, REDUCED))
    has_table = table is not None and any(column.stage == REDUCED for column in table.columns)
    if not has_table and REDUCED not in run.curves:
        return None
    return {"table": table if has_table else None, "needless": needless_turns(run.curves)}


# ------------------------------------------------------------------------------------------------ examples
def examples(gallery: Gallery) -> list[dict[str, Any]]:
    """One task of each kind as SFT and RL answered it, drawn by a hash of its id: never by what came of it.

    Returns:
        `kind`, `mode`, and the numbers of the trajectories `before` and `after` in the gallery.
    """
    by_store: dict[str, dict[str, int]] = {}
    tasks: dict[str, str] = {}
    for number, trajectory in enumerate(gallery.trajectories):
        group = gallery.groups[trajectory["group"]]
        by_store.setdefault(gallery.stores[group["store"]]["name"], {}).setdefault(group["task"]["id"], number)
        tasks[group["task"]["id"]] = group["task"]["kind"]
    for mode in MODES:
        before, after = (by_store.get(f"eval/{stage}_{mode}_tool", {}) for stage in ("sft", "rl"))
        chosen: dict[str, str] = {}
        for task in sorted(before.keys() & after.keys(), key=_draw):
            chosen.setdefault(tasks[task], task)
        if chosen:
            kinds = sorted(chosen, key=kind_order)
            return [
                {"kind": kind, "mode": mode, "before": before[chosen[kind]], "after": after[chosen[kind]]}
                for kind in kinds
            ]
    return []


def _draw(task: str) -> bytes:
    return hashlib.blake2b(task.encode(), digest_size=8).digest()


# ------------------------------------------------------------------------------------------------ the run
def lead(run: Run, num_trajectories: int, num_evaluations: int) -> str:
    """One sentence under the title."""
    parts = []
    if "seed" in run.timing:
        parts.append(f"Seed {run.timing['seed']:.0f}.")
    if (minutes := training_minutes(run.timing)) is not None:
        parts.append(f"SFT, RL and their evaluations took {minutes:.1f} minutes.")
    sets = f"{len(run.stores)} set{'' if len(run.stores) == 1 else 's'}"
    parts.append(f"{num_trajectories:,} stored trajectories in {sets}")
    return " ".join(parts) + (f", {num_evaluations} of them evaluations." if num_evaluations else ".")


def facts(run: Run) -> list[tuple[str, str]]:
    """What the run was, in a line each."""
    found = []
    seconds = {name: value for name, value in run.timing.items() if name not in NOT_SECONDS}
    if seconds:
        parts = [f"{name.replace('_', ' ')} {_duration(value)}" for name, value in seconds.items()]
        found.append(("time", ", ".join(parts)))
    if run.timing.get("ranks"):
        found.append(("ranks", f"{run.timing['ranks']:.0f}"))
    for stage, curves in run.curves.items():
        if (parity := parity_max(curves)) is not None:
            found.append((f"{stage_label(stage)}: engine versus trainer", f"log-probabilities within {parity:.1e}"))
    record = next(iter(run.records.values()), {})
    for name in ("commit", "started", "python", "devices"):
        if record.get(name):
            value = record[name]
            found.append((name, ", ".join(map(str, value)) if isinstance(value, list) else str(value)))
    if isinstance(record.get("versions"), dict):
        found.append(("versions", ", ".join(f"{name} {number}" for name, number in record["versions"].items())))
    return found


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.1f} min"


SETTING = re.compile(
    r"^\s*(tool_share|direct_turned|direct_small|needless_share|warm_up_\w+|temperature|num_samples|lr|seed_everything"
    r"|num_steps|num_iterations|tasks_per_iteration|kl_weight|num_minibatches|clip_low|clip_high):\s*(\S.*)$"
)


def settings(run: Run) -> list[tuple[str, str, str]]:
    """(config file, key, value) of the settings a reader asks for first; the whole files stand below them."""
    found = []
    for path, text in run.configs.items():
        for line in text.splitlines():
            if (match := SETTING.match(line)) and match[2] not in ("null", "{}"):
                found.append((path, match[1], match[2]))
    return list(dict.fromkeys(found))
