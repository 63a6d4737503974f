"""The fork server: loads the libraries once, then forks one fresh sealed child per snippet.

Started by exec with a clean environment and /dev/null as stdio. It runs no model code and trusts its socket, which
only the parent holds. One spare child waits, forked and limited but clean, so that the next snippet need not wait for a
fork; a child that has run model code never runs anything else. Plans (checked operations, no model code) go to a warm
worker instead. Children are watched by pidfd; deadlines are kept here, with RLIMIT_CPU behind them.
"""

from __future__ import annotations

import contextlib
import gc
import heapq
import importlib
import os
import select
import signal
import socket
import sys
import time
from dataclasses import dataclass

from cv_lightning.sandbox import heap, layers
from cv_lightning.sandbox.wire import CANCEL, FLAG_PLAN, HEADER, JOB, MAX_TEXT, MAX_TRACE, PIXEL, REPLY, RUN

BASIC_MODULES = (
    "math random json re collections itertools functools statistics fractions decimal unicodedata colorsys io base64 "
    "PIL.Image PIL.ImageChops PIL.ImageColor PIL.ImageDraw PIL.ImageEnhance PIL.ImageFilter PIL.ImageFont PIL.ImageOps "
    "PIL.ImageStat PIL.ImageMath numpy cv2"
).split()
SCIENCE_MODULES = "transform filters exposure color morphology restoration util measure segmentation feature".split()
"""Parts of scikit-image. They and SciPy treble the cost of a fork: only servers for code that names them load them."""
MAX_IDLE_WORKERS = 2
NOT_SEALED = 97
"""Exit status of a child that failed before it got a job."""
OOM_SCORE = 500
"""If memory runs out, the kernel takes a child or a fork server before the trainer."""
WORKER_JOBS = 2000
"""A warm worker is replaced after this many plans."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What the parent tells a fork server on its command line."""

    memory_mb: int
    cpu_s: int
    max_pixels: int
    disabled: frozenset[str]
    namespaces: bool
    science: bool

    @classmethod
    def parse(cls, text: str) -> Settings:
        """Read `memory_mb:cpu_s:max_pixels:disabled,..:namespaces:science`."""
        memory, cpu, pixels, disabled, namespaces, science = text.split(":")
        off = frozenset(disabled.split(","))
        return cls(int(memory), int(cpu), int(pixels), off, namespaces == "1", science == "1")


@dataclass(slots=True)
class _Child:
    """A spare (no job yet), a child with its one job, or a worker."""

    pid: int
    pidfd: int
    control: socket.socket
    is_worker: bool
    job: int = 0
    started: float = 0.0
    deadline: float = 0.0
    timed_out: bool = False
    served: int = 0


def load_libraries(*, science: bool) -> None:
    """Import everything that snippets may use: a child imports nothing from scratch.

    scikit-image binds its functions late; they are bound here, by name, because its own switch for that
    (EAGER_IMPORT) drags in scikit-learn and pandas and doubles the cost of every fork.
    """
    for name in BASIC_MODULES:
        importlib.import_module(name)
    from PIL import Image

    Image.init()
    Image.MAX_IMAGE_PIXELS = None
    cv2 = sys.modules["cv2"]
    cv2.setNumThreads(1)
    for part in SCIENCE_MODULES if science else ():
        with contextlib.suppress(ImportError):
            importlib.import_module("scipy.ndimage")
            module = importlib.import_module(f"skimage.{part}")
            for name in getattr(module, "__all__", ()):
                getattr(module, name)


class ForkServer:
    """Forks children for the jobs that come in on a socket."""

    def __init__(self, control: socket.socket, settings: Settings) -> None:
        self.control, self.settings = control, settings
        self.report: dict[str, str] = {"clean_exec": "active"}
        self.filter: layers.SeccompFilter | None = None
        self.worker_filter: layers.SeccompFilter | None = None
        self.library_bytes = 0
        self.pid = os.getpid()
        self.children: dict[int, _Child] = {}
        self.by_job: dict[int, _Child] = {}
        self.by_control: dict[int, _Child] = {}
        self.spare: _Child | None = None
        self.idle_workers: list[_Child] = []
        self.deadlines: list[tuple[float, int]] = []
        self.poll = select.epoll()

    # ---------------------------------------------------------------------------------------- start
    def prepare(self) -> None:
        """Load, wrap and seal, in the order in which each step still can be done."""
        load_libraries(science=self.settings.science)
        from cv_lightning.sandbox import child, guard, tracer

        importlib.import_module("cv_lightning.sandbox.worker")  # a child could not read it any more
        guard.install()
        tracer.install()
        child.cap_recursion()
        child.rehearse()
        self.library_bytes = layers.virtual_bytes() + heap.RESERVED
        self._isolate(self.settings.disabled)
        gc.collect()
        gc.freeze()
        # Children turn it on again: a collection here would only make pages that they have to copy.
        gc.disable()
        heap.align_top()

    def _isolate(self, off: frozenset[str]) -> None:
        with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w", encoding="ascii") as file:
            file.write(str(OOM_SCORE))
        # The filters are built before Landlock closes the folders that their library looks for itself in.
        filters = {allow: layers.build_filter("seccomp" not in off, allow_open=allow) for allow in (True, False)}
        self.worker_filter, _ = layers.build_filter(
            "seccomp" not in off, allow_open=False, extra=layers.WORKER_SYSCALLS
        )
        self.report["namespaces"] = layers.enter_namespaces(self.settings.namespaces)
        self.report["uid"] = layers.drop_privileges("uid" not in off)
        layers.prctl(layers.PR_SET_DUMPABLE, 0)
        done = layers.prctl(layers.PR_SET_NO_NEW_PRIVS, 1) == 0
        self.report["no_new_privs"] = "active" if done else "unavailable"
        self.report["landlock"] = layers.restrict_files("landlock" not in off)
        active = self.report["landlock"].startswith("active")
        # Without Landlock no file may be opened at all: everything was imported before.
        self.filter, self.report["seccomp"] = filters[active]
        sealed = active or self.filter is not None
        self.report["files"] = "active" + ("" if active else " (open denied)") if sealed else "unavailable"
        self.report["rlimits"] = "off" if "rlimits" in off else "active"
        self.report["pdeathsig"] = "active"

    def serve(self) -> None:
        """Answer jobs until the parent hangs up."""
        self.control.send("\n".join(f"{name}={state}" for name, state in self.report.items()).encode())
        self.poll.register(self.control.fileno(), select.EPOLLIN)
        while True:
            events = self.poll.poll(self._patience())
            for fd, _ in events:
                if fd == self.control.fileno():
                    if not self._receive():
                        return
                elif fd in self.children:
                    self._reap(self.children[fd])
                elif fd in self.by_control:
                    self._worker_spoke(self.by_control[fd])
            self._kill_late()
            if not events and self.spare is None:
                self.spare = self._fork(is_worker=False)

    def _patience(self) -> float:
        """Seconds to wait for an event; none while a spare is wanted, which is made as soon as nothing else is up."""
        if self.spare is None:
            return 0.0
        return max(0.0, self.deadlines[0][0] - time.monotonic()) if self.deadlines else -1

    # ---------------------------------------------------------------------------------------- jobs
    def _receive(self) -> bool:
        packet, fds, _, _ = socket.recv_fds(self.control, 1 << 17, 2)
        if not packet:
            return False
        kind, job, wall, _, _, flags, _, _ = JOB.unpack_from(packet)
        if kind == CANCEL:
            if job in self.by_job:
                os.kill(self.by_job[job].pid, signal.SIGKILL)
            return True
        child = self._hand_over(packet, fds, is_worker=bool(flags & FLAG_PLAN))
        for fd in fds:
            os.close(fd)
        child.job, child.started, child.timed_out = job, time.monotonic(), False
        child.deadline = child.started + wall
        self.by_job[job] = child
        heapq.heappush(self.deadlines, (child.deadline, job))
        return True

    def _hand_over(self, packet: bytes, fds: list[int], *, is_worker: bool) -> _Child:
        """Give a job to a child that waits, else to a new one; one that has died meanwhile is passed over."""
        while True:
            if is_worker:
                child = self.idle_workers.pop() if self.idle_workers else self._fork(is_worker=True)
            else:
                child, self.spare = self.spare or self._fork(is_worker=False), None
            with contextlib.suppress(OSError):
                socket.send_fds(child.control, [packet], fds)
                if not is_worker:
                    child.control.close()
                return child

    def _worker_spoke(self, worker: _Child) -> None:
        """A plan is done: answer, and keep the worker. Its death is seen by its pidfd."""
        try:
            done = worker.control.recv(1, socket.MSG_DONTWAIT)
        except BlockingIOError:  # the event was for a dead worker whose descriptor this one got
            return
        except OSError:
            done = b""
        if not done or not worker.job:
            self._forget_control(worker)
            return
        worker.served += 1
        elapsed = time.monotonic() - worker.started
        self._answer(worker, 0, elapsed, elapsed)
        if len(self.idle_workers) < MAX_IDLE_WORKERS and worker.served < WORKER_JOBS:
            self.idle_workers.append(worker)
        else:
            os.kill(worker.pid, signal.SIGKILL)

    def _answer(self, child: _Child, status: int, elapsed: float, cpu: float) -> None:
        late = child.timed_out or (os.WIFSIGNALED(status) and cpu > self.settings.cpu_s - 0.1)
        del self.by_job[child.job]
        self.control.send(REPLY.pack(RUN, child.job, int(late), status, elapsed, cpu))
        child.job = 0

    def _reap(self, child: _Child) -> None:
        pid, status, usage = os.wait4(child.pid, os.WNOHANG)
        if not pid:  # the event was for a dead child whose descriptor this one got
            return
        self.poll.unregister(child.pidfd)
        os.close(child.pidfd)
        del self.children[child.pidfd]
        self._forget_control(child)
        child.control.close()
        if child is self.spare:
            self.spare = None
        if child in self.idle_workers:
            self.idle_workers.remove(child)
        if not child.job and os.WIFEXITED(status) and os.WEXITSTATUS(status) == NOT_SEALED:
            # Only before a job does the status say so: model code may exit as it likes. The parent sees our end.
            sys.exit("a child could not be sealed")
        if child.job:
            self._answer(child, status, time.monotonic() - child.started, usage.ru_utime + usage.ru_stime)

    def _forget_control(self, child: _Child) -> None:
        if child.is_worker and child.control.fileno() in self.by_control:
            self.poll.unregister(child.control.fileno())
            del self.by_control[child.control.fileno()]

    def _kill_late(self) -> None:
        now = time.monotonic()
        while self.deadlines and (self.deadlines[0][0] <= now or self.deadlines[0][1] not in self.by_job):
            _, job = heapq.heappop(self.deadlines)
            if job in self.by_job:
                self.by_job[job].timed_out = True
                os.kill(self.by_job[job].pid, signal.SIGKILL)

    # ---------------------------------------------------------------------------------------- the child
    def _fork(self, *, is_worker: bool) -> _Child:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        pid = os.fork()
        if pid == 0:
            try:
                self._child(theirs.fileno(), is_worker)
            finally:
                os._exit(NOT_SEALED)
        theirs.close()
        child = _Child(pid, os.pidfd_open(pid), ours, is_worker)
        self.children[child.pidfd] = child
        self.poll.register(child.pidfd, select.EPOLLIN)
        if is_worker:
            self.by_control[ours.fileno()] = child
            self.poll.register(ours.fileno(), select.EPOLLIN)
        return child

    def _child(self, control: int, is_worker: bool) -> None:
        """Between fork and work: close, limit, touch what will be needed, seal, wait."""
        from cv_lightning.sandbox import child, worker

        jobs = socket.socket(fileno=child.keep_only(control))
        self._limit(is_worker)
        if not is_worker:
            child.rehearse()
        seal = self.worker_filter if is_worker else self.filter
        if seal is not None and not seal.install():
            os._exit(NOT_SEALED)
        if is_worker:
            worker.serve(jobs)
            os._exit(0)
        child.run_job(child.wait_for_job(jobs, self.settings.memory_mb))

    def _limit(self, is_worker: bool) -> None:
        if self.report["rlimits"] == "active":
            layers.limit_resources(
                memory_bytes=self.settings.memory_mb << 20,
                library_bytes=self.library_bytes,
                # A worker lives on; its plans are priced beforehand and its deadlines are kept by the fork server.
                cpu_s=None if is_worker else self.settings.cpu_s,
                file_bytes=HEADER.size + PIXEL * self.settings.max_pixels + MAX_TRACE + MAX_TEXT,
            )
        layers.prctl(layers.PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != self.pid:
            os._exit(1)


def main(arguments: list[str]) -> None:
    """Entry: descriptor of the control socket, and the settings."""
    layers.prctl(layers.PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    server = ForkServer(socket.socket(fileno=int(arguments[0])), Settings.parse(arguments[1]))
    server.prepare()
    # A change of user clears it.
    layers.prctl(layers.PR_SET_PDEATHSIG, signal.SIGKILL)
    server.serve()
