"""The fork server: loads the libraries once, seals itself, then forks one child per snippet.

Started by exec with a clean environment and /dev/null as stdio. It runs no model code and trusts its socket, which
only the parent holds. Children are watched by pidfd; deadlines are kept here, with RLIMIT_CPU behind them.
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import heapq
import os
import select
import signal
import socket
import sys
import time
from dataclasses import dataclass
from typing import Any

from cv_lightning.sandbox import layers
from cv_lightning.sandbox.wire import CANCEL, FLAG_REFERENCE, HEADER, JOB, MAX_TEXT, MAX_TRACE, REPLY, RUN

INPUT_FD, OUTPUT_FD = 3, 4
MODULES = (
    "math random json re collections itertools functools statistics fractions decimal unicodedata colorsys io base64 "
    "PIL.Image PIL.ImageChops PIL.ImageColor PIL.ImageDraw PIL.ImageEnhance PIL.ImageFilter PIL.ImageFont PIL.ImageOps "
    "PIL.ImageStat PIL.ImageMath numpy cv2 scipy.ndimage skimage skimage.transform skimage.filters skimage.exposure "
    "skimage.color skimage.morphology skimage.restoration skimage.util skimage.measure skimage.segmentation skimage.feature"
).split()


@dataclass(frozen=True, slots=True)
class Settings:
    """What the parent tells a fork server on its command line."""

    memory_mb: int
    cpu_s: int
    max_pixels: int
    disabled: frozenset[str]
    namespaces: bool

    @classmethod
    def parse(cls, text: str) -> Settings:
        """Read `memory_mb:cpu_s:max_pixels:disabled,..:namespaces`."""
        memory, cpu, pixels, disabled, namespaces = text.split(":")
        return cls(int(memory), int(cpu), int(pixels), frozenset(disabled.split(",")), namespaces == "1")


@dataclass(slots=True)
class _Child:
    job: int
    pid: int
    pidfd: int
    started: float
    deadline: float
    timed_out: bool = False


def load_libraries() -> None:
    """Import everything that snippets may use: a child imports nothing from scratch."""
    import importlib

    for name in MODULES:
        with contextlib.suppress(ImportError):  # scikit-image and SciPy are optional
            importlib.import_module(name)
    from PIL import Image

    Image.init()
    Image.MAX_IMAGE_PIXELS = None
    cv2 = sys.modules.get("cv2")
    if cv2 is not None:
        cv2.setNumThreads(1)
    # First calls of lazily bound functions are slow; make them here, once.
    import numpy as np

    warm = np.zeros((8, 8, 3), np.uint8)
    if cv2 is not None:
        cv2.GaussianBlur(warm, (3, 3), 1)
    Image.fromarray(warm).resize((4, 4)).rotate(30).tobytes()


class ForkServer:
    """Forks children for the jobs that come in on a socket."""

    def __init__(self, control: socket.socket, settings: Settings) -> None:
        self.control, self.settings = control, settings
        self.report: dict[str, str] = {"clean_exec": "active"}
        self.filter: layers.SeccompFilter | None = None
        self.library_bytes = 0
        self.pid = os.getpid()
        self.children: dict[int, _Child] = {}
        self.by_job: dict[int, _Child] = {}
        self.deadlines: list[tuple[float, int]] = []
        self.poll = select.epoll()

    # ---------------------------------------------------------------------------------------- start
    def prepare(self) -> None:
        """Load, wrap and seal, in the order in which each step still can be done."""
        off = self.settings.disabled
        load_libraries()
        from cv_lightning.sandbox import child, tracer

        tracer.install()
        assert child.FILE
        self.library_bytes = layers.virtual_bytes()
        landlock_off = "landlock" in off
        # Both filters are built before Landlock closes the folders that their library looks for itself in.
        seccomp_on = "seccomp" not in off
        open_filter, open_report = layers.build_filter(seccomp_on, allow_open=True)
        closed_filter, closed_report = layers.build_filter(seccomp_on, allow_open=False)
        self.report["namespaces"] = layers.enter_namespaces(self.settings.namespaces)
        self.report["uid"] = layers.drop_privileges("uid" not in off)
        layers.prctl(layers.PR_SET_DUMPABLE, 0)
        done = layers.prctl(layers.PR_SET_NO_NEW_PRIVS, 1) == 0
        self.report["no_new_privs"] = "active" if done else "unavailable"
        self.report["landlock"] = layers.restrict_files(not landlock_off)
        active = self.report["landlock"].startswith("active")
        # Without Landlock no file may be opened at all: everything was imported before.
        self.filter, self.report["seccomp"] = (open_filter, open_report) if active else (closed_filter, closed_report)
        sealed = active or self.filter is not None
        self.report["files"] = "active" + ("" if active else " (open denied)") if sealed else "unavailable"
        self.report["rlimits"] = "off" if "rlimits" in off else "active"
        self.report["pdeathsig"] = "active"
        gc.collect()
        gc.freeze()

    def serve(self) -> None:
        """Answer jobs until the parent hangs up."""
        self.control.send("\n".join(f"{name}={state}" for name, state in self.report.items()).encode())
        self.poll.register(self.control.fileno(), select.EPOLLIN)
        while True:
            wait = max(0.0, self.deadlines[0][0] - time.monotonic()) if self.deadlines else -1
            for fd, _ in self.poll.poll(wait):
                if fd != self.control.fileno():
                    self._reap(self.children[fd])
                elif not self._receive():
                    return
            self._kill_late()

    # ---------------------------------------------------------------------------------------- jobs
    def _receive(self) -> bool:
        packet, fds, _, _ = socket.recv_fds(self.control, 1 << 17, 2)
        if not packet:
            return False
        kind, job, wall, width, height, flags, max_pixels, seed = JOB.unpack_from(packet)
        if kind == CANCEL:
            if job in self.by_job:
                os.kill(self.by_job[job].pid, signal.SIGKILL)
            return True
        pid = os.fork()
        if pid == 0:
            try:
                self._child(packet[JOB.size :], fds, (width, height, flags, max_pixels), seed)
            finally:
                os._exit(98)
        started = time.monotonic()
        for fd in fds:
            os.close(fd)
        running = _Child(job, pid, os.pidfd_open(pid), started, started + wall)
        self.children[running.pidfd] = self.by_job[job] = running
        heapq.heappush(self.deadlines, (running.deadline, job))
        self.poll.register(running.pidfd, select.EPOLLIN)
        return True

    def _reap(self, child: _Child) -> None:
        _, status, usage = os.wait4(child.pid, 0)
        self.poll.unregister(child.pidfd)
        os.close(child.pidfd)
        del self.children[child.pidfd], self.by_job[child.job]
        cpu = usage.ru_utime + usage.ru_stime
        late = child.timed_out or (os.WIFSIGNALED(status) and cpu > self.settings.cpu_s - 0.1)
        elapsed = time.monotonic() - child.started
        self.control.send(REPLY.pack(RUN, child.job, int(late), status, elapsed, cpu))

    def _kill_late(self) -> None:
        now = time.monotonic()
        while self.deadlines and (self.deadlines[0][0] <= now or self.deadlines[0][1] not in self.by_job):
            _, job = heapq.heappop(self.deadlines)
            if job in self.by_job:
                self.by_job[job].timed_out = True
                os.kill(self.by_job[job].pid, signal.SIGKILL)

    # ---------------------------------------------------------------------------------------- the child
    def _child(self, code: bytes, fds: list[int], numbers: tuple[int, int, int, int], seed: bytes) -> None:
        """Between fork and model code: keep two descriptors, take on the limits, seal."""
        from cv_lightning.sandbox.child import ChildJob, run_job

        width, height, flags, max_pixels = numbers
        high = [fcntl.fcntl(fd, fcntl.F_DUPFD, 100) for fd in fds]
        os.dup2(high[0], INPUT_FD)
        os.dup2(high[1], OUTPUT_FD)
        os.closerange(OUTPUT_FD + 1, 1 << 16)
        self._seal(max_pixels)
        job = ChildJob(
            code.decode("utf-8", "replace"),
            width,
            height,
            max_pixels,
            self.settings.memory_mb,
            seed,
            bool(flags & FLAG_REFERENCE),
        )
        run_job(job, INPUT_FD, OUTPUT_FD)

    def _seal(self, max_pixels: int) -> None:
        if self.report["rlimits"] == "active":
            layers.limit_resources(
                memory_bytes=self.settings.memory_mb << 20,
                library_bytes=self.library_bytes,
                cpu_s=self.settings.cpu_s,
                file_bytes=HEADER.size + 3 * max_pixels + MAX_TRACE + MAX_TEXT,
            )
        layers.prctl(layers.PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != self.pid:
            os._exit(1)
        if self.filter is not None and not self.filter.install():
            os._exit(97)


def main(arguments: list[str]) -> None:
    """Entry: descriptor of the control socket, and the settings."""
    layers.prctl(layers.PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    server: Any = ForkServer(socket.socket(fileno=int(arguments[0])), Settings.parse(arguments[1]))
    server.prepare()
    # A change of user clears it.
    layers.prctl(layers.PR_SET_PDEATHSIG, signal.SIGKILL)
    server.serve()
