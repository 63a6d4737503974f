"""The parent's side of the fork servers: one thread that queues, sends, collects, replaces and resends.

All state belongs to that thread; other threads hand over jobs through a deque and an eventfd. Fork servers are started
by it too, because their parent-death signal follows the thread that started them.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import logging
import os
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import OrderedDict, deque
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from pathlib import Path

from cv_lightning.sandbox.config import SandboxConfig
from cv_lightning.sandbox.wire import CANCEL, FLAG_REFERENCE, JOB, REPLY, RUN
from cv_lightning.types import SandboxError

log = logging.getLogger(__name__)

WATCHDOG_S = 2.0
"""A fork server that has not answered this long after a deadline is killed."""
MAX_ATTEMPTS = 2
MAX_FAILED_STARTS = 3
_ROOT = str(Path(__file__).resolve().parents[2])
_BOOT = "import sys; sys.path += [p for p in sys.argv.pop(1).split(':') if p not in sys.path]; from cv_lightning.sandbox.zygote import main; main(sys.argv[1:])"
_ENVIRONMENT = {
    "PATH": "/usr/bin:/bin",
    "LANG": "C.UTF-8",
    "HOME": "/nonexistent",
    "PYTHONHASHSEED": "0",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENCV_FOR_THREADS_NUM": "1",
    "EAGER_IMPORT": "1",
}


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a child ended; its output memfd belongs to whoever gets this."""

    output_fd: int
    """-1: lost."""
    late: bool = False
    wait_status: int = 0
    elapsed_s: float = 0.0
    cpu_s: float = 0.0


@dataclass(slots=True)
class Job:
    """One snippet on its way; `input_fd` is closed by the pool."""

    id: int
    owner: str
    code: bytes
    size: tuple[int, int]
    seed: bytes
    input_fd: int
    timeout_s: float
    future: Future[Outcome] = field(default_factory=Future)
    output_fd: int = -1
    attempts: int = 0
    server: _Server | None = None

    @property
    def num_bytes(self) -> int:
        """Bytes of the input's pixels."""
        return 3 * self.size[0] * self.size[1]


@dataclass(slots=True, eq=False)
class _Server:
    process: subprocess.Popen[bytes]
    control: socket.socket
    started: float
    report: dict[str, str] | None = None
    jobs: dict[int, Job] = field(default_factory=dict)
    served: int = 0
    draining: bool = False
    first_bytes: int = 0


class Pool:
    """Runs jobs on fork servers. `start`, `submit`, `cancel` and `close` may be called from any thread."""

    def __init__(self, config: SandboxConfig) -> None:
        self.config = config
        cores = len(os.sched_getaffinity(0))
        self.num_servers = config.num_zygotes or max(1, min(8, (cores + 1) // 2))
        self.max_in_flight = config.max_in_flight or max(2 * self.num_servers, cores)
        self.max_bytes = int(config.max_in_flight_mb * 1e6)
        self.counts = {"jobs": 0, "resent": 0, "lost": 0, "timeouts": 0, "killed": 0, "restarts": 0, "cancelled": 0}
        self.report: dict[str, str] = {}
        self.pid = os.getpid()
        self._ids = itertools.count(1)
        self._inbox: deque[tuple[str, Job | None]] = deque()
        self._queues: OrderedDict[str, deque[Job]] = OrderedDict()
        self._num_queued = 0
        self._servers: list[_Server] = []
        self._in_flight: dict[int, Job] = {}
        self._bytes = 0
        self._failed_starts = 0
        self._deadlines: list[tuple[float, int]] = []
        self._ready: Future[None] = Future()
        self._closing = False
        self._selector = selectors.DefaultSelector()
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._thread = threading.Thread(target=self._main, name="sandbox", daemon=True)

    # ---------------------------------------------------------------------------------------- any thread
    def start(self) -> None:
        """Start the fork servers and wait for the first.

        Raises:
            SandboxError: none came up.
        """
        self._thread.start()
        try:
            self._ready.result(self.config.start_timeout_s + 1)
        except TimeoutError:
            raise SandboxError(f"no fork server came up within {self.config.start_timeout_s} s; raise sandbox.start_timeout_s") from None

    def submit(self, *, owner: str, code: str, size: tuple[int, int], seed: bytes, input_fd: int) -> Job:
        """Queue a snippet; the job's future gets an `Outcome`. Takes over `input_fd`."""
        job = Job(next(self._ids), owner, code.encode("utf-8", "replace"), size, seed, input_fd, self.config.timeout_s)
        if self._closing or os.getpid() != self.pid:
            os.close(input_fd)
            job.future.set_exception(SandboxError("the sandbox is closed, or was started before this process was forked"))
            return job
        job.future.add_done_callback(lambda future: self._post("cancel", job) if future.cancelled() else None)
        self._post("job", job)
        return job

    def close(self) -> None:
        """Kill everything and wait until it is gone."""
        if os.getpid() != self.pid or not self._thread.is_alive():
            return
        self._closing = True
        self._post("close", None)
        self._thread.join(10)

    def _post(self, what: str, job: Job | None) -> None:
        self._inbox.append((what, job))
        with contextlib.suppress(OSError):  # closed meanwhile
            os.eventfd_write(self._wake, 1)

    @property
    def load(self) -> dict[str, float]:
        """Jobs queued and in flight, fork servers alive."""
        return {"queued": self._num_queued, "in_flight": len(self._in_flight), "zygotes": len(self._servers)}

    @property
    def server_pids(self) -> list[int]:
        """Process ids of the fork servers."""
        return [server.process.pid for server in list(self._servers)]

    # ---------------------------------------------------------------------------------------- the thread
    def _main(self) -> None:
        self._selector.register(self._wake, selectors.EVENT_READ, None)
        try:
            for _ in range(self.num_servers):
                self._launch()
            while self._turn():
                pass
        except OSError as error:
            log.exception("the sandbox's thread failed")
            self._fail_start(f"the sandbox's thread failed: {error}")
        finally:
            self._closing = True
            self._shut_down()

    def _turn(self) -> bool:
        """Wait for something to happen and deal with it; False at the end."""
        wait = max(0.0, self._deadlines[0][0] - time.monotonic()) if self._deadlines else 5.0
        for key, _ in self._selector.select(min(wait, 5.0)):
            if key.data is None:
                with contextlib.suppress(BlockingIOError):
                    os.eventfd_read(self._wake)
            else:
                self._read(key.data)
        while self._inbox:
            what, job = self._inbox.popleft()
            if what == "close":
                return False
            if what == "job" and job is not None:
                self._enqueue(job)
            elif job is not None:
                self._cancel(job)
        self._watch()
        self._dispatch()
        return True

    def _enqueue(self, job: Job) -> None:
        if self._num_queued >= self.config.max_queue or self._failed_starts >= MAX_FAILED_STARTS:
            self._lose(job)
            return
        self._queues.setdefault(job.owner, deque()).append(job)
        self._num_queued += 1

    def _cancel(self, job: Job) -> None:
        self.counts["cancelled"] += 1
        if job.server is not None and job.id in job.server.jobs:
            self._send(job.server, JOB.pack(CANCEL, job.id, 0.0, 0, 0, 0, 0, bytes(16)), [])
            return
        queue = self._queues.get(job.owner)
        if queue is not None and job in queue:
            queue.remove(job)
            self._num_queued -= 1
            if not queue:
                del self._queues[job.owner]
            self._release(job)

    def _dispatch(self) -> None:
        while self._queues and len(self._in_flight) < self.max_in_flight:
            ready = [s for s in self._servers if s.report is not None and not s.draining]
            if not ready:
                return
            owner, queue = next(iter(self._queues.items()))
            if self._in_flight and self._bytes + queue[0].num_bytes > self.max_bytes:
                return
            job = queue.popleft()
            self._num_queued -= 1
            # Round robin: this trajectory goes to the end of the line.
            del self._queues[owner]
            if queue:
                self._queues[owner] = queue
            if job.future.cancelled():
                self._release(job)
                continue
            self._run_on(min(ready, key=lambda server: len(server.jobs)), job)

    def _run_on(self, server: _Server, job: Job) -> None:
        job.attempts += 1
        job.server = server
        if job.output_fd >= 0:
            os.close(job.output_fd)
        job.output_fd = os.memfd_create("result", os.MFD_CLOEXEC)
        if job.attempts == 1:
            self.counts["jobs"] += 1
        server.jobs[job.id] = self._in_flight[job.id] = job
        server.served += 1
        self._bytes += job.num_bytes
        heapq.heappush(self._deadlines, (time.monotonic() + job.timeout_s + WATCHDOG_S, job.id))
        flags = FLAG_REFERENCE if self.config.reference_results else 0
        header = JOB.pack(RUN, job.id, job.timeout_s, *job.size, flags, self.config.max_result_pixels, job.seed)
        self._send(server, header + job.code, [job.input_fd, job.output_fd])
        if server.served >= self.config.jobs_per_zygote and not server.draining:
            self._retire(server)

    def _send(self, server: _Server, packet: bytes, fds: list[int]) -> None:
        try:
            socket.send_fds(server.control, [packet], fds)
        except OSError:
            with contextlib.suppress(ProcessLookupError):
                server.process.kill()  # its end of file is dealt with when the socket is read

    # ---------------------------------------------------------------------------------------- fork servers
    def _launch(self) -> None:
        config = self.config
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        off = ",".join(config.disabled_layers)
        settings = f"{config.memory_mb}:{config.cpu_s}:{config.max_result_pixels}:{off}:{int(config.namespaces)}"
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-I", "-c", _BOOT, _search_path(), str(theirs.fileno()), settings],
                pass_fds=[theirs.fileno()],
                env=_ENVIRONMENT,
                cwd="/",
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        ours.settimeout(5.0)
        server = _Server(process, ours, time.monotonic())
        self._servers.append(server)
        self._selector.register(ours, selectors.EVENT_READ, server)

    def _read(self, server: _Server) -> None:
        try:
            packet = server.control.recv(4096)
        except OSError:
            packet = b""
        if not packet:
            self._bury(server)
        elif server.report is None:
            server.report = dict(line.split("=", 1) for line in packet.decode().splitlines())
            server.first_bytes = _resident_bytes(server.process.pid)
            self.report, self._failed_starts = server.report, 0
            if not self._ready.done():
                self._ready.set_result(None)
        else:
            self._collect(server, packet)

    def _collect(self, server: _Server, packet: bytes) -> None:
        _, number, late, status, elapsed, cpu = REPLY.unpack(packet)
        job = server.jobs.pop(number, None)
        if job is None:
            return
        self._leave_flight(job)
        self.counts["timeouts"] += bool(late)
        self.counts["killed"] += bool(status and not late)
        output, job.output_fd = job.output_fd, -1
        self._release(job)
        try:
            job.future.set_result(Outcome(output, bool(late), status, elapsed, cpu))
        except InvalidStateError:  # cancelled
            os.close(output)
        if server.served % 256 == 0 and _resident_bytes(server.process.pid) > server.first_bytes + self.config.grown_mb * 1e6:
            self._retire(server)
        if server.draining and not server.jobs:
            self._bury(server)

    def _retire(self, server: _Server) -> None:
        """Replace a fork server: it finishes what it has, another takes its place."""
        if not server.draining:
            server.draining = True
            self.counts["restarts"] += 1
            self._launch()

    def _bury(self, server: _Server) -> None:
        """A fork server is gone or no longer wanted: kill its session, send its jobs elsewhere, replace it."""
        self._selector.unregister(server.control)
        server.control.close()
        self._servers.remove(server)
        _kill_session(server.process)
        for job in list(server.jobs.values()):
            self._leave_flight(job)
            job.server = None
            if job.future.cancelled():
                self._release(job)
            elif job.attempts >= MAX_ATTEMPTS:
                self._lose(job)
            else:
                self.counts["resent"] += 1
                self._queues.setdefault(job.owner, deque()).appendleft(job)
                self._num_queued += 1
        server.jobs.clear()
        if self._closing or server.draining:
            return
        self._failed_starts += server.report is None
        if self._failed_starts >= MAX_FAILED_STARTS:
            self._fail_start("three fork servers in a row died while starting; are Pillow, NumPy and OpenCV installed?")
            return
        self.counts["restarts"] += 1
        self._launch()

    def _fail_start(self, why: str) -> None:
        if not self._ready.done():
            self._ready.set_exception(SandboxError(why))
        for queue in self._queues.values():
            for job in queue:
                self._lose(job)
        self._queues.clear()
        self._num_queued = 0

    def _watch(self) -> None:
        """Kill fork servers that do not answer."""
        now = time.monotonic()
        while self._deadlines and self._deadlines[0][0] <= now:
            _, number = heapq.heappop(self._deadlines)
            job = self._in_flight.get(number)
            if job is not None and job.server is not None and job.server in self._servers:
                log.warning("a fork server did not answer %.0f s after a deadline and is replaced", WATCHDOG_S)
                self._bury(job.server)
        for server in list(self._servers):
            if server.report is None and now - server.started > self.config.start_timeout_s:
                self._bury(server)

    # ---------------------------------------------------------------------------------------- ends
    def _leave_flight(self, job: Job) -> None:
        if self._in_flight.pop(job.id, None) is not None:
            self._bytes -= job.num_bytes

    def _release(self, job: Job) -> None:
        for fd in (job.input_fd, job.output_fd):
            if fd >= 0:
                os.close(fd)
        job.input_fd = job.output_fd = -1

    def _lose(self, job: Job) -> None:
        self.counts["lost"] += 1
        self._release(job)
        with contextlib.suppress(InvalidStateError):  # cancelled
            job.future.set_result(Outcome(-1))

    def _shut_down(self) -> None:
        jobs = [job for what, job in self._inbox if what == "job" and job is not None]
        jobs += [job for queue in self._queues.values() for job in queue] + list(self._in_flight.values())
        for server in self._servers:
            server.control.close()
            _kill_session(server.process)
        self._servers.clear()
        for job in jobs:
            self._lose(job)
        self._queues.clear()
        self._in_flight.clear()
        self._selector.close()
        os.close(self._wake)


def _search_path() -> str:
    """The project and the packages that this process sees; -I drops PYTHONPATH, which may name them."""
    packages = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    return ":".join([*packages, _ROOT])


def _kill_session(process: subprocess.Popen[bytes]) -> None:
    """Kill a fork server and its children (they also die with it) and reap it."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        process.kill()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(5)


def _resident_bytes(pid: int) -> int:
    try:
        with open(f"/proc/{pid}/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * 4096
    except OSError:
        return 0
