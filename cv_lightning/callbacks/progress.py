"""Progress: bars for the run, for the rollout and for the update under way; without a terminal, lines."""

from __future__ import annotations

import logging
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
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column

from cv_lightning.agent.driver import RolloutProgress
from cv_lightning.environment import FILE_ONLY, is_quiet

LOG = logging.getLogger(__name__)

HEADLINE = {
    "sft/loss": "loss",
    "reward/total": "reward",
    "reward/accuracy": "accuracy",
    "rollout/tool_use_success": "tool-use success",
    "rollout/turns_mean": "turns",
    "policy/parity_max": "parity",
    "time/rollout_s": "rollout s",
    "time/update_s": "update s",
}
"""Metrics worth a place on the line, and their short names."""
LINE_EVERY_S = 30.0
"""Without a terminal, seconds between two lines about a rollout."""


class RunProgress(ProgressBar):
    """Lightning's progress bar for iterations that contain a rollout.

    On a terminal: live bars. Elsewhere (a log file, CI): one line every `every` batches. The run's log file has the
    lines in either case; with `--quiet` only that.

    Args:
        every: batches between two lines.
    """

    def __init__(self, every: int = 1) -> None:
        super().__init__()
        self.every = every
        self.enabled = True
        self.console = Console(file=sys.stderr)
        self.live: Progress | None = None
        self.bar: TaskID | None = None
        self.started = 0.0
        self.first: int | None = None
        """Batches that were done when this start began: those of a run that goes on."""
        self.update_bar: TaskID | None = None
        self.num_micro_batches = 0
        """Of the last update, by which the next one's end is guessed."""

    # Lightning switches the bar off on ranks other than 0.
    def disable(self) -> None:
        """Show nothing."""
        self.enabled = False

    def enable(self) -> None:
        """Show again."""
        self.enabled = True

    # ------------------------------------------------------------------ hooks
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Open the bar of the run."""
        self._open("fit", self.total_train_batches if self.total_train_batches != float("inf") else None)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Advance."""
        self._close_update()
        self._advance("fit", batch_idx + 1, self.total_train_batches, headline(trainer))

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """One micro-batch of the update is done."""
        if self.live is None:
            return
        if self.update_bar is None:
            self.update_bar = self.live.add_task("update", total=self.num_micro_batches or None, note="")
        self.live.advance(self.update_bar)
        task = self._update_task(self.live)
        rate = task.completed / max(task.elapsed or 0.0, 1e-9)
        self.live.update(self.update_bar, note=f"{rate:.2g} micro-batches/s")

    def _update_task(self, live: Progress) -> Task:
        return next(task for task in live.tasks if task.id == self.update_bar)

    def _close_update(self) -> None:
        if self.live is not None and self.update_bar is not None:
            self.num_micro_batches = int(self._update_task(self.live).completed)
            self.live.remove_task(self.update_bar)
        self.update_bar = None

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Close."""
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
        """Advance."""
        self._advance("test", batch_idx + 1, trainer.num_test_batches[dataloader_idx], "")

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Close."""
        self._close()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Give the terminal back."""
        self._close()

    # ------------------------------------------------------------------ rollouts
    @classmethod
    @contextmanager
    def rollout_of(cls, trainer: pl.Trainer, title: str) -> Iterator[Callable[[RolloutProgress], None] | None]:
        """Show one rollout on the trainer's progress bar; yields what the agent loop reports to.

        A bar of its own on a terminal; elsewhere a line every half minute of a long one.
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
                ends = f", {_duration(left)} left" if state.finished else ""
                LOG.info(
                    "  %s: %d/%d trajectories, %s%s", title, state.finished, state.total, _speed(state), ends,
                    extra={FILE_ONLY: is_quiet()},
                )  # fmt: skip

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
            left = f", {_duration(each * (total - done))} left" if done < total < float("inf") else ""
            LOG.info(
                "%s %d/%g  %s%s  %s", title, done, total, _duration(seconds), left, note,
                extra={FILE_ONLY: self.live is not None or is_quiet()},
            )  # fmt: skip

    def _close(self) -> None:
        if self.live is not None:
            self.live.stop()
        self.live = self.bar = None


def _duration(seconds: float) -> str:
    """In the two largest units."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes, hours = seconds / 60, seconds / 3600
    return f"{minutes:.0f} min" if minutes < 100 else f"{int(hours)} h {int(minutes) % 60} min"


def _speed(state: RolloutProgress) -> str:
    seconds = max(state.elapsed_s, 1e-9)
    return f"{state.tokens / seconds:,.0f} tokens/s  {state.tool_calls / seconds:,.0f} tool calls/s"


def headline(trainer: pl.Trainer) -> str:
    """The metrics worth a glance, short."""
    metrics = trainer.callback_metrics
    return "  ".join(f"{short} {float(metrics[name]):.3g}" for name, short in HEADLINE.items() if name in metrics)
