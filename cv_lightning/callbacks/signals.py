"""SIGINT, SIGHUP and SIGTERM: training ends after its iteration with a checkpoint, an evaluation at once.

The exit code is 128 plus the signal's number: 130, 129 or 143. A second signal ends the process at once.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.trainer.states import TrainerFn

from cv_lightning.callbacks.owner import RunOwner, end_process
from cv_lightning.distributed import gather_lists

SIGNALS = (signal.SIGINT, signal.SIGHUP, signal.SIGTERM)
GRACE_S = 4.0
"""Seconds that an evaluation has to reach a place where it can stop; after that the process is ended."""


class Stopped(SystemExit):
    """A signal has stopped the run, and its state is saved."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.number = number

    def __str__(self) -> str:
        return signal.Signals(self.number).name


@contextmanager
def exit_codes() -> Iterator[None]:
    """Context manager in which an unhandled signal ends the process with 128 plus its number."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise Stopped(number)

    before = _install(stop)
    try:
        yield
    finally:
        _restore(before)


class StopOnSignal(pl.Callback):
    """Ends a run on a signal so that it can be resumed.

    In `fit` all ranks finish the iteration and save a checkpoint once one of them got the signal. In `validate` and
    `test` the answered questions are on disk; the others are left.
    """

    def __init__(self) -> None:
        self.asked: int | None = None
        """The signal that asked to stop."""
        self.is_agreed = False
        """True once all ranks know that one of them got a signal; `CheckpointCallback` then saves."""
        self._trainer: pl.Trainer | None = None
        self._before: dict[signal.Signals, Any] = {}

    @classmethod
    def of(cls, trainer: pl.Trainer) -> StopOnSignal | None:
        """The trainer's instance; None without one."""
        return next((callback for callback in trainer.callbacks if isinstance(callback, cls)), None)  # type: ignore[attr-defined]

    # ------------------------------------------------------------------ hooks
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Handle signals from here on: there is an iteration to finish, or answered questions are on disk."""
        if not self._before and threading.current_thread() is threading.main_thread():
            self._trainer = trainer
            self._before = _install(self._on_signal)  # replaces Lightning's own handler, which starts a collective

    on_test_start = on_train_start
    on_validation_start = on_train_start  # within `fit` the handlers are installed already

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: object, batch_idx: int
    ) -> None:
        """End the run here, after the last iteration's metrics were written."""
        if self.is_agreed:
            done = getattr(pl_module, "iteration", batch_idx)
            self._say(f"stopped after iteration {done}; --ckpt_path last continues")
            self.leave(trainer)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """Agree with the other ranks (a collective); `CheckpointCallback`, which is called last, then saves."""
        self.asked = max(gather_lists([self.asked or 0])) or None
        self.is_agreed = self.asked is not None

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Restore the earlier handlers."""
        self._release()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Restore the earlier handlers."""
        self._release()

    # ------------------------------------------------------------------ called by the run
    def check(self) -> None:
        """Raise `Stopped` in an evaluation if a signal has asked for it."""
        if self.asked is not None and self._trainer is not None and self._trainer.state.fn is not TrainerFn.FITTING:
            self._say("stopped; the same command continues with the unanswered questions")
            self.leave(self._trainer)

    def leave(self, trainer: pl.Trainer) -> None:
        """End this rank.

        Raises:
            Stopped: Always; with code 0 on ranks that Lightning started, which kills the first rank if another fails.
        """
        stopped = Stopped(self.asked or signal.SIGTERM)
        environment = getattr(trainer.strategy, "cluster_environment", None)
        if environment is not None and not environment.creates_processes_externally and trainer.local_rank:
            stopped.code = 0
        raise stopped

    # ------------------------------------------------------------------ signals
    def _release(self) -> None:
        before, self._before = self._before, {}
        _restore(before)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if self.asked is not None:
            self._say(f"{name} again: ending at once")
            self._end_now(number)
        self.asked = number
        if self._trainer is not None and self._trainer.state.fn is TrainerFn.FITTING:
            self._say(f"{name}: finishing the iteration, then saving a checkpoint; a second signal ends at once")
            return
        self._say(f"{name}: stopping; a second signal ends at once")
        timer = threading.Timer(GRACE_S, self._end_now, (number,))
        timer.daemon = True
        timer.start()

    def _say(self, text: str) -> None:
        """Write to the file itself: a handler may have interrupted code that holds a lock of the logging."""
        if self._trainer is None or self._trainer.is_global_zero:
            with suppress(OSError):
                os.write(2, f"{text}\n".encode())

    def _end_now(self, number: int) -> None:
        for callback in self._trainer.callbacks if self._trainer is not None else ():  # type: ignore[attr-defined]
            if isinstance(callback, RunOwner):
                callback.release()
        end_process(128 + number)


def _install(handler: Callable[[int, FrameType | None], None]) -> dict[signal.Signals, Any]:
    """Handle the signals, except those ignored from the start; returns the earlier handlers."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    before = {number: earlier for number, earlier in before.items() if earlier is not signal.SIG_IGN}
    for number in before:
        signal.signal(number, handler)
    return before


def _restore(handlers: dict[signal.Signals, Any]) -> None:
    for number, handler in handlers.items():
        signal.signal(number, handler)
