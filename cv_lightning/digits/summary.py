"""`cv-lightning quickstart-summary RUN`: write RUN/summary.json and print its tables."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from math import nan
from pathlib import Path

from rich.console import Console
from rich.table import Table

from cv_lightning.command_line import run_verb
from cv_lightning.digits.figures import Evaluations, write_summary
from cv_lightning.digits.rotations import rotations_while_sampling
from cv_lightning.digits.stages import FULL, REDUCED, kind_order, stage_label, stage_order
from cv_lightning.evaluation.statistics import Rate

ROWS = (
    ("accuracy", "tool", "accuracy"),
    ("  tool switched off", "notool", "accuracy"),
    ("tool-use success", "tool", "tool_use_success"),
    ("accuracy, upright", "tool", "accuracy_upright"),
    ("unneeded rotations", "tool", "spurious"),
)
"""Title, evaluation and figure of each row."""
CAPTION = (
    "accuracy and tool-use success over the tasks that need the tool, 95 % intervals below; tool-use success: answered "
    "on an upright image after a fitting crop, or after a printed text; unneeded rotations: fraction of upright tasks"
)
NO_RATE = Rate(nan, nan, nan, 0)
LABEL_WIDTH, MAX_COLUMNS = 20, 4
"""Limits for a terminal of 80 columns."""


def quickstart_summary(run: Path, seed: int | None = None) -> None:
    """Summarise a quickstart run: accuracy and tool use after each stage.

    Args:
        run: The run's folder, with eval/<stage>_<greedy|sampled>_<tool|notool>/ in it.
        seed: Seed of the run; by default that of timing.json or of the folder's name.
    """
    result, found = write_summary(run, seed)
    console = Console()
    for table in tables(found):
        console.print(table)
    for entry in rotations_while_sampling(run):
        rotations = f"unnecessary rotations on upright images while sampling, {entry.label}: {100 * entry.mean:.1f} %"
        console.print(f"{rotations} ({entry.note})", highlight=False)
    mismatch = "not logged" if result["mismatch_max"] is None else f"{result['mismatch_max']:.1e}"
    minutes = "time unknown" if result["minutes"] is None else f"{result['minutes']:.1f} minutes"
    console.print(f"seed {result['seed']}, {minutes}, largest engine-versus-trainer difference {mismatch}")
    console.print(f"written to {run / 'summary.json'}")


def tables(found: Evaluations) -> list[Table]:
    """Tables of stages and kinds, before and after; then those of the ablation, if there is one."""
    stages = sorted({stage for stage, _, _ in found}, key=stage_order)
    main = [stage for stage in stages if stage != REDUCED]
    result = [_stages(found, part, "Held-out tasks, before and after") for part in _columns(found, main)]
    result += [_kinds(found, part) for part in _columns(found, main)]
    if REDUCED in stages:
        parts = _columns(found, [FULL, REDUCED])
        result += [_stages(found, part, "With and without process reward") for part in parts]
    return result


def _columns(found: Evaluations, stages: Iterable[str]) -> list[list[tuple[str, str]]]:
    """(stage, mode) of the columns of each table."""
    modes = [mode for mode in ("greedy", "sampled") if any(key[1] == mode for key in found)]
    columns = [(stage, mode) for mode in modes for stage in stages]
    return [columns[start : start + MAX_COLUMNS] for start in range(0, len(columns), MAX_COLUMNS)]


def _table(columns: list[tuple[str, str]], title: str, *headings: str) -> Table:
    table = Table(title=title, title_justify="left", caption_justify="left")
    for heading in headings:
        table.add_column(heading, max_width=LABEL_WIDTH)
    for stage, mode in columns:
        label = "no process" if stage == REDUCED else stage_label(stage)
        table.add_column(f"{label}\n{mode}", justify="right", no_wrap=True)
    return table


def _stages(found: Evaluations, columns: list[tuple[str, str]], title: str) -> Table:
    table = _table(columns, title, "")
    table.caption = CAPTION
    for label, tool, name in ROWS:
        evaluations = [found.get((stage, mode, tool)) for stage, mode in columns]
        rates = [getattr(each, name) if each else NO_RATE for each in evaluations]
        if not any(rate.n for rate in rates) and label != ROWS[0][0]:
            continue
        text = "[bold]{0.value:.3f}[/bold]\n[dim]{0.low:.3f}-{0.high:.3f}[/dim]"
        table.add_row(label, *(text.format(rate) if rate.n else "-" for rate in rates))
    return table


def _kinds(found: Evaluations, columns: list[tuple[str, str]]) -> Table:
    table = _table(columns, "By kind of task", "kind", "")
    kinds = dict.fromkeys(kind for evaluation in found.values() for kind in evaluation.by_kind)
    for kind in sorted(kinds, key=kind_order):
        for label, tool, name in ROWS[:3]:
            evaluations = [found.get((stage, mode, tool)) for stage, mode in columns]
            figures = [each.by_kind.get(kind) if each else None for each in evaluations]
            rates = [getattr(each, name) if each else NO_RATE for each in figures]
            if any(rate.n for rate in rates):
                count = max(each.n if each else 0 for each in figures)
                heading = f"{kind.replace('_', ' ')} ({count})" if label == "accuracy" else ""
                table.add_row(heading, label, *(f"{rate.value:.2f}" if rate.n else "-" for rate in rates))
        table.add_section()
    return table


main = partial(run_verb, quickstart_summary, name="quickstart-summary")
