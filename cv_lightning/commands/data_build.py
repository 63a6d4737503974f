"""`python -m cv_lightning data build-sft | build-rl | corrupt`: data sets made from tables and from other data sets."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Self, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from cv_lightning.command_line import read_command_line
from cv_lightning.environment import is_quiet
from cv_lightning.types import CVLightningError

LOG = logging.getLogger(__name__)
Config = TypeVar("Config")
LINE_EVERY_S = 30.0
"""Without a terminal, seconds between two lines."""


def build_sft(args: list[str]) -> int:
    """Make SFT conversations. Exit code 0: made; 1: not everything verified; 2: cannot be made."""
    from cv_lightning.factory.sft import BuildSFT
    from cv_lightning.factory.sft import build_sft as build

    def run(config: BuildSFT) -> int:
        with BuildProgress("conversations") as progress:
            report = build(config, progress.show)
        _print_sft(report)
        Console().print(f"written to {config.out}", highlight=False, soft_wrap=True)
        verification = report.get("verification")
        return int(verification is not None and verification["verified"] < verification["conversations"])

    return _run(BuildSFT, args, "build-sft", run)


def build_rl(args: list[str]) -> int:
    """Make RL tasks. Exit code 0: made; 2: cannot be made."""
    from cv_lightning.factory.rl import BuildRL
    from cv_lightning.factory.rl import build_rl as build

    def run(config: BuildRL) -> int:
        with BuildProgress("tasks measured") as progress:
            report = build(config, progress.show)
        _print_rl(report)
        Console().print(f"written to {config.out}", highlight=False, soft_wrap=True)
        return 0

    return _run(BuildRL, args, "build-rl", run)


def corrupt(args: list[str]) -> int:
    """Write a benchmark turned and corrupted. Exit code 0: written; 2: cannot be written."""
    from cv_lightning.factory.robustness import Corrupt, write_corrupted

    def run(config: Corrupt) -> int:
        with BuildProgress("tasks") as progress:
            counts = write_corrupted(config, progress.show)
        console = Console()
        table = Table("form", title=f"{sum(counts.values())} tasks", title_justify="left")
        table.add_column("tasks", justify="right")
        for name, count in counts.items():
            table.add_row(name, str(count))
        console.print(table)
        console.print(f"written to {config.out}", highlight=False, soft_wrap=True)
        return 0

    return _run(Corrupt, args, "corrupt", run)


def _run(kind: type[Config], args: list[str], name: str, run: Callable[[Config], int]) -> int:
    """Read a config from the command line and run it; errors of ours are one message each, exit code 2."""
    flags = _with_files(args)
    try:
        config: Any = read_command_line(kind, flags, as_positional=False, prog=f"cv_lightning data {name}")
        return run(config)
    except (CVLightningError, ValueError, OSError) as error:
        print(f"data {name}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"data {name}: stopped; build-sft and measured pass rates go on with the same command", file=sys.stderr)
        return 130


def _with_files(args: list[str]) -> list[str]:
    """Leading arguments that are no flags are the files: `a.parquet b.csv --out x` for `--files=[a.parquet,b.csv]`."""
    count = next((at for at, arg in enumerate(args) if arg.startswith("-")), len(args))
    return [f"--files={json.dumps(args[:count])}", *args[count:]] if count else args


class BuildProgress:
    """A bar with rate and remaining time on a terminal; elsewhere a line every half minute; with --quiet nothing.

    Args:
        what: is counted.
    """

    def __init__(self, what: str) -> None:
        console = Console(stderr=True)
        self.what = what
        self.has_bar = console.is_terminal and not is_quiet()
        columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"))
        self.bar = Progress(*columns, TimeRemainingColumn(), console=console, transient=True, disable=not self.has_bar)
        self.task = self.bar.add_task("", total=None, note="")
        self.begun = self.shown = time.perf_counter()
        self.first: int | None = None
        """Done before this start."""

    def __enter__(self) -> Self:
        self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.stop()

    def show(self, done: int, total: int | None = None, note: str = "") -> None:
        """Tell how far the build is."""
        now = time.perf_counter()
        self.first = done if self.first is None else self.first
        rate = (done - self.first) / max(now - self.begun, 1e-9)
        text = f"{note}  {rate:.3g}/s".strip()
        self.bar.update(self.task, total=total, completed=done, note=text)
        if not self.has_bar and now - self.shown > LINE_EVERY_S:
            self.shown = now
            left = f", {(total - done) / rate:.0f} s left" if total and rate else ""
            LOG.info("%s: %d%s, %s%s", self.what, done, f"/{total}" if total else "", text, left)


# ------------------------------------------------------------------------------------------------ tables
def _print_sft(report: Mapping[str, Any]) -> None:
    console = Console()
    table = Table("kind", title=f"{report['kept']} of {report['tried']} conversations kept", title_justify="left")
    for column in ("tried", "kept", "share", "wanted"):
        table.add_column(column, justify="right")
    for kind, counts in report["kinds"].items():
        shares = f"{counts['share']:.1%}", f"{counts['wanted_share']:.1%}"
        table.add_row(kind, str(counts["tried"]), str(counts["kept"]), *shares)
    console.print(table)
    _print_reasons(console, "dropped", report["dropped"])
    _print_reasons(console, "unusable rows", report["unusable_rows"])
    if report["rows_of_no_kind"]["count"]:
        console.print(f"{report['rows_of_no_kind']['count']} rows can be none of the kinds", highlight=False)
    usage = {name: value for name, value in report["usage"].items() if value}
    if usage:
        console.print(", ".join(f"{name.replace('_', ' ')} {value:g}" for name, value in usage.items()))
    if "verification" in report:
        found = report["verification"]
        console.print(f"verified from the file: {found['verified']} of {found['conversations']}", highlight=False)
    console.print(f"{report['seconds']:g} s, {report['per_second']:g} conversations a second", highlight=False)


def _print_rl(report: Mapping[str, Any]) -> None:
    console = Console()
    table = Table("required", title=f"{report['kept']} tasks of {report['rows']} rows", title_justify="left")
    table.add_column("tasks", justify="right")
    for name, count in report["required"].items():
        table.add_row(name, str(count))
    console.print(table)
    _print_reasons(console, "dropped", report["dropped"])
    _print_reasons(console, "unusable rows", report["unusable_rows"])
    if report["pass_rates"]:
        listed = ", ".join(f"{low}: {count}" for low, count in report["pass_rates"].items())
        console.print(f"pass rates from, tasks: {listed}", highlight=False)
    console.print(f"{report['seconds']:g} s", highlight=False)


def _print_reasons(console: Console, title: str, reasons: Mapping[str, Mapping[str, Any]]) -> None:
    """A table of reasons with their counts and the first case of each; nothing where there are none."""
    if not reasons:
        return
    table = Table("reason", title=title, title_justify="left")
    table.add_column("count", justify="right")
    table.add_column("first", overflow="fold")
    for reason, found in reasons.items():
        table.add_row(reason, str(found["count"]), str(found["first"])[:160])
    console.print(table)
