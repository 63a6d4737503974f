"""The owner of a run's folder: a record with a heartbeat that keeps a second run of the same verb out.

    RUN/.owner-fit.json     the process that runs `fit` here; its modification time is the heartbeat

Times are read from the file system that holds the folder, so that hosts with different clocks agree on the age of a
record. A record is taken over if its process is gone (seen on the same host) or its heartbeat is older than
`OWNER_STALE_S`.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import lightning.pytorch as pl
import psutil

from cv_lightning.evaluation.runs import OWNER, OWNER_STALE_S
from cv_lightning.types import CVLightningError

LOG = logging.getLogger(__name__)
BEAT_S = 5.0
FLAG = "--take_over true"
EXIT_CODE = 1
"""Exit code of a run whose folder was taken over by another run."""


class RunOwner(pl.Callback):
    """Owns the folder of a run, on the first rank, while `fit`, `validate` or `test` writes into it.

    Each verb has an owner of its own.

    Args:
        take_over: Take the folder from a run that seems to be alive.
    """

    def __init__(self, take_over: bool = False) -> None:
        self.take_over = take_over
        self.path = Path()
        """The record."""
        self._token = uuid.uuid4().hex
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Become the owner, before anything is written.

        Raises:
            CVLightningError: The folder cannot be taken, see `take`; all ranks raise.
        """
        refused = ""
        if trainer.is_global_zero and self._thread is None:
            try:
                self.take(Path(trainer.default_root_dir), trainer.state.fn.value if trainer.state.fn else stage)
            except CVLightningError as error:
                refused = str(error)
        if refused := trainer.strategy.broadcast(refused):
            raise CVLightningError(refused)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Release the folder."""
        self.release()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Release the folder."""
        self.release()

    def take(self, folder: Path, verb: str) -> None:
        """Become the owner of a folder, which is made if missing, and start the heartbeat.

        Raises:
            CVLightningError: Another process owns the folder, or the folder cannot be written.
        """
        self.path = folder / OWNER.format(verb=verb)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            while not self._create(verb):
                with suppress(FileNotFoundError):  # released meanwhile
                    self._remove_other(verb)
        except OSError as error:
            raise CVLightningError(f"{folder} cannot be written: {error.strerror or error}") from error
        self._over.clear()
        self._thread = threading.Thread(target=self._beat, name="owner", daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Stop the heartbeat and remove this process's record; safe to call twice."""
        self._over.set()
        thread, self._thread = self._thread, None
        if thread is None:
            return
        if thread is not threading.current_thread():
            thread.join(timeout=BEAT_S)
        with suppress(OSError):  # the folder may have become read-only
            if read_record(self.path).get("token") == self._token:
                self.path.unlink()

    def _create(self, verb: str) -> bool:
        """Write the record; False if there is one."""
        record = _process() | {"token": self._token, "verb": verb, "started": time.time()}
        try:
            file = self.path.open("x", encoding="utf-8")
        except FileExistsError:
            return False
        try:
            with file:
                json.dump(record, file)
        except OSError:  # a full disk: an empty record would keep the next run out
            self.path.unlink(missing_ok=True)
            raise
        return True

    def _remove_other(self, verb: str) -> None:
        """Remove the record of a process that is gone, or of any with `take_over`; else raise CVLightningError."""
        found, age = read_record(self.path), self._age()
        process, host = found.get("pid", "?"), found.get("host", "?")
        if not self.take_over and not _is_gone(found, age):
            raise CVLightningError(
                f"{self.path.parent} is in use: `{verb}` runs there as process {process} on host {host}, its last sign "
                f"of life is {max(0.0, age):.0f} s old. Two runs in one folder would mix their files: stop that one, "
                f"give another --trainer.default_root_dir, or add {FLAG} if it is gone"
            )
        LOG.warning("%s: taking over from process %s on host %s", self.path.parent, process, host)
        aside = self.path.with_name(f"{self.path.name}.{self._token}")
        self.path.rename(aside)
        if read_record(aside).get("token") != found.get("token"):  # a third process was faster: put its record back
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

    def _beat(self) -> None:
        while not self._over.wait(BEAT_S):
            try:
                other = read_record(self.path)
                if other.get("token") == self._token:
                    os.utime(self.path)
                    continue
            except FileNotFoundError:
                other = {}
            except OSError:  # a network file system may be away for a while
                continue
            if not self._over.is_set():  # every further write would go into the other run's files
                who = f"process {other['pid']} on host {other['host']}" if {"pid", "host"} <= other.keys() else "a run"
                message = (
                    f"error: {who} has taken over {self.path.parent}; this run stops without writing anything more\n"
                )
                end_process(EXIT_CODE, message)


def read_record(path: Path) -> dict[str, Any]:
    """The record; empty while it is being written, or if it is damaged. FileNotFoundError without one."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _process() -> dict[str, Any]:
    """This process, as another one on this host needs it to tell whether it still runs."""
    process = psutil.Process()
    return {"host": socket.gethostname(), "pid": process.pid, "began": process.create_time(), "machine": _machine()}


def _machine() -> str:
    """Boot and process namespace: equal where two processes see each other's process ids."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _is_gone(record: dict[str, Any], age: float) -> bool:
    if age > OWNER_STALE_S:
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


def end_process(code: int, message: str = "") -> NoReturn:
    """End this process and its children at once, without any clean-up, after writing a message to stderr."""
    with suppress(OSError):  # past the stream, which may be locked by the thread that hangs, or closed
        os.write(2, message.encode("utf-8", "backslashreplace"))
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            child.kill()
    os._exit(code)
