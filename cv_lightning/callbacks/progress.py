"""Progress of run, rollout and update: live bars on a terminal, lines elsewhere."""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ProgressBar
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column

from cv_lightning.agent.driver import RolloutProgress
from cv_lightning.environment import FILE_ONLY, is_quiet
from cv_lightning.ranges import PositiveInt, check_ranges

LOG = logging.getLogger(__name__)

NEEDS_TOOL = "rollout/tool_use_success"
HEADLINE = {
    "sft/loss": "loss",
    "reward/total": "reward",
    "reward/accuracy": "accuracy",
    NEEDS_TOOL: "tool-use success",
    "rollout/turns_mean": "turns",
    "policy/mismatch_max": "mismatch",
    "time/rollout_s": "rollout s",
    "time/update_s": "update s",
}
"""Metrics that a line shows, with their short names."""
LINE_EVERY_S = 30.0
"""Seconds between two lines about a rollout where there is no terminal."""


class RunProgress(ProgressBar):
    """Lightning's progress bar for iterations that contain a rollout.

    A terminal gets live bars, other outputs (a file, CI) one line every `every` batches. The run's log file gets the
    lines in either case; with `--quiet` they go nowhere else.

    Args:
        every: Batches between two lines.
    """

    def __init__(self, every: PositiveInt = 1) -> None:
        super().__init__()
        check_ranges(RunProgress.__init__, "progress", locals())
        self.every = every
        self.enabled = True
        self.console = Console(file=sys.stderr)
        self.live: Progress | None = None
        self.bar: TaskID | None = None
        self.started = 0.0
        self.first: int | None = None
        """Batches that were done before this start, if the run is a resumed one."""
        self.update_bar: TaskID | None = None
        self.micro_batches, self.update_started = 0, 0.0
        self.num_micro_batches = 0
        """Number of the last update, an estimate for the next one."""

    def disable(self) -> None:
        """Show nothing; Lightning calls this on ranks other than 0."""
        self.enabled = False

    def enable(self) -> None:
        """Show progress again."""
        self.enabled = True

    # ------------------------------------------------------------------ hooks
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Open the bar of the run."""
        self._open("fit", self.total_train_batches if self.total_train_batches != float("inf") else None)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Show one more batch."""
        self._close_update()
        self._advance("fit", batch_idx + 1, self.total_train_batches, headline(trainer))

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Show one more micro-batch of the update."""
        if self.live is None:
            return
        if self.update_bar is None:
            self.update_bar = self.live.add_task("update", total=self.num_micro_batches or None, note="")
            self.micro_batches, self.update_started = 0, time.perf_counter()
        self.micro_batches += 1
        rate = self.micro_batches / max(time.perf_counter() - self.update_started, 1e-9)
        self.live.update(self.update_bar, completed=self.micro_batches, note=f"{rate:.2g} micro-batches/s")

    def _close_update(self) -> None:
        if self.live is not None and self.update_bar is not None:
            self.num_micro_batches = self.micro_batches
            self.live.remove_task(self.update_bar)
        self.update_bar = None

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Close the bars."""
        self._close()

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Open the bar of the test."""
        self._open("test", None)

    def on_test_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Show one more batch."""
        self._advance("test", batch_idx + 1, trainer.num_test_batches[dataloader_idx], "")

    on_test_end = on_train_end

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Close the bars."""
        self._close()

    # ------------------------------------------------------------------ rollouts
    @classmethod
    @contextmanager
    def rollout_of(cls, trainer: pl.Trainer, title: str) -> Iterator[Callable[[RolloutProgress], None] | None]:
        """Show one rollout: a bar of its own on a terminal, elsewhere a line every half minute.

        Yields:
            The function that the agent loop reports to; None where nothing is shown.
        """
        bar = trainer.progress_bar_callback
        if not isinstance(bar, cls) or not bar.enabled:
            yield None
        elif bar.live is None:
            yield bar._lines_of(title)
        else:
            live = bar.live
            task = live.add_task(title, total=None, note="")
            try:
                yield lambda state: live.update(task, total=state.total, completed=state.finished, note=_speed(state))
            finally:
                live.remove_task(task)

    def _lines_of(self, title: str) -> Callable[[RolloutProgress], None]:
        shown = time.perf_counter()

        def show(state: RolloutProgress) -> None:
            nonlocal shown
            if time.perf_counter() - shown > LINE_EVERY_S:
                shown = time.perf_counter()
                left = state.elapsed_s / max(state.finished, 1) * (state.total - state.finished)
                ends = f", {duration(left)} left" if state.finished else ""
                line = f"  {title}: {state.finished}/{state.total} trajectories, {_speed(state)}{ends}"
                LOG.info("%s", line, extra={FILE_ONLY: is_quiet()})

        return show

    # ------------------------------------------------------------------ drawing
    def _open(self, title: str, total: float | None) -> None:
        self.started = time.perf_counter()
        self.first = None
        if self.enabled and self.console.is_terminal and not is_quiet():
            fixed = Column(no_wrap=True, width=8)
            columns = (
                TextColumn("{task.description}", table_column=Column(no_wrap=True)),
                BarColumn(bar_width=20, table_column=Column(no_wrap=True, width=20)),
                MofNCompleteColumn(table_column=Column(no_wrap=True)),
                TimeElapsedColumn(table_column=fixed),
                TimeRemainingColumn(table_column=fixed),
                TextColumn("{task.fields[note]}", table_column=Column(no_wrap=True, ratio=1, overflow="ellipsis")),
            )
            self.live = Progress(*columns, console=self.console, refresh_per_second=4, expand=True)
            self.live.start()
            self.bar = self.live.add_task(title, total=total, note="")

    def _advance(self, title: str, done: int, total: float, note: str) -> None:
        self.first = done - 1 if self.first is None else self.first
        if self.live is not None and self.bar is not None:
            self.live.update(self.bar, completed=done, note=note)
        if self.enabled and (done % self.every == 0 or done == total):
            seconds = time.perf_counter() - self.started
            each = seconds / (done - self.first)
            left = f", {duration(each * (total - done))} left" if done < total < float("inf") else ""
            line = f"{title} {done}/{total:g}  {duration(seconds)}{left}  {note}"
            LOG.info("%s", line, extra={FILE_ONLY: self.live is not None or is_quiet()})

    def _close(self) -> None:
        if self.live is not None:
            self.live.stop()
        self.live = self.bar = None


def duration(seconds: float) -> str:
    """A duration in its two largest units."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes, hours = seconds / 60, seconds / 3600
    return f"{minutes:.0f} min" if minutes < 100 else f"{int(hours)} h {int(minutes) % 60} min"


def _speed(state: RolloutProgress) -> str:
    seconds = max(state.elapsed_s, 1e-9)
    return f"{state.tokens / seconds:,.0f} tokens/s  {state.tool_calls / seconds:,.0f} tool calls/s"


def headline(trainer: pl.Trainer) -> str:
    """The metrics of `HEADLINE` with their short names."""
    shown = {name: float(value) for name, value in trainer.callback_metrics.items() if name in HEADLINE}
    if math.isnan(shown.get(NEEDS_TOOL, 0.0)):
        del shown[NEEDS_TOOL]  # no task of the batch needs the tool
    return "  ".join(f"{short} {shown[name]:.3g}" for name, short in HEADLINE.items() if name in shown)
