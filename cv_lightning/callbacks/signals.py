"""What SIGINT, SIGHUP and SIGTERM do: training ends after its iteration, with a checkpoint; an evaluation at once.

The exit code is 128 plus the signal's number: 130, 129 or 143. A second signal ends the process at once.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

import lightning.pytorch as pl
import psutil
from lightning.pytorch.trainer.states import TrainerFn

from cv_lightning.callbacks.owner import RunOwner
from cv_lightning.distributed import gather_lists

SIGNALS = (signal.SIGINT, signal.SIGHUP, signal.SIGTERM)
GRACE_S = 4.0
"""Seconds in which an evaluation has to come to a place where it can stop; after that the process is ended."""


class Stopped(SystemExit):
    """A signal has stopped the run; everything that was to be saved is saved.

    Args:
        number: of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.number = number

    def __str__(self) -> str:
        return signal.Signals(self.number).name


@contextmanager
def exit_codes() -> Iterator[None]:
    """While it lasts, a signal that no run has taken charge of ends the process with 128 plus its number."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in SIGNALS if _is_heeded(number)}

    def stop(number: int, frame: FrameType | None) -> None:
        raise Stopped(number)

    for number in before:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class StopOnSignal(pl.Callback):
    """Turns a signal into an end after which the run can be continued.

    In `fit` the iteration is finished and a checkpoint saved (`CheckpointCallback` asks `is_asked`), on all ranks once
    one of them got the signal. In `validate` and `test` the questions that are answered are on disk; the others are
    left.
    """

    def __init__(self) -> None:
        self.asked: int | None = None
        """The signal that asked to stop."""
        self.is_agreed = False
        """True on all ranks once the checkpoint after a signal is saved."""
        self._trainer: pl.Trainer | None = None
        self._before: dict[signal.Signals, Any] = {}

    @classmethod
    def of(cls, trainer: pl.Trainer) -> StopOnSignal | None:
        """The trainer's own, if it has one."""
        return next((callback for callback in trainer.callbacks if isinstance(callback, cls)), None)  # type: ignore[attr-defined]

    # ------------------------------------------------------------------ hooks
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take charge: there is an iteration to finish from here on."""
        self._take(trainer)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: object, batch_idx: int
    ) -> None:
        """The row of the last iteration is written by now."""
        if self.is_agreed:
            done = getattr(pl_module, "iteration", batch_idx)
            self._say(f"stopped after iteration {done}; --ckpt_path last continues")
            self.leave(trainer)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """Agree with the other ranks; `CheckpointCallback`, which comes last, then saves. Collective."""
        self.asked = max(gather_lists([self.asked or 0])) or None
        self.is_agreed = self.asked is not None

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take charge: answered questions are on disk from here on."""
        self._take(trainer)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take charge, except in a validation within training, which belongs to its iteration."""
        self._take(trainer)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Give the signals back."""
        self._restore()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Give the signals back."""
        self._restore()

    # ------------------------------------------------------------------ what the run asks
    def check(self) -> None:
        """Called where an evaluation can stop.

        Raises:
            Stopped: it shall.
        """
        if self.asked is not None and self._trainer is not None and self._trainer.state.fn is not TrainerFn.FITTING:
            self._say("stopped; the same command continues with the questions that are not answered")
            self.leave(self._trainer)

    def leave(self, trainer: pl.Trainer) -> None:
        """End this rank.

        Raises:
            Stopped: with code 0 on ranks that Lightning has started: it kills the first one if another one fails.
        """
        stopped = Stopped(self.asked or signal.SIGTERM)
        environment = getattr(trainer.strategy, "cluster_environment", None)
        if environment is not None and not environment.creates_processes_externally and trainer.local_rank:
            stopped.code = 0
        raise stopped

    # ------------------------------------------------------------------ signals
    def _take(self, trainer: pl.Trainer) -> None:
        if self._before or threading.current_thread() is not threading.main_thread():
            return
        self._trainer = trainer
        self._before = {number: signal.getsignal(number) for number in SIGNALS if _is_heeded(number)}
        for number in self._before:  # in the place of Lightning's own handler, which starts a collective
            signal.signal(number, self._on_signal)

    def _restore(self) -> None:
        before, self._before = self._before, {}
        for number, handler in before.items():
            signal.signal(number, handler)

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
        """Straight to the file: a handler may have interrupted the code that holds a lock of the logging."""
        if self._trainer is None or self._trainer.is_global_zero:
            with suppress(OSError):
                os.write(2, f"{text}\n".encode())

    def _end_now(self, number: int) -> None:
        for callback in self._trainer.callbacks if self._trainer is not None else ():  # type: ignore[attr-defined]
            if isinstance(callback, RunOwner):
                callback.release()
        for child in psutil.Process().children(recursive=True):
            with suppress(psutil.Error):
                child.kill()
        os._exit(128 + number)


def _is_heeded(number: signal.Signals) -> bool:
    """False for a signal that was switched off before this process started, as nohup does."""
    return signal.getsignal(number) is not signal.SIG_IGN
