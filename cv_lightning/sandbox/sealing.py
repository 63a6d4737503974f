"""What a child does between fork and job: it drops the fork server's state, limits and seals itself, and waits."""

from __future__ import annotations

import os
import signal
import socket
from dataclasses import dataclass

from cv_lightning.sandbox import child, layers
from cv_lightning.sandbox.config import SandboxConfig
from cv_lightning.sandbox.syscalls import SeccompFilter
from cv_lightning.sandbox.wire import HEADER, MAX_TEXT, MAX_TRACE, PIXEL

NOT_SEALED = 97
"""Exit status of a child that failed before it got a job."""


@dataclass(frozen=True, slots=True)
class Seal:
    """What a child needs of its fork server to seal itself."""

    server_pid: int
    config: SandboxConfig
    library_bytes: int
    """Address space that the libraries take up."""
    filter: SeccompFilter | None


class ChildStartError(BaseException):
    """Raised in a fresh child: it unwinds the fork server's frames, so that model code finds none of them.

    It is a `BaseException` so that no `except Exception` on the way stops it.
    """

    def __init__(self, control: int) -> None:
        super().__init__()
        self.control = control


def run_child(seal: Seal, control: int) -> None:
    """Everything a child does, from closing what it inherited to its last byte. Never returns."""
    try:
        jobs = socket.socket(fileno=child.keep_only(control))
        _limit(seal)
        child.rehearse()
        if seal.filter is not None and not seal.filter.install():
            os._exit(NOT_SEALED)
        child.run_job(child.wait_for_job(jobs, seal.config))
    finally:
        os._exit(NOT_SEALED)


def _limit(seal: Seal) -> None:
    config = seal.config
    if "rlimits" not in config.disabled_layers:
        layers.limit_resources(
            memory_bytes=config.memory_mb << 20,
            library_bytes=seal.library_bytes,
            cpu_s=config.cpu_s,
            file_bytes=HEADER.size + PIXEL * config.max_result_pixels + MAX_TRACE + MAX_TEXT,
        )
    layers.prctl(layers.PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != seal.server_pid:
        os._exit(1)
