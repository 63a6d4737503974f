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
import json
import os
import select
import signal
import socket
import sys
import tempfile
import threading
import time
from dataclasses import dataclass

from cv_lightning.sandbox import heap, layers, private_root, sealing, syscalls
from cv_lightning.sandbox.wire import CANCEL, FLAG_PLAN, JOB, REPLY, RUN

BASIC_MODULES = (
    "math random json re collections itertools functools statistics fractions decimal unicodedata colorsys io base64 "
    "PIL.Image PIL.ImageChops PIL.ImageColor PIL.ImageDraw PIL.ImageEnhance PIL.ImageFilter PIL.ImageFont PIL.ImageOps "
    "PIL.ImageStat PIL.ImageMath numpy cv2"
).split()
SCIENCE_MODULES = "transform filters exposure color morphology restoration util measure segmentation feature".split()
"""Parts of scikit-image. They and SciPy treble the cost of a fork: only servers for code that names them load them."""
MAX_IDLE_WORKERS = 2
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
    private_root: bool
    science: bool
    private_folders: tuple[str, ...]
    """Never readable, wherever they lie."""

    @classmethod
    def parse(cls, text: str) -> Settings:
        """Read the JSON object that `Server.launch` writes: the fields by name."""
        given = json.loads(text)
        return cls(
            **{**given, "disabled": frozenset(given["disabled"]), "private_folders": tuple(given["private_folders"])}
        )


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
    if science:
        _load_matplotlib()


def _load_matplotlib() -> None:
    """Import pyplot with its list of fonts, for which it needs a folder to write to; children have none."""
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(ImportError, OSError):
        os.environ["MPLCONFIGDIR"] = folder
        importlib.import_module("matplotlib").use("Agg")
        importlib.import_module("matplotlib.pyplot")
        # A figure with text loads the fonts and the parts that pyplot puts off.
        figure = sys.modules["matplotlib.pyplot"].figure(figsize=(1, 1))
        figure.add_subplot().set_title("1")
        figure.canvas.draw()
        sys.modules["matplotlib.pyplot"].close("all")
    os.environ.pop("MPLCONFIGDIR", None)
    # The search for fonts has a timer, which may not have ended; forks and user namespaces want a single thread.
    for thread in threading.enumerate():
        if thread is not threading.current_thread():
            thread.join(1.0)


class ForkServer:
    """Forks children for the jobs that come in on a socket."""

    def __init__(self, control: socket.socket, settings: Settings) -> None:
        self.control, self.settings = control, settings
        self.report: dict[str, str] = {"clean_exec": "active"}
        self.seal: sealing.Seal | None = None
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
        from cv_lightning.sandbox import child, guard, scratch, tracer

        guard.install()
        scratch.install()
        tracer.install()
        child.cap_recursion()
        child.rehearse()
        library_bytes = layers.virtual_bytes() + heap.RESERVED
        filters = self._isolate(self.settings.disabled)
        self.seal = sealing.Seal(
            server_pid=os.getpid(),
            memory_mb=self.settings.memory_mb,
            cpu_s=self.settings.cpu_s,
            max_pixels=self.settings.max_pixels,
            library_bytes=library_bytes,
            limited=self.report["rlimits"] == "active",
            filter=filters[0],
            worker_filter=filters[1],
        )
        gc.collect()
        gc.freeze()
        # Children turn it on again: a collection here would only make pages that they have to copy.
        gc.disable()
        heap.align_top()

    def _isolate(self, off: frozenset[str]) -> tuple[syscalls.SeccompFilter | None, syscalls.SeccompFilter | None]:
        """Put up the layers of this process; returns the filters of its children and of its workers."""
        with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w", encoding="ascii") as file:
            file.write(str(OOM_SCORE))
        # The filters are built before Landlock closes the folders that their library looks for itself in.
        filters = {allow: syscalls.build_filter("seccomp" not in off, allow_open=allow) for allow in (True, False)}
        for_workers, _ = syscalls.build_filter("seccomp" not in off, allow_open=False, extra=syscalls.WORKER)
        paths = layers.readable_paths(self.settings.private_folders)
        self.report["private_root"] = "off"
        if self.settings.private_root:
            self.report["private_root"] = private_root.enter(
                paths, aliases=layers.library_paths(), devices=layers.DEVICES
            )
        self.report["namespaces"] = layers.enter_namespaces(self.settings.namespaces)
        self.report["uid"] = layers.drop_privileges("uid" not in off)
        layers.prctl(layers.PR_SET_DUMPABLE, 0)
        done = layers.prctl(layers.PR_SET_NO_NEW_PRIVS, 1) == 0
        self.report["no_new_privs"] = "active" if done else "unavailable"
        self.report["landlock"] = layers.restrict_files("landlock" not in off, paths)
        active = self.report["landlock"].startswith("active")
        # Without Landlock no file may be opened at all: everything was imported before.
        for_children, self.report["seccomp"] = filters[active]
        sealed = active or for_children is not None
        self.report["files"] = "active" + ("" if active else " (open denied)") if sealed else "unavailable"
        self.report["rlimits"] = "off" if "rlimits" in off else "active"
        self.report["pdeathsig"] = "active"
        return for_children, for_workers

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
        packet, fds, _, _ = socket.recv_fds(self.control, JOB.size, 2)
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
        self._answer(worker, 0, elapsed, elapsed, 0)
        if len(self.idle_workers) < MAX_IDLE_WORKERS and worker.served < WORKER_JOBS:
            self.idle_workers.append(worker)
        else:
            os.kill(worker.pid, signal.SIGKILL)

    def _answer(self, child: _Child, status: int, elapsed: float, cpu: float, peak_bytes: int) -> None:
        late = child.timed_out or self._broke_cpu_limit(status, cpu)
        del self.by_job[child.job]
        self.control.send(REPLY.pack(RUN, child.job, int(late), status, elapsed, cpu, peak_bytes))
        child.job = 0

    def _broke_cpu_limit(self, status: int, cpu: float) -> bool:
        """True if the kernel ended a child for its CPU time.

        SIGXCPU ends a snippet at the limit. One that ignores it gets a SIGKILL, which anybody may have sent, but only
        beyond twice the limit. The kernel counts by clock ticks, which on a busy virtual machine run ahead of `cpu`,
        the time really used. As long as they are not twice as fast, the one never reaches the limit and the other does.
        """
        if not os.WIFSIGNALED(status):
            return False
        number = os.WTERMSIG(status)
        return number == signal.SIGXCPU or (number == signal.SIGKILL and cpu >= self.settings.cpu_s)

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
        if not child.job and os.WIFEXITED(status) and os.WEXITSTATUS(status) == sealing.NOT_SEALED:
            # Only before a job does the status say so: model code may exit as it likes. The parent sees our end.
            sys.exit("a child could not be sealed")
        if child.job:
            elapsed, cpu = time.monotonic() - child.started, usage.ru_utime + usage.ru_stime
            self._answer(child, status, elapsed, cpu, usage.ru_maxrss << 10)

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
            raise sealing.ChildStartError(theirs.detach(), is_worker)
        theirs.close()
        child = _Child(pid, os.pidfd_open(pid), ours, is_worker)
        self.children[child.pidfd] = child
        self.poll.register(child.pidfd, select.EPOLLIN)
        if is_worker:
            self.by_control[ours.fileno()] = child
            self.poll.register(ours.fileno(), select.EPOLLIN)
        return child


def main(arguments: list[str]) -> None:
    """Entry: descriptor of the control socket, and the settings.

    Every child comes back here and runs in this frame, from which nothing of the fork server can be reached: neither
    the process ids of other children nor its socket. It never held any snippet's code.
    """
    layers.prctl(layers.PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    server = ForkServer(socket.socket(fileno=int(arguments[0])), Settings.parse(arguments[1]))
    for names in (arguments, sys.argv, sys.orig_argv):
        names.clear()  # they name folders of the host
    server.prepare()
    # A change of user clears it.
    layers.prctl(layers.PR_SET_PDEATHSIG, signal.SIGKILL)
    try:
        server.serve()
    except sealing.ChildStartError as start:
        seal, control, is_worker = server.seal, start.control, start.is_worker
    else:
        return
    vars(server).clear()
    del server
    if seal is not None:
        sealing.run_child(seal, control, is_worker)
