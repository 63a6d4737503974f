"""`python -m cv_lightning quickstart-summary RUN`: write RUN/summary.json and print its tables."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from rich.console import Console
from rich.table import Table

from cv_lightning.command_line import run_verb
from cv_lightning.digits.ablation import FIRST, LAST, needless_while_sampling
from cv_lightning.digits.figures import Evaluations, write_summary
from cv_lightning.digits.stages import FULL, REDUCED, kind_order, stage_label, stage_order
from cv_lightning.evaluation.statistics import Rate

ROWS = (
    ("accuracy", "tool", "accuracy"),
    ("  tool switched off", "notool", "accuracy"),
    ("tool-use success", "tool", "tool_use_success"),
    ("accuracy, upright", "tool", "accuracy_upright"),
    ("needless turning", "tool", "spurious"),
)
KIND_ROWS = (
    ("accuracy", "tool", "accuracy"),
    ("  tool off", "notool", "accuracy"),
    ("tool-use success", "tool", "tool_use_success"),
)
CAPTION = (
    "accuracy and tool-use success over the tasks that need the tool, 95 % intervals below; tool-use success: answered "
    "on an upright image after a fitting crop; needless turning: share of upright tasks"
)
LABEL_WIDTH, MAX_COLUMNS = 20, 4
"""A table of that many columns of figures fits a terminal of 80."""


def quickstart_summary(run: Path, seed: int | None = None) -> None:
    """Summarise a quickstart run: accuracy and tool use after each stage.

    Args:
        run: the run's folder, with eval/<stage>_<greedy|sampled>_<tool|notool>/ in it.
        seed: of the run; by default what timing.json or the folder's name says.
    """
    result, found = write_summary(run, seed)
    console = Console()
    for table in tables(found):
        console.print(table)
    for line in _ablation_lines(run):
        console.print(line, highlight=False)
    parity = "not logged" if result["parity_max"] is None else f"{result['parity_max']:.1e}"
    minutes = "time unknown" if result["minutes"] is None else f"{result['minutes']:.1f} minutes"
    console.print(f"seed {result['seed']}, {minutes}, largest engine-versus-trainer difference {parity}")
    console.print(f"written to {run / 'summary.json'}")


def tables(found: Evaluations) -> list[Table]:
    """Stages and kinds, before and after; then the stages that were trained otherwise, if there are any."""
    stages = sorted({stage for stage, _, _ in found}, key=stage_order)
    main = [stage for stage in stages if stage != REDUCED]
    result = [_stages(found, part, "Held-out tasks, before and after") for part in _columns(found, main)]
    result += [_kinds(found, part) for part in _columns(found, main)]
    if REDUCED in stages:
        parts = _columns(found, [FULL, REDUCED])
        result += [_stages(found, part, "With and without process reward") for part in parts]
    return result


def _columns(found: Evaluations, stages: Iterable[str]) -> list[list[tuple[str, str]]]:
    """(stage, mode) of the columns, in as many tables as they need."""
    modes = [mode for mode in ("greedy", "sampled") if any(key[1] == mode for key in found)]
    columns = [(stage, mode) for mode in modes for stage in stages]
    return [columns[start : start + MAX_COLUMNS] for start in range(0, len(columns), MAX_COLUMNS)]


def _table(columns: list[tuple[str, str]], title: str, *headings: str) -> Table:
    table = Table(title=title, title_justify="left", caption_justify="left")
    for heading in headings:
        table.add_column(heading, max_width=LABEL_WIDTH)
    for stage, mode in columns:
        table.add_column(f"{_short_label(stage)}\n{mode}", justify="right", no_wrap=True)
    return table


def _short_label(stage: str) -> str:
    return "no process" if stage == REDUCED else stage_label(stage)


def _stages(found: Evaluations, columns: list[tuple[str, str]], title: str) -> Table:
    table = _table(columns, title, "")
    table.caption = CAPTION
    for label, tool, name in ROWS:
        evaluations = [found.get((stage, mode, tool)) for stage, mode in columns]
        table.add_row(label, *(_cell(getattr(evaluation, name)) if evaluation else "-" for evaluation in evaluations))
    return table


def _kinds(found: Evaluations, columns: list[tuple[str, str]]) -> Table:
    table = _table(columns, "By kind of task", "kind", "")
    kinds = dict.fromkeys(kind for evaluation in found.values() for kind in evaluation.by_kind)
    for kind in sorted(kinds, key=kind_order):
        for row, (label, tool, name) in enumerate(KIND_ROWS):
            cells, counts = [], []
            for stage, mode in columns:
                evaluation = found.get((stage, mode, tool))
                figures = evaluation.by_kind.get(kind) if evaluation else None
                cells.append(_short(getattr(figures, name)) if figures else "-")
                counts.append(figures.n if figures else 0)
            if any(cell != "-" for cell in cells):
                heading = f"{kind.replace('_', ' ')} ({max(counts)})" if row == 0 else ""
                table.add_row(heading, label, *cells)
        table.add_section()
    return table


def _ablation_lines(run: Path) -> list[str]:
    """Needless turns while sampling, with the process reward and without; empty where there is no ablation."""
    return [
        f"needless turns on upright tasks while sampling, {entry.label}: {100 * entry.mean:.1f} % "
        f"(mean of iterations {FIRST}-{LAST}, {entry.num_iterations} logged)"
        for entry in needless_while_sampling(run)
    ]


def _cell(rate: Rate) -> str:
    if rate.n == 0:
        return "-"
    return f"[bold]{rate.value:.3f}[/bold]\n[dim]{rate.low:.3f}-{rate.high:.3f}[/dim]"


def _short(rate: Rate) -> str:
    return "-" if rate.n == 0 else f"{rate.value:.2f}"


def main(args: list[str] | None = None) -> int:
    """Command line entry; returns the exit code."""
    return run_verb(quickstart_summary, args, prog="cv_lightning quickstart-summary", failed=1)
