"""The parent's handle of a fork server: a process in a session of its own, and a socket."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from cv_lightning.sandbox.config import GENERAL_LAYERS, SandboxConfig
from cv_lightning.sandbox.heap import TUNABLES
from cv_lightning.sandbox.layers import packages
from cv_lightning.sandbox.private_root import is_within

log = logging.getLogger(__name__)

_ROOT = str(Path(__file__).resolve().parents[2])
_BOOT = (
    "import sys; paths = sys.argv.pop(1).split(':'); rest = [p for p in sys.path if p not in paths]; "
    "at = next((i for i, p in enumerate(rest) if p.endswith('-packages') or sys.prefix not in p), len(rest)); "
    "sys.path[:] = [*rest[:at], *paths, *rest[at:]]; del paths, rest, at; "
    "from cv_lightning.sandbox.zygote import main; main(sys.argv[1:])"
)
_ENVIRONMENT = {
    "PATH": "/usr/bin:/bin",
    "LANG": "C.UTF-8",
    "HOME": "/nonexistent",
    "PYTHONHASHSEED": "0",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENCV_FOR_THREADS_NUM": "1",
    "GLIBC_TUNABLES": TUNABLES,
}
_SEND_TIMEOUT_S = 5.0


@dataclass(slots=True, eq=False)
class Server:
    """One fork server."""

    process: subprocess.Popen[bytes]
    control: socket.socket
    science: bool
    started: float
    report: dict[str, str] | None = None
    """States of its layers; None while it starts."""
    served: int = 0
    """Jobs that were sent to it."""
    draining: bool = False
    """It gets no further jobs."""
    first_bytes: int = 0
    """Resident memory when it was ready."""

    @classmethod
    def launch(cls, config: SandboxConfig, *, science: bool) -> Server:
        """Start one by exec: clean environment, stdio on /dev/null, own session, its socket the only descriptor."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        settings = {"config": asdict(config), "science": science, "private_folders": private_folders()}
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-I", "-c", _BOOT, _search_path(), str(theirs.fileno()), json.dumps(settings)],
                pass_fds=[theirs.fileno()],
                env=_ENVIRONMENT,
                cwd="/",
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        ours.settimeout(_SEND_TIMEOUT_S)
        return cls(process, ours, science, time.monotonic())

    def send(self, packet: bytes, fds: list[int]) -> None:
        """Send a packet; a server that does not accept it is killed, and its end of file is handled when it is read."""
        try:
            socket.send_fds(self.control, [packet], fds)
        except OSError:
            with contextlib.suppress(ProcessLookupError):
                self.process.kill()

    def receive(self) -> bytes:
        """The next packet; empty at the end of file."""
        try:
            return self.control.recv(4096)
        except OSError:
            return b""

    def take_report(self, packet: bytes, before: Mapping[str, str]) -> str:
        """Read the first packet: the states of the layers.

        A server without a required layer that an earlier one had is not accepted. That happens, for instance, if the
        program that lists the libraries is killed, so that the library of the filter is not found.

        Args:
            packet: As received.
            before: The report of an earlier server; empty for the first.

        Returns:
            Why the server must not run anything; empty if it may.
        """
        report = dict(line.split("=", 1) for line in packet.decode().splitlines())
        had = [name for name, state in before.items() if state.startswith("active")]
        lacking = {name: report[name] for name in had if not report[name].startswith("active")}
        if lacking:
            log.warning("sandbox: a fork server started without layers that an earlier one had: %s", lacking)
        if any(name in GENERAL_LAYERS for name in lacking):
            return f"without layers that an earlier one had: {lacking}"
        self.report, self.first_bytes = report, self.resident_bytes()
        return ""

    def resident_bytes(self) -> int:
        """Resident memory of the server; 0 if it has ended."""
        try:
            with open(f"/proc/{self.process.pid}/statm", encoding="ascii") as file:
                return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        except OSError:
            return 0

    def kill(self) -> None:
        """Kill the server with its children, and reap it."""
        self.control.close()
        for kill in (partial(os.killpg, self.process.pid, signal.SIGKILL), self.process.kill):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(5)


def _search_path() -> str:
    """Folders of the project and the packages of this process; -I drops PYTHONPATH, which may name them.

    They come after the standard library and before what else is installed, which may hold another copy of the project.
    """
    return ":".join(dict.fromkeys([_ROOT, *packages()]))


def private_folders() -> list[str]:
    """Folders of this process that no snippet may read: the repository, the working folder, projects on `sys.path`."""
    libraries = [sysconfig.get_path("stdlib"), *packages()]
    projects = [path for path in sys.path if not any(is_within(path, folder) for folder in libraries)]
    with contextlib.suppress(OSError):  # the working folder was deleted
        projects.append(os.getcwd())
    found = (path for path in (_ROOT, *projects) if os.path.isdir(path) and path not in libraries)
    return sorted(set(map(os.path.realpath, found)))
