"""The fork server: loads the libraries once, then forks one fresh sealed child per snippet.

Started by exec with a clean environment and /dev/null as stdio. It runs no model code and trusts its socket, which
only the parent holds. One spare child waits, forked and limited but clean, so that the next snippet need not wait for a
fork; a child that has run model code never runs anything else. Children are watched by pidfd; deadlines are kept here,
with RLIMIT_CPU as a second limit.
"""

from __future__ import annotations

import contextlib
import gc
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

import msgspec

from cv_lightning.sandbox import guard, heap, layers, private_root, scratch, syscalls, tracer
from cv_lightning.sandbox.child import NOT_SEALED, ChildStartError, Seal, cap_recursion, rehearse, run_child
from cv_lightning.sandbox.config import SandboxConfig
from cv_lightning.sandbox.wire import CANCEL, JOB, REPLY

BASIC_MODULES = (
    "math random json re collections itertools functools statistics fractions decimal unicodedata colorsys io base64 "
    "PIL.Image PIL.ImageChops PIL.ImageColor PIL.ImageDraw PIL.ImageEnhance PIL.ImageFilter PIL.ImageFont PIL.ImageOps "
    "PIL.ImageStat PIL.ImageMath numpy cv2"
).split()
SCIENCE_MODULES = "transform filters exposure color morphology restoration util measure segmentation feature".split()
"""Parts of scikit-image. They and SciPy treble the cost of a fork: only servers for code that names them load them."""
OOM_SCORE = 500
"""If memory runs out, the kernel kills a child or a fork server before the trainer."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What the parent passes to a fork server on its command line, as JSON."""

    config: SandboxConfig
    science: bool
    """Load SciPy and scikit-image, too."""
    private_folders: tuple[str, ...]
    """Never readable, wherever they lie."""


@dataclass(slots=True)
class _Child:
    """A spare (no job yet), or a child with its one job."""

    pid: int
    pidfd: int
    control: socket.socket
    job: int = 0
    started: float = 0.0
    timed_out: bool = False


def load_libraries(*, science: bool) -> None:
    """Import everything that snippets may use, so that children need not.

    scikit-image loads its functions lazily; they are loaded here by name, because its own switch for that
    (EAGER_IMPORT) also imports scikit-learn and pandas and doubles the cost of every fork.
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
        self.control, self.settings, self.config = control, settings, settings.config
        self.report: dict[str, str] = {"clean_exec": "active"}
        self.seal: Seal | None = None
        self.children: dict[int, _Child] = {}
        """Children by their pidfd."""
        self.by_job: dict[int, _Child] = {}
        self.spare: _Child | None = None
        self.poll = select.epoll()

    # ---------------------------------------------------------------------------------------- start
    def prepare(self) -> None:
        """Load, wrap and seal, in the order in which each step is still possible."""
        load_libraries(science=self.settings.science)
        guard.install()
        scratch.install()
        tracer.install()
        cap_recursion()
        rehearse()
        library_bytes = layers.virtual_bytes() + heap.RESERVED
        self.seal = Seal(os.getpid(), self.config, library_bytes, filter=self._isolate())
        gc.collect()
        gc.freeze()
        # Children turn it on again: a collection here would only make pages that they have to copy.
        gc.disable()
        heap.align_top()

    def _isolate(self) -> syscalls.SeccompFilter | None:
        """Set up the layers of this process; returns the system call filter of its children."""
        off = self.config.disabled_layers
        with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w", encoding="ascii") as file:
            file.write(str(OOM_SCORE))
        # The filters are built before Landlock closes the folders in which their library looks for its parts.
        filters = {allow: syscalls.build_filter("seccomp" not in off, allow_open=allow) for allow in (True, False)}
        paths = layers.readable_paths(self.settings.private_folders)
        self.report["private_root"] = "off"
        if self.config.private_root:
            self.report["private_root"] = private_root.enter(
                paths, aliases=layers.library_paths(), devices=layers.DEVICES
            )
        self.report["namespaces"] = layers.enter_namespaces(self.config.namespaces)
        self.report["uid"] = layers.drop_privileges("uid" not in off)
        layers.prctl(layers.PR_SET_DUMPABLE, 0)
        done = layers.prctl(layers.PR_SET_NO_NEW_PRIVS, 1) == 0
        self.report["no_new_privs"] = "active" if done else "unavailable"
        self.report["landlock"] = layers.restrict_files("landlock" not in off, paths)
        active = self.report["landlock"].startswith("active")
        # Without Landlock no file may be opened at all: everything was imported before.
        chosen, self.report["seccomp"] = filters[active]
        sealed = active or chosen is not None
        self.report["files"] = "active" + ("" if active else " (open denied)") if sealed else "unavailable"
        self.report["rlimits"] = "off" if "rlimits" in off else "active"
        self.report["pdeathsig"] = "active"
        return chosen

    def serve(self) -> None:
        """Answer jobs until the parent closes the socket."""
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
            self._kill_late()
            if not events and self.spare is None:
                self.spare = self._fork()

    def _patience(self) -> float:
        """Seconds to wait for an event: until the next deadline; 0 while a spare has to be forked."""
        if self.spare is None:
            return 0.0
        first = min((child.started for child in self.by_job.values() if not child.timed_out), default=None)
        return -1 if first is None else max(0.0, first + self.config.timeout_s - time.monotonic())

    # ---------------------------------------------------------------------------------------- jobs
    def _receive(self) -> bool:
        packet, fds, _, _ = socket.recv_fds(self.control, JOB.size, 2)
        if not packet:
            return False
        kind, job, *_ = JOB.unpack_from(packet)
        if kind == CANCEL:
            if job in self.by_job:
                os.kill(self.by_job[job].pid, signal.SIGKILL)
            return True
        child = self._hand_over(packet, fds)
        for fd in fds:
            os.close(fd)
        child.job, child.started = job, time.monotonic()
        self.by_job[job] = child
        return True

    def _hand_over(self, packet: bytes, fds: list[int]) -> _Child:
        """Give a job to the spare child, else to a new one; one that has died meanwhile is skipped."""
        while True:
            child, self.spare = self.spare or self._fork(), None
            with contextlib.suppress(OSError):
                socket.send_fds(child.control, [packet], fds)
                child.control.close()
                return child

    def _broke_cpu_limit(self, status: int, cpu: float) -> bool:
        """True if the kernel ended a child for its CPU time.

        SIGXCPU ends a snippet at the limit. One that ignores it gets a SIGKILL, which others may send too, but only
        beyond twice the limit. The kernel counts by clock ticks, which on a busy virtual machine run ahead of `cpu`,
        the time really used. If they run less than twice as fast, a kill by the kernel comes after `cpu_s`.
        """
        if not os.WIFSIGNALED(status):
            return False
        number = os.WTERMSIG(status)
        return number == signal.SIGXCPU or (number == signal.SIGKILL and cpu >= self.config.cpu_s)

    def _reap(self, child: _Child) -> None:
        pid, status, usage = os.wait4(child.pid, os.WNOHANG)
        if not pid:  # the event was for a dead child whose descriptor this one got
            return
        self.poll.unregister(child.pidfd)
        os.close(child.pidfd)
        del self.children[child.pidfd]
        child.control.close()
        if child is self.spare:
            self.spare = None
        if child.job:
            elapsed, cpu = time.monotonic() - child.started, usage.ru_utime + usage.ru_stime
            late = child.timed_out or self._broke_cpu_limit(status, cpu)
            del self.by_job[child.job]
            self.control.send(REPLY.pack(child.job, late, status, elapsed, usage.ru_maxrss << 10))
        elif os.WIFEXITED(status) and os.WEXITSTATUS(status) == NOT_SEALED:
            # The status means this only before a job: model code may exit as it likes. The parent sees this exit.
            sys.exit("a child could not be sealed")

    def _kill_late(self) -> None:
        latest = time.monotonic() - self.config.timeout_s
        for child in self.by_job.values():
            if child.started <= latest and not child.timed_out:
                child.timed_out = True
                os.kill(child.pid, signal.SIGKILL)

    # ---------------------------------------------------------------------------------------- the child
    def _fork(self) -> _Child:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        pid = os.fork()
        if pid == 0:
            raise ChildStartError(theirs.detach())
        theirs.close()
        child = _Child(pid, os.pidfd_open(pid), ours)
        self.children[child.pidfd] = child
        self.poll.register(child.pidfd, select.EPOLLIN)
        return child


def main(arguments: list[str]) -> None:
    """Entry: descriptor of the control socket, and the settings.

    Every child comes back here and runs in this frame, from which nothing of the fork server can be reached: neither
    the process ids of other children nor its socket. The fork server never holds a snippet's code.
    """
    layers.prctl(layers.PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    settings = msgspec.convert(json.loads(arguments[1]), Settings)
    server = ForkServer(socket.socket(fileno=int(arguments[0])), settings)
    for names in (arguments, sys.argv, sys.orig_argv):
        names.clear()  # they name folders of the host
    del settings
    server.prepare()
    # A change of user clears it.
    layers.prctl(layers.PR_SET_PDEATHSIG, signal.SIGKILL)
    try:
        server.serve()
    except ChildStartError as start:
        seal, control = server.seal, start.control
    else:
        return
    vars(server).clear()
    del server
    if seal is not None:
        run_child(seal, control)
