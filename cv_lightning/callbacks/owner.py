"""The owner of a run's folder: a record with a heartbeat that keeps a second run of the same verb out.

    RUN/.owner-fit.json     who runs `fit` here; its modification time is the heartbeat, set every few seconds

Times are those of the file system that holds the folder, so hosts whose clocks differ agree on the age of a record. A
record whose process is gone (seen on the same host), or whose heartbeat is older than `STALE_S`, is taken over.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import sys
import threading
import time
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import psutil

from cv_lightning.types import CVLightningError

LOG = logging.getLogger(__name__)
STALE_S = 60.0
"""Age of a heartbeat from which on its owner counts as gone."""
BEAT_S = 5.0
FLAG = "--take_over true"
EXIT_CODE = 1
"""Exit code of a run whose folder another one has taken over."""


class FolderOwner:
    """This process's claim on a folder.

    Args:
        folder: of the run; made if missing.
        verb: fit, validate or test; each has an owner of its own.
    """

    def __init__(self, folder: Path, verb: str) -> None:
        self.folder, self.verb = folder, verb
        self.path = folder / f".owner-{verb}.json"
        self._token = uuid.uuid4().hex
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def take(self, *, force: bool = False) -> None:
        """Become the owner and start the heartbeat.

        Args:
            force: take the folder from an owner that seems to be alive.

        Raises:
            CVLightningError: another process owns the folder, or nothing can be written there.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            while not self._create():
                self._remove_other(force)
        except OSError as error:
            raise CVLightningError(f"{self.folder} cannot be written: {error.strerror or error}") from error
        self._thread = threading.Thread(target=self._beat, name="owner", daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Stop the heartbeat and remove the record, if it still is this process's; safe to call twice."""
        self._over.set()
        if self._thread is None:
            return
        if self._thread is not threading.current_thread():
            self._thread.join(timeout=BEAT_S)
        self._thread = None
        with suppress(OSError):  # a folder that became read-only
            if self._is_own():
                self.path.unlink(missing_ok=True)

    def _create(self) -> bool:
        """Write the record; False if there is one."""
        try:
            descriptor = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            return False
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                json.dump(_process() | {"token": self._token, "verb": self.verb, "started": time.time()}, file)
        except OSError:  # a full disk: an empty record would keep the next run out
            self.path.unlink()
            raise
        return True

    def _remove_other(self, force: bool) -> None:
        """Move a record out of the way whose owner is gone, or whose folder is taken over.

        Raises:
            CVLightningError: the owner is alive.
        """
        try:
            found, age = read_record(self.path), self._age()
        except FileNotFoundError:
            return  # released meanwhile
        if not force and not _is_gone(found, age):
            raise CVLightningError(
                f"{self.folder} is in use: `{self.verb}` runs there as process {found.get('pid', '?')} on host "
                f"{found.get('host', '?')}, its last sign of life is {max(0.0, age):.0f} s old. Two runs in one folder "
                f"would mix their files: stop that one, give another --trainer.default_root_dir, or add {FLAG} if it "
                "is gone"
            )
        LOG.warning("%s: taking over from process %s on host %s", self.folder, found.get("pid"), found.get("host"))
        aside = self.path.with_name(f"{self.path.name}.{self._token}")
        try:
            self.path.rename(aside)
        except FileNotFoundError:
            return
        taken = read_record(aside)
        if taken.get("token") != found.get("token"):  # a third process has been faster
            with suppress(FileExistsError):
                os.link(aside, self.path)
        aside.unlink(missing_ok=True)

    def _age(self) -> float:
        """Seconds since the heartbeat, by the clock of the file system."""
        probe = self.path.with_name(f"{self.path.name}.{self._token}.now")
        probe.touch()
        try:
            return probe.stat().st_mtime - self.path.stat().st_mtime
        finally:
            probe.unlink()

    def _is_own(self) -> bool:
        try:
            return read_record(self.path).get("token") == self._token
        except FileNotFoundError:
            return False

    def _beat(self) -> None:
        while not self._over.wait(BEAT_S):
            try:
                if self._is_own():
                    os.utime(self.path)
                    continue
                taken_by = read_record(self.path)
            except FileNotFoundError:
                taken_by = {}
            except OSError:  # a network file system that is away for a while
                continue
            if not self._over.is_set():
                _end(self.folder, taken_by)


class RunOwner(pl.Callback):
    """Holds the folder of a run while `fit`, `validate` or `test` writes into it; the first rank does so for all.

    Args:
        take_over: take the folder from a run that seems to be alive.
    """

    def __init__(self, take_over: bool = False) -> None:
        self.take_over = take_over
        self._owner: FolderOwner | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Become the owner, before anything is written.

        Raises:
            CVLightningError: on all ranks alike, see `FolderOwner.take`.
        """
        refused = ""
        if trainer.is_global_zero and self._owner is None:
            verb = trainer.state.fn.value if trainer.state.fn is not None else stage
            owner = FolderOwner(Path(trainer.default_root_dir), verb)
            try:
                owner.take(force=self.take_over)
                self._owner = owner
            except CVLightningError as error:
                refused = str(error)
        if refused := trainer.strategy.broadcast(refused):
            raise CVLightningError(refused)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Give the folder back."""
        self.release()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Give the folder back."""
        self.release()

    def release(self) -> None:
        """Give the folder back; safe to call twice."""
        if self._owner is not None:
            owner, self._owner = self._owner, None
            owner.release()


def read_record(path: Path) -> dict[str, Any]:
    """The record; empty where it is being written or cannot be read as one.

    Raises:
        FileNotFoundError: there is none.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _process() -> dict[str, Any]:
    """This process, so that another one on this host can tell whether it still runs."""
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "began": psutil.Process().create_time(),
        "machine": _machine(),
    }


def _machine() -> str:
    """Name of the boot and of the namespace of processes: equal where two processes see each other's numbers."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _is_gone(record: dict[str, Any], age: float) -> bool:
    if age > STALE_S:
        return True
    if not record.get("machine") or record["machine"] != _machine():
        return False
    try:
        process = psutil.Process(int(record["pid"]))
        is_same = abs(process.create_time() - float(record["began"])) < 1
        return not is_same or process.status() == psutil.STATUS_ZOMBIE or process.pid == os.getpid()
    except psutil.NoSuchProcess:
        return True
    except (psutil.Error, KeyError, TypeError, ValueError):
        return False


def _end(folder: Path, taken_by: dict[str, Any]) -> None:
    """Stop at once: every further write would go into another run's files."""
    who = f"process {taken_by['pid']} on host {taken_by['host']}" if {"pid", "host"} <= taken_by.keys() else "somebody"
    sys.stderr.write(f"error: {who} has taken over {folder}; this run stops without writing anything more\n")
    sys.stderr.flush()
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            child.kill()
    os._exit(EXIT_CODE)
