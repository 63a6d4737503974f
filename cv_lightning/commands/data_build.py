"""`cv-lightning data build-sft | build-rl | corrupt`: make data sets from tables and from other data sets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from cv_lightning.command_line import run_verb
from cv_lightning.factory.progress import progress


def build_sft(args: list[str]) -> int:
    """Make SFT conversations. Exit code 0: made; 1: some could not be verified; 2: error."""
    from cv_lightning.factory.build_sft import BuildSFT
    from cv_lightning.factory.build_sft import build_sft as build

    def run(config: BuildSFT) -> int:
        with progress("conversations") as show:
            report = build(config, show)
        _print_sft(report)
        Console().print(f"written to {config.out}", highlight=False, soft_wrap=True)
        verification = report.get("verification")
        return int(verification is not None and verification["verified"] < verification["conversations"])

    return run_verb(BuildSFT, args, "data build-sft", run)


def build_rl(args: list[str]) -> int:
    """Make RL tasks. Exit code 0: made; 2: error."""
    from cv_lightning.factory.build_rl import BuildRL
    from cv_lightning.factory.build_rl import build_rl as build

    def run(config: BuildRL) -> None:
        with progress("tasks measured") as show:
            report = build(config, show)
        _print_rl(report)
        Console().print(f"written to {config.out}", highlight=False, soft_wrap=True)

    return run_verb(BuildRL, args, "data build-rl", run)


def corrupt(args: list[str]) -> int:
    """Write a benchmark turned and corrupted. Exit code 0: written; 2: error."""
    from cv_lightning.factory.corrupt import Corrupt, write_corrupted

    def run(config: Corrupt) -> None:
        with progress("tasks") as show:
            counts = write_corrupted(config, show)
        _print_counts(f"{sum(counts.values())} tasks", ("form", "tasks"), counts)
        Console().print(f"written to {config.out}", highlight=False, soft_wrap=True)

    return run_verb(Corrupt, args, "data corrupt", run)


# ------------------------------------------------------------------------------------------------ tables
def _print_sft(report: Mapping[str, Any]) -> None:
    console = Console()
    kept = f"{report['kept']} of {report['tried']} conversations kept"
    table = Table("kind", title=kept, title_justify="left")
    for column in ("tried", "kept", "share", "wanted"):
        table.add_column(column, justify="right")
    for kind, counts in report["kinds"].items():
        shares = f"{counts['share']:.1%}", f"{counts['wanted_share']:.1%}"
        table.add_row(kind, str(counts["tried"]), str(counts["kept"]), *shares)
    if report["kinds"]:
        console.print(table)
    _print_reasons(report)
    lines = [] if report["kinds"] else [kept]
    if report["rows_of_no_kind"]["count"]:
        lines.append(f"{report['rows_of_no_kind']['count']} rows fit none of the kinds")
    if usage := {name: value for name, value in report["usage"].items() if value}:
        lines.append(", ".join(f"{name.replace('_', ' ')} {value:g}" for name, value in usage.items()))
    if found := report.get("verification"):
        lines.append(f"verified from the file: {found['verified']} of {found['conversations']}")
    lines.append(f"{report['seconds']:g} s, {report['per_second']:g} conversations a second")
    console.print("\n".join(lines), highlight=False)


def _print_rl(report: Mapping[str, Any]) -> None:
    title = f"{report['kept']} tasks of {report['rows']} rows"
    _print_counts(title, ("required", "tasks"), report["required"])
    _print_reasons(report)
    if report["pass_rates"]:
        listed = ", ".join(f"{low}: {count}" for low, count in report["pass_rates"].items())
        Console().print(f"pass rates from, tasks: {listed}", highlight=False)
    Console().print(f"{report['seconds']:g} s", highlight=False)


def _print_counts(title: str, heads: tuple[str, str], counts: Mapping[str, int]) -> None:
    table = Table(heads[0], title=title, title_justify="left")
    table.add_column(heads[1], justify="right")
    for name, count in counts.items():
        table.add_row(name, str(count))
    Console().print(table)


def _print_reasons(report: Mapping[str, Any]) -> None:
    """Tables of the rows that were left out: reason, count and first case."""
    for title in ("differing", "dropped", "unusable rows"):
        reasons = report.get(title.replace(" ", "_"), {})
        table = Table("reason", title=title, title_justify="left")
        table.add_column("count", justify="right")
        table.add_column("first", overflow="fold")
        for reason, found in reasons.items():
            table.add_row(reason, str(found["count"]), str(found["first"])[:160])
        if reasons:
            Console().print(table)
