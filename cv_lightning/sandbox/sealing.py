"""Between fork and work: a child leaves the fork server's state behind, limits itself, seals itself and waits."""

from __future__ import annotations

import os
import signal
import socket
from dataclasses import dataclass

from cv_lightning.sandbox import child, layers, worker
from cv_lightning.sandbox.syscalls import SeccompFilter
from cv_lightning.sandbox.wire import HEADER, MAX_TEXT, MAX_TRACE, PIXEL

NOT_SEALED = 97
"""Exit status of a child that failed before it got a job."""


@dataclass(frozen=True, slots=True)
class Seal:
    """What a child needs of its fork server to seal itself."""

    server_pid: int
    memory_mb: int
    cpu_s: int
    max_pixels: int
    library_bytes: int
    """Address space that the libraries take up."""
    limited: bool
    """True if resource limits are set in children."""
    filter: SeccompFilter | None
    worker_filter: SeccompFilter | None


class ChildStartError(BaseException):
    """Raised in a fresh child: it unwinds the fork server's frames, so that model code finds none of them.

    No `except Exception` on the way may stop it, hence the base class.
    """

    def __init__(self, control: int, is_worker: bool) -> None:
        super().__init__()
        self.control, self.is_worker = control, is_worker


def run_child(seal: Seal, control: int, is_worker: bool) -> None:
    """Everything a child does, from closing what it inherited to its last byte. Never returns."""
    try:
        jobs = socket.socket(fileno=child.keep_only(control))
        _limit(seal, is_worker)
        if not is_worker:
            child.rehearse()
        chosen = seal.worker_filter if is_worker else seal.filter
        if chosen is not None and not chosen.install():
            os._exit(NOT_SEALED)
        if is_worker:
            worker.serve(jobs)
            os._exit(0)
        child.run_job(child.wait_for_job(jobs, seal.memory_mb))
    finally:
        os._exit(NOT_SEALED)


def _limit(seal: Seal, is_worker: bool) -> None:
    if seal.limited:
        layers.limit_resources(
            memory_bytes=seal.memory_mb << 20,
            library_bytes=seal.library_bytes,
            # A worker lives on; its plans are priced beforehand and its deadlines are kept by the fork server.
            cpu_s=None if is_worker else seal.cpu_s,
            file_bytes=HEADER.size + PIXEL * seal.max_pixels + MAX_TRACE + MAX_TEXT,
        )
    layers.prctl(layers.PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != seal.server_pid:
        os._exit(1)
