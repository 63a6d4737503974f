"""What a sweep found: a table, `sweep.json` and `sweep.png`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cv_lightning.commands.sweep_file import Scalar, SweepFile
from cv_lightning.files import whole_file, write_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FINISHED, FAILED = "finished", "failed"


@dataclass(frozen=True, kw_only=True)
class TrialRow:
    """One trial."""

    number: int
    state: str
    """finished, stopped early, or failed."""
    value: float | None
    """Last value of the metric; None where there is none."""
    parameters: dict[str, Scalar]
    """By flag."""
    seconds: float
    folder: str
    error: str = ""

    def summary(self, metric: str) -> str:
        """One line for people."""
        value = "" if self.value is None else f", {metric} {self.value:.4g}"
        return f"{self.state}{value} ({self.seconds:.0f} s){': ' if self.error else ''}{self.error}"


def best_of(sweep: SweepFile, rows: Sequence[TrialRow]) -> TrialRow | None:
    """The finished trial with the best value."""
    finished = [(row.value, row) for row in rows if row.state == FINISHED and row.value is not None]
    sign = 1 if sweep.maximize else -1
    return max(finished, key=lambda pair: sign * pair[0])[1] if finished else None


def write_result(out: Path, sweep: SweepFile, rows: Sequence[TrialRow]) -> None:
    """Write `sweep.json` and `sweep.png`, each whole or not at all."""
    best = best_of(sweep, rows)
    content = {
        "file": str(sweep.path),
        "method": sweep.method,
        "metric": sweep.metric,
        "goal": "maximize" if sweep.maximize else "minimize",
        "failed": sum(row.state == FAILED for row in rows),
        "best": None if best is None else asdict(best),
        "trials": [asdict(row) for row in rows],
    }
    write_text(out / "sweep.json", json.dumps(content, indent=1) + "\n")
    if any(row.value is not None for row in rows):
        with whole_file(out / "sweep.png") as temporary:
            temporary.write_bytes(plot(sweep, rows))


def short_names(names: Sequence[str]) -> dict[str, str]:
    """Each flag's last part, or as many of its last parts as tell it from the others."""
    short = {}
    for name in names:
        parts = name.split(".")
        for length in range(1, len(parts) + 1):
            short[name] = ".".join(parts[-length:])
            if sum(other.endswith("." + short[name]) or other == short[name] for other in names) == 1:
                break
    return short


def print_table(sweep: SweepFile, rows: Sequence[TrialRow]) -> None:
    """Print all trials, the best first."""
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table

    short = short_names(list(sweep.parameters))
    best = best_of(sweep, rows)
    title = f"{sweep.path.stem}: {len(rows)} trials"
    table = Table(box=SIMPLE, title=title, pad_edge=False, padding=(0, 1, 0, 0))
    for name in ("trial", sweep.metric):
        table.add_column(name, overflow="fold", min_width=6)
    for name in sweep.parameters:  # a long name breaks, a value never
        width = max((len(_cell(row.parameters.get(name))) for row in rows), default=0)
        table.add_column(short[name], overflow="fold", min_width=width)
    table.add_column("state", min_width=13 if any(row.state.startswith("stopped") for row in rows) else 8)
    worst = float("-inf" if sweep.maximize else "inf")
    ranked = sorted(rows, key=lambda row: worst if row.value is None else row.value, reverse=sweep.maximize)
    for row in ranked:
        value = "" if row.value is None else f"{row.value:.4g}"
        shown = [_cell(row.parameters.get(name)) for name in sweep.parameters]
        style = "bold" if row is best else "dim" if row.state != FINISHED else None
        table.add_row(str(row.number), value, *shown, row.state, style=style)
    console = Console()
    console.print(table)
    for row in rows:
        if row.error:
            console.print(f"trial {row.number} failed: {row.error} ({row.folder}/output.log)", markup=False)


def _cell(value: Scalar) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def plot(sweep: SweepFile, rows: Sequence[TrialRow]) -> bytes:
    """A PNG: the metric over trials, and over each parameter."""
    import io

    from matplotlib.figure import Figure

    names = list(sweep.parameters)
    columns = min(3, 1 + len(names))
    lines = -(-(1 + len(names)) // columns)
    figure = Figure(figsize=(3.6 * columns, 2.8 * lines), layout="constrained")
    axes = [axis for line in figure.subplots(lines, columns, squeeze=False) for axis in line]
    _progress(axes[0], sweep, rows)
    short = short_names(names)
    for axis, name in zip(axes[1:], names, strict=False):
        _scatter(axis, sweep, name, short[name], rows)
    for axis in axes[1 + len(names) :]:
        axis.remove()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()


def _progress(axis: Axes, sweep: SweepFile, rows: Sequence[TrialRow]) -> None:
    """Values in order, and the best so far; failed trials as crosses on the axis."""
    from matplotlib.ticker import MaxNLocator

    for index, row in enumerate(rows, 1):
        if row.value is None:
            axis.plot(index, 0, "x", color="tab:red", transform=axis.get_xaxis_transform(), clip_on=False)
        else:
            axis.plot(index, row.value, "o", color="tab:blue", mfc=None if row.state == FINISHED else "none")
    leaders = [best_of(sweep, rows[:index]) for index in range(1, len(rows) + 1)]
    steps = [leader.value for leader in leaders if leader is not None and leader.value is not None]
    first = len(rows) + 1 - len(steps)
    axis.step(range(first, len(rows) + 1), steps, where="post", color="tab:grey", label="best so far")
    axis.set(xlabel="trial", ylabel=sweep.metric)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    if steps:
        axis.legend(fontsize="small")


def _scatter(axis: Axes, sweep: SweepFile, name: str, label: str, rows: Sequence[TrialRow]) -> None:
    """The metric over one parameter; trials that were stopped early are hollow."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution

    domain = sweep.parameters[name]
    by_choice = isinstance(domain, CategoricalDistribution)
    for row in rows:
        if row.value is not None and name in row.parameters:
            place: Any = str(row.parameters[name]) if by_choice else row.parameters[name]
            axis.plot(place, row.value, "o", color="tab:blue", mfc=None if row.state == FINISHED else "none")
    if isinstance(domain, FloatDistribution) and domain.log:
        axis.set_xscale("log")
    axis.set(xlabel=label, ylabel=sweep.metric)
