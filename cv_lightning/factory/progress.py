"""Progress of a command that takes minutes."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from cv_lightning.environment import is_quiet

LOG = logging.getLogger(__name__)
LINE_EVERY_S = 30.0
"""Seconds between two lines where there is no terminal."""


class ShowProgress(Protocol):
    """Shows how many are done, of how many where that is known, and a note."""

    def __call__(self, done: int, total: int | None = None, note: str = "") -> None:
        """Show it."""


@contextmanager
def progress(counted: str) -> Iterator[ShowProgress]:
    """A bar with rate and remaining time on a terminal; elsewhere a line every half minute; with --quiet nothing.

    Args:
        counted: Name of the things that are counted.
    """
    console = Console(stderr=True)
    has_bar = console.is_terminal and not is_quiet()
    columns = (TextColumn(counted), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"))
    bar = Progress(*columns, TimeRemainingColumn(), console=console, transient=True, disable=not has_bar)
    task = bar.add_task("", total=None, note="")
    begun = shown = time.perf_counter()
    first: int | None = None  # number that an earlier start had done

    def show(done: int, total: int | None = None, note: str = "") -> None:
        nonlocal first, shown
        now = time.perf_counter()
        first = done if first is None else first
        rate = (done - first) / max(now - begun, 1e-9)
        text = f"{note}  {rate:.3g}/s".strip()
        bar.update(task, total=total, completed=done, note=text)
        if not has_bar and now - shown > LINE_EVERY_S:
            shown = now
            left = f", {(total - done) / rate:.0f} s left" if total and rate else ""
            LOG.info("%s: %d%s, %s%s", counted, done, f"/{total}" if total else "", text, left)

    with bar:
        yield show
