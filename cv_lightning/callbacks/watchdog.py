"""The watchdog: notices that the ranks of a run no longer get on with each other, says which and where, and ends it.

A collective that one rank never joins waits for the process group's time-out and then names neither itself nor the
rank. Here every rank tells where it is, from a thread that no collective can block; the first rank reads that.
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
import psutil
from lightning.pytorch.trainer.states import TrainerFn
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from cv_lightning.callbacks.signals import Stopped
from cv_lightning.modules.base import PolicyModule

EXIT_CODE = 75
"""Of a process that the watchdog ended: EX_TEMPFAIL, go on from the last checkpoint."""
STOP = "stop"
"""Key of the store under which the reason to stop is left."""


@dataclass(slots=True)
class Place:
    """Where a rank is."""

    name: str
    """In words: `rollout 12`."""
    waits: bool
    """True: it needs the other ranks to get on, as in a collective."""
    since: float
    """`time.monotonic()` of its last progress."""


class RankReport(NamedTuple):
    """What one rank tells of itself."""

    rank: int
    who: str
    """Host and process."""
    place: str
    waits: bool
    idle_s: float
    """Seconds without progress."""
    silent_s: float
    """Seconds since it was heard of."""
    over: bool
    """True: it has ended, as it should."""

    def __str__(self) -> str:
        return f"rank {self.rank} ({self.who})"


class Watchdog(pl.Callback):
    """Ends a run of several ranks that hangs or has lost one of them; does nothing for a single rank.

    It must stand before the callbacks that it watches; the command line puts it there.

    Args:
        timeout_s: seconds without progress after which a rank counts as stuck. A rank that waits for others is not
            stuck as long as they get on.
        silence_s: seconds without a sign of life after which a rank counts as dead. Time in which the watching rank
            was held up itself does not count: a machine that is overloaded or was suspended holds up all of them.
    """

    def __init__(self, timeout_s: float = 1800.0, silence_s: float = 300.0) -> None:
        if timeout_s <= 0 or silence_s <= 0:
            raise ValueError(f"Watchdog: timeout_s {timeout_s} and silence_s {silence_s} must be above 0 seconds")
        self.timeout_s, self.silence_s = timeout_s, silence_s
        self.place = Place("start", True, time.monotonic())
        self.rank, self.world_size = 0, 1
        self.folder = Path()
        self._store: TCPStore | None = None
        self._over = threading.Event()
        self._heard: dict[int, tuple[str, float]] = {}
        """By rank: what it said last, and when."""
        self._now = 0.0
        """Seconds that this thread has watched."""
        self._thread: threading.Thread | None = None

    # ------------------------------------------------------------------ where this rank is
    @classmethod
    @contextmanager
    def at(cls, trainer: pl.Trainer, name: str, *, waits: bool) -> Iterator[Callable[[], None]]:
        """Say where this rank is while the block runs.

        Args:
            trainer: its watchdog, if it has one, is told.
            name: in words.
            waits: the block is a collective.

        Yields:
            What to call on progress.
        """
        found = next((callback for callback in trainer.callbacks if isinstance(callback, cls)), None)  # type: ignore[attr-defined]
        if found is None:
            yield lambda: None
            return
        before, found.place = found.place, Place(name, waits, time.monotonic())
        yield found.progress
        before.since = time.monotonic()
        found.place = before  # not after an exception: where it happened is of interest

    def progress(self) -> None:
        """This rank gets on."""
        self.place.since = time.monotonic()

    def _go(self, name: str) -> None:
        self.place = Place(name, True, time.monotonic())

    # ------------------------------------------------------------------ hooks
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Connect the ranks and start watching."""
        self._go(f"setup of {getattr(stage, 'value', stage)}")
        if isinstance(pl_module, PolicyModule):
            pl_module.on_progress = self.progress  # an update of many long rows may take longer than `timeout_s`
        if trainer.world_size == 1 or self._thread is not None:
            return
        self.rank, self.world_size, self.folder = (
            trainer.global_rank,
            trainer.world_size,
            Path(trainer.default_root_dir),
        )
        self._store = _connect(trainer, self.silence_s)
        self._over.clear()
        self._tell()
        trainer.strategy.barrier("watchdog")
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: object, batch_idx: int
    ) -> None:
        """The update is full of collectives."""
        self._go(f"training step {batch_idx + 1}")

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """What follows is a checkpoint or the next batch."""
        self._go(f"after training step {batch_idx + 1}")

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """An evaluation begins."""
        self._go("validation")

    def on_test_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """An evaluation begins."""
        self._go("test")

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Stop watching once all ranks have come as far: the first one holds what the others talk through."""
        if self._thread is None:
            return
        self._go(f"end of {getattr(stage, 'value', stage)}")
        trainer.strategy.barrier("watchdog")
        self._close()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Take the other ranks down, too: they would wait for this one."""
        if self._thread is None:
            return
        stops_together = isinstance(exception, Stopped) and trainer.state.fn is TrainerFn.FITTING
        if self._store is not None and not stops_together and not isinstance(exception, KeyboardInterrupt):
            reason = f"{type(exception).__name__}: {exception}".splitlines()[0]
            with suppress(RuntimeError):  # the store is gone with the first rank
                self._store.set(STOP, f"rank {self.rank} ({_who()}) failed in '{self.place.name}': {reason}")
        self._close()

    def _close(self) -> None:
        self._over.set()
        assert self._thread is not None
        self._thread.join(timeout=self.silence_s)
        self._thread = None

    # ------------------------------------------------------------------ the thread
    def _watch(self) -> None:
        pause = min(2.0, self.timeout_s / 4, self.silence_s / 4)
        last = time.monotonic()
        while not self._over.wait(pause):
            now = time.monotonic()
            self._now += min(now - last, 2 * pause)
            last = now
            reason = self._reason_to_stop()
            if reason and not self._over.is_set():
                self._end(reason, pause)
        with suppress(RuntimeError):
            self._tell(over=True)

    def _reason_to_stop(self) -> str:
        """Why the run cannot go on; empty: it can."""
        assert self._store is not None
        try:
            self._tell()
            if self._store.check([STOP]):
                return str(self._store.get(STOP).decode())
            reports = [self._read(rank) for rank in (range(self.world_size) if self.rank == 0 else (0,))]
        except RuntimeError as error:
            return f"rank 0, which the ranks talk through, is gone ({str(error).splitlines()[0]})"
        if self.rank:
            return diagnose([report for report in reports if not report.over], float("inf"), self.silence_s)
        return diagnose([report for report in reports if not report.over], self.timeout_s, self.silence_s)

    def _tell(self, over: bool = False) -> None:
        assert self._store is not None
        place = self.place
        said = [_who(), place.name, place.waits, round(time.monotonic() - place.since, 1), over, time.time()]
        self._store.set(f"rank{self.rank}", json.dumps(said))

    def _read(self, rank: int) -> RankReport:
        assert self._store is not None
        said = self._store.get(f"rank{rank}").decode()
        if self._heard.get(rank, ("", 0.0))[0] != said:
            self._heard[rank] = (said, self._now)
        who, place, waits, idle_s, over, _ = json.loads(said)
        return RankReport(rank, who, place, waits, idle_s, self._now - self._heard[rank][1], over)

    def _end(self, reason: str, pause: float) -> NoReturn:
        """Leave the reason for the others, show where this rank is, and end the process with all its children."""
        with suppress(RuntimeError):
            assert self._store is not None
            self._store.set(STOP, reason)
        trace = self.folder / f"watchdog.rank{self.rank}.txt"
        with suppress(OSError):  # a full disk is no reason to hang
            self.folder.mkdir(parents=True, exist_ok=True)
            with trace.open("w") as file:
                file.write(f"{time.strftime('%Y-%m-%dT%H:%M:%S%z')} {reason}\n")
                file.flush()
                faulthandler.dump_traceback(file)
        sys.stderr.write(
            f"error: {reason}. Rank {self.rank} stops (its threads: {trace}); --ckpt_path last goes on from the last "
            "checkpoint\n"
        )
        sys.stderr.flush()
        if self.rank == 0:
            time.sleep(2 * pause)  # the others read the reason here
        for child in psutil.Process().children(recursive=True):
            with suppress(psutil.Error):
                child.kill()
        os._exit(EXIT_CODE)  # the main thread may never come back from its collective


def diagnose(reports: list[RankReport], timeout_s: float, silence_s: float) -> str:
    """What keeps the ranks from getting on, in words; empty if they do.

    Args:
        reports: of the ranks that have not ended.
        timeout_s: longest time without progress.
        silence_s: longest time without a sign of life.
    """
    for report in reports:
        if report.silent_s > silence_s:
            return (
                f"{report} has not been heard of for {report.silent_s:.0f} s, last in '{report.place}': "
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
    """A store of our own: a call in another one may be held up by whoever waits in it."""
    timeout = timedelta(seconds=timeout_s)
    host = os.environ.get("MASTER_ADDR", "127.0.0.1")
    store = None
    if trainer.is_global_zero:
        store = TCPStore(host, 0, is_master=True, timeout=timeout, wait_for_workers=False)
    port = trainer.strategy.broadcast(0 if store is None else store.port)
    return store or TCPStore(host, port, timeout=timeout, wait_for_workers=False)


def _who() -> str:
    return f"{socket.gethostname()}, process {os.getpid()}"
