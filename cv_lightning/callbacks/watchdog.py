"""The watchdog: detects hung or dead ranks, reports which and where, and ends the run.

A collective that one rank never joins waits for the process group's time-out and then names neither itself nor the
rank. Here every rank reports its place from a thread that no collective can block, and the first rank reads that.
"""

from __future__ import annotations

import faulthandler
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple, NoReturn

import lightning.pytorch as pl
from lightning.pytorch.trainer.states import TrainerFn
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from cv_lightning.callbacks.owner import end_process
from cv_lightning.callbacks.signals import Stopped
from cv_lightning.modules.base import PolicyModule
from cv_lightning.ranges import Limit, check_ranges

EXIT_CODE = 75
"""Exit code of a process that the watchdog ended: EX_TEMPFAIL, resume from the last checkpoint."""
STOP = "stop"
"""Key of the store that holds the reason to stop."""


@dataclass(slots=True)
class Place:
    """The part of the run that a rank is in."""

    name: str
    """Name for people, like `rollout 12`."""
    waits: bool
    """True where the rank depends on the others, as in a collective."""
    since: float
    """`time.monotonic()` of its last progress."""


class RankReport(NamedTuple):
    """Report of one rank."""

    rank: int
    who: str
    """Host and process."""
    place: str
    waits: bool
    idle_s: float
    """Seconds without progress."""
    silent_s: float
    """Seconds since its last report."""
    over: bool
    """True if the rank has ended normally."""

    def __str__(self) -> str:
        return f"rank {self.rank} ({self.who})"


class Watchdog(pl.Callback):
    """Ends a run of several ranks that hangs or has lost one of them; does nothing for a single rank.

    It must come before the callbacks that it watches; the command line puts it there.

    Args:
        timeout_s: Seconds without progress after which a rank counts as stuck. A rank that waits for others is not
            stuck as long as they make progress.
        silence_s: Seconds without a report after which a rank counts as dead. Time in which the watching rank was
            held up itself does not count: an overloaded or suspended machine holds up all of them.
    """

    def __init__(self, timeout_s: Limit = 1800.0, silence_s: Limit = 300.0) -> None:
        check_ranges(Watchdog.__init__, "watchdog", locals())
        self.timeout_s, self.silence_s = timeout_s, silence_s
        self.place = Place("start", True, time.monotonic())
        self.rank, self.world_size = 0, 1
        self.folder = Path()
        self._store: TCPStore | None = None
        self._over = threading.Event()
        self._heard: dict[int, tuple[str, float]] = {}
        """Last report and its time by `_now`, for each rank."""
        self._now = 0.0
        """Seconds for which this thread has watched."""
        self._thread: threading.Thread | None = None

    # ------------------------------------------------------------------ this rank's place
    @classmethod
    @contextmanager
    def at(cls, trainer: pl.Trainer, name: str, *, waits: bool) -> Iterator[Callable[[], None]]:
        """Set this rank's place while the block runs; yields a function to call on progress.

        `waits` is True if the block is a collective. Does nothing if the trainer has no watchdog.
        """
        found = next((callback for callback in trainer.callbacks if isinstance(callback, cls)), None)  # type: ignore[attr-defined]
        if found is None:
            yield lambda: None
            return
        before, found.place = found.place, Place(name, waits, time.monotonic())
        yield found.progress
        before.since = time.monotonic()
        found.place = before  # kept after an exception, so that its place is reported

    def progress(self) -> None:
        """Note that this rank makes progress."""
        self.place.since = time.monotonic()

    def _enter(self, name: str) -> None:
        self.place = Place(name, True, time.monotonic())

    # ------------------------------------------------------------------ hooks
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Connect the ranks and start watching."""
        self._enter(f"setup of {getattr(stage, 'value', stage)}")
        if isinstance(pl_module, PolicyModule):
            pl_module.on_progress = self.progress  # an update of many long sequences may take longer than `timeout_s`
        if trainer.world_size == 1 or self._thread is not None:
            return
        self.rank, self.world_size = trainer.global_rank, trainer.world_size
        self.folder = Path(trainer.default_root_dir)
        self._store = _connect(trainer, self.silence_s)
        self._over.clear()
        self._report(self._store)
        trainer.strategy.barrier("watchdog")
        self._thread = threading.Thread(target=self._watch, args=(self._store,), name="watchdog", daemon=True)
        self._thread.start()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: object, batch_idx: int
    ) -> None:
        """Enter the update, which is full of collectives."""
        self._enter(f"training step {batch_idx + 1}")

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """Leave the update; a checkpoint or the next batch follows."""
        self._enter(f"after training step {batch_idx + 1}")

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Enter the evaluation."""
        self._enter("validation")

    def on_test_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Enter the evaluation."""
        self._enter("test")

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Stop watching once all ranks are here: the first one holds the store that all of them use."""
        if self._thread is None:
            return
        self._enter(f"end of {getattr(stage, 'value', stage)}")
        trainer.strategy.barrier("watchdog")
        self._close()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """End the other ranks, too, because they would wait for this one."""
        if self._thread is None or self._store is None:
            return
        stops_together = isinstance(exception, Stopped) and trainer.state.fn is TrainerFn.FITTING
        if not stops_together and not isinstance(exception, KeyboardInterrupt):
            reason = f"{type(exception).__name__}: {exception}".splitlines()[0]
            with suppress(RuntimeError):  # the store is gone with the first rank
                self._store.set(STOP, f"rank {self.rank} ({_who()}) failed in '{self.place.name}': {reason}")
        self._close()

    def _close(self) -> None:
        self._over.set()
        thread, self._thread = self._thread, None
        if thread is not None:
            thread.join(timeout=self.silence_s)

    # ------------------------------------------------------------------ the thread
    def _watch(self, store: TCPStore) -> None:
        pause = min(2.0, self.timeout_s / 4, self.silence_s / 4)
        last = time.monotonic()
        while not self._over.wait(pause):
            now = time.monotonic()
            self._now += min(now - last, 2 * pause)
            last = now
            reason = self._reason_to_stop(store)
            if reason and not self._over.is_set():
                self._end(store, reason, pause)
        with suppress(RuntimeError):
            self._report(store, over=True)

    def _reason_to_stop(self, store: TCPStore) -> str:
        """Reason to end the run, or empty. The first rank watches all ranks, the others only the first."""
        watched, timeout_s = (range(self.world_size), self.timeout_s) if self.rank == 0 else ((0,), float("inf"))
        try:
            self._report(store)
            if store.check([STOP]):
                return str(store.get(STOP).decode())
            reports = [self._read(store, rank) for rank in watched]
        except RuntimeError as error:
            return f"rank 0, which holds the ranks' reports, is gone ({str(error).splitlines()[0]})"
        return diagnose([report for report in reports if not report.over], timeout_s, self.silence_s)

    def _report(self, store: TCPStore, over: bool = False) -> None:
        place = self.place
        silent_s = round(time.monotonic() - place.since, 1)
        said = [_who(), place.name, place.waits, silent_s, over, time.time()]  # the time makes every report differ
        store.set(f"rank{self.rank}", json.dumps(said))

    def _read(self, store: TCPStore, rank: int) -> RankReport:
        said = store.get(f"rank{rank}").decode()
        if self._heard.get(rank, ("", 0.0))[0] != said:
            self._heard[rank] = (said, self._now)
        who, place, waits, idle_s, over, _ = json.loads(said)
        return RankReport(rank, who, place, waits, idle_s, self._now - self._heard[rank][1], over)

    def _end(self, store: TCPStore, reason: str, pause: float) -> NoReturn:
        """Store the reason for the other ranks, write this rank's stack traces, and end its processes."""
        with suppress(RuntimeError):
            store.set(STOP, reason)
        trace = self.folder / f"watchdog.rank{self.rank}.txt"
        with suppress(OSError):  # a full disk must not keep the process alive
            self.folder.mkdir(parents=True, exist_ok=True)
            with trace.open("w") as file:
                file.write(f"{time.strftime('%Y-%m-%dT%H:%M:%S%z')} {reason}\n")
                file.flush()
                faulthandler.dump_traceback(file)
        resume = "--ckpt_path last resumes from the last checkpoint"
        print(f"error: {reason}. Rank {self.rank} stops (its threads: {trace}); {resume}", file=sys.stderr, flush=True)
        if self.rank == 0:
            time.sleep(2 * pause)  # the other ranks read the reason from this one
        end_process(EXIT_CODE)  # the main thread may never return from its collective


def diagnose(reports: list[RankReport], timeout_s: float, silence_s: float) -> str:
    """Message on dead or stuck ranks among those that have not ended; empty if there are none."""
    for report in reports:
        if report.silent_s > silence_s:
            return (
                f"{report} has sent no report for {report.silent_s:.0f} s, last in '{report.place}': "
                "it died, or its machine hangs"
            )
    waiting = [report for report in reports if report.waits]
    stuck = [report for report in reports if not report.waits and report.idle_s > timeout_s]
    if stuck:
        others = "; ".join(f"{report} waits in '{report.place}'" for report in waiting) or "no other rank waits for it"
        return "; ".join(f"{r} has made no progress in '{r.place}' for {r.idle_s:.0f} s" for r in stuck) + f": {others}"
    if waiting and len(waiting) == len(reports) and min(report.idle_s for report in waiting) > timeout_s:
        where = "; ".join(f"{report} in '{report.place}' for {report.idle_s:.0f} s" for report in waiting)
        return f"every rank waits for the others: {where}"
    return ""


def _connect(trainer: pl.Trainer, timeout_s: float) -> TCPStore:
    """Make a store for the watchdog alone: a call in another one may be held up by a rank that waits in it."""
    timeout = timedelta(seconds=timeout_s)
    host = os.environ.get("MASTER_ADDR", "127.0.0.1")
    store = None
    if trainer.is_global_zero:
        store = TCPStore(host, 0, is_master=True, timeout=timeout, wait_for_workers=False)
    port = trainer.strategy.broadcast(0 if store is None else store.port)
    return store or TCPStore(host, port, timeout=timeout, wait_for_workers=False)


def _who() -> str:
    return f"{socket.gethostname()}, process {os.getpid()}"
