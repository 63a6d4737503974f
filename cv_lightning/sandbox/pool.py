"""The parent's side of the fork servers: one thread that queues and sends jobs, collects results and replaces servers.

All state belongs to that thread; other threads hand over jobs through a deque and an eventfd. It also starts the fork
servers, because their parent-death signal follows the thread that started them. There are two kinds of server: basic
ones, and one with SciPy and scikit-image, which forks at three times the cost and starts with the first snippet that
names them.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import selectors
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field

from cv_lightning.sandbox.config import SandboxConfig
from cv_lightning.sandbox.fair_queue import FairQueue
from cv_lightning.sandbox.server import Server
from cv_lightning.sandbox.starts import FREE_FAILURES, KillEvidence, Starts
from cv_lightning.sandbox.wire import CANCEL, JOB, PIXEL, REPLY, RUN
from cv_lightning.types import SandboxError

log = logging.getLogger(__name__)

WATCHDOG_S = 2.0
"""A fork server that has not answered this long after a deadline is killed."""
GROWTH_CHECK_JOBS = 256
"""The memory of a fork server is checked after every so many jobs."""
MAX_ATTEMPTS = 16
"""Runs of one job that something else than its snippet may end before the job is lost."""
ATTEMPTS_OF_A_DEATH, ATTEMPTS_OF_A_HANG = 1, 6
"""Further attempts that a run counts for if its fork server died, or hung: the snippet may be the cause. It cannot be
the cause of a killed child."""
PATIENCE = 2.0
"""Jobs are lost if no fork server has worked for this many times `start_timeout_s`."""
UNREAD = 4
"""Most unread results, for each snippet that may run at once."""
SERVERS_OF_SCIENCE = 1
ADVICE = "are Pillow, NumPy and OpenCV installed?"


@dataclass(slots=True)
class ChildResult:
    """How a child ended; the receiver reads the output and closes it."""

    output_fd: int
    """-1: lost, or closed."""
    late: bool = False
    wait_status: int = 0
    elapsed_s: float = 0.0
    when_closed: Callable[[], None] | None = None
    lost: str = ""
    """Why the sandbox could not run the snippet."""

    def close(self) -> None:
        """Close the output; does nothing the second time."""
        fd, self.output_fd = self.output_fd, -1
        if fd >= 0:
            os.close(fd)
            if self.when_closed is not None:
                self.when_closed()


@dataclass(slots=True, eq=False, kw_only=True)
class Job:
    """One snippet that waits or runs."""

    id: int
    owner: str
    size: tuple[int, int]
    seed: bytes
    make_input: Callable[[], int]
    """Makes the sealed memfd of pixels and code; called late, because thousands of jobs may wait."""
    science: bool
    """Needs a server with SciPy and scikit-image."""
    max_shown: int = 0
    """Images that the snippet may show; 0: one result, and no text."""
    future: Future[ChildResult] = field(default_factory=Future)
    input_fd: int = -1
    output_fd: int = -1
    attempts: int = 0
    answer_by: float = 0.0
    """Monotonic time by which the fork server must have answered; every attempt has its own."""
    server: Server | None = None

    @property
    def num_bytes(self) -> int:
        """Bytes of the input's pixels."""
        return PIXEL * self.size[0] * self.size[1]


class Pool:
    """Runs jobs on fork servers. `start`, `submit` and `close` may be called from any thread."""

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
        self._waiting: dict[bool, FairQueue[Job]] = {False: FairQueue(), True: FairQueue()}
        """Waiting jobs by `Job.science`: jobs for the server with SciPy must not delay the others."""
        self._servers: list[Server] = []
        self._in_flight: dict[int, Job] = {}
        self._bytes = 0
        self._starts = {False: Starts("basic"), True: Starts("science")}
        self._wants_science = False
        self._evidence = KillEvidence(config.memory_mb)
        self._ready: Future[None] = Future()
        self._closing = False
        self._lock = threading.Lock()
        self._unfinished = 0
        self._unread = 0
        self._selector = selectors.DefaultSelector()
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._thread = threading.Thread(target=self._main, name="sandbox", daemon=True)

    # ---------------------------------------------------------------------------------------- any thread
    def start(self) -> None:
        """Start the fork servers and wait for the first.

        Raises:
            SandboxError: No server came up.
        """
        self._thread.start()
        limit = self.config.start_timeout_s
        try:
            self._ready.result(limit + 1)
        except TimeoutError:
            raise SandboxError(f"no fork server came up within {limit} s; raise sandbox.start_timeout_s") from None

    def submit(
        self,
        *,
        owner: str,
        size: tuple[int, int],
        seed: bytes,
        make_input: Callable[[], int],
        science: bool,
        max_shown: int = 0,
    ) -> Job:
        """Queue a snippet; the job's future gets a `ChildResult`, and cancelling it kills the child.

        The arguments are the fields of `Job`.
        """
        job = Job(
            id=next(self._ids),
            owner=owner,
            size=size,
            seed=seed,
            make_input=make_input,
            science=science,
            max_shown=max_shown,
        )
        if self._closing or os.getpid() != self.pid:
            job.future.set_exception(SandboxError("the sandbox is closed, or was started before this process forked"))
            return job
        with self._lock:
            self._unfinished += 1
            runs_soon = self._unfinished <= 2 * self.max_in_flight
        if runs_soon:
            # Copy the pixels here and not in the pool's thread, which tries again what fails here.
            with contextlib.suppress(OSError):
                job.input_fd = make_input()
        job.future.add_done_callback(lambda future: self._finished(job, future))
        self._post("job", job)
        return job

    def _was_read(self) -> None:
        with self._lock:
            self._unread -= 1
        self._wake_up()

    def _finished(self, job: Job, future: Future[ChildResult]) -> None:
        with self._lock:
            self._unfinished -= 1
        if future.cancelled():
            self._post("cancel", job)

    def close(self) -> None:
        """Kill everything and wait until it is gone."""
        if os.getpid() != self.pid or not self._thread.is_alive():
            return
        self._closing = True
        self._post("close", None)
        self._thread.join(10)

    def _post(self, what: str, job: Job | None) -> None:
        self._inbox.append((what, job))
        self._wake_up()

    def _wake_up(self) -> None:
        with contextlib.suppress(OSError):  # closed meanwhile
            os.eventfd_write(self._wake, 1)

    @property
    def load(self) -> dict[str, float]:
        """Jobs queued and in flight, fork servers alive."""
        queued = sum(map(len, self._waiting.values()))
        return {"queued": queued, "in_flight": len(self._in_flight), "zygotes": len(self._servers)}

    @property
    def server_pids(self) -> list[int]:
        """Process ids of the fork servers."""
        return [server.process.pid for server in list(self._servers)]

    # ---------------------------------------------------------------------------------------- the thread
    def _main(self) -> None:
        self._selector.register(self._wake, selectors.EVENT_READ, None)
        try:
            self._starts[False].working_at = time.monotonic()
            self._replenish()
            while self._turn():
                pass
        except Exception as error:  # of any kind: callers must not wait forever for this thread
            log.exception("the sandbox's thread failed")
            why = f"the sandbox's thread failed: {error}"
            self._fail_start(why)
            for science in self._waiting:
                self._lose_waiting(science, why)
        finally:
            self._closing = True
            self._shut_down()

    def _turn(self) -> bool:
        """Wait for an event and handle it; False at the end."""
        for key, _ in self._selector.select(self._sleep_s()):
            if key.data is None:
                with contextlib.suppress(BlockingIOError):
                    os.eventfd_read(self._wake)
            elif key.data in self._servers:
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
        self._replenish()
        # The kind with fewer jobs in flight first, so that neither starves the other.
        heavy = sum(job.science for job in self._in_flight.values())
        for science in (False, True) if 2 * heavy >= len(self._in_flight) else (True, False):
            self._dispatch(science)
        return True

    def _sleep_s(self) -> float:
        """Seconds until the next deadline or start, at most 5."""
        now = time.monotonic()
        times = [job.answer_by for job in self._in_flight.values()]
        times += [starts.not_before for starts in self._starts.values() if starts.not_before > now]
        return max(0.0, min([now + 5.0, *times]) - now)

    def _enqueue(self, job: Job) -> None:
        queued = sum(map(len, self._waiting.values()))
        if queued >= self.config.max_queue:
            self._lose(job, f"{queued} snippets wait already (sandbox.max_queue)")
            return
        self._waiting[job.science].push(job.owner, job)
        if job.science and not self._wants_science:
            self._wants_science, self._starts[True].working_at = True, time.monotonic()

    def _cancel(self, job: Job) -> None:
        self.counts["cancelled"] += 1
        if job.server is not None and job.id in self._in_flight:
            job.server.send(JOB.pack(CANCEL, job.id, 0, 0, 0, bytes(16)), [])
        else:  # it is skipped when its turn comes
            self._release(job)

    def _dispatch(self, science: bool) -> None:
        waiting = self._waiting[science]
        # No faster than results are read, because they hold memory, too.
        while waiting and len(self._in_flight) < self.max_in_flight and self._unread < UNREAD * self.max_in_flight:
            ready = [s for s in self._servers if s.report is not None and not s.draining and s.science is science]
            if not ready or (self._in_flight and self._bytes + waiting.peek().num_bytes > self.max_bytes):
                return
            job = waiting.pop()
            if job.future.cancelled():
                self._release(job)
                continue
            self._run_on(min(ready, key=lambda server: len(self._jobs_of(server))), job)

    def _jobs_of(self, server: Server) -> list[Job]:
        return [job for job in self._in_flight.values() if job.server is server]

    def _run_on(self, server: Server, job: Job) -> None:
        try:
            self._open_files(job)
        except OSError as error:
            self._lose(job, f"its image could not be handed over: {error}")
            return
        self.counts["jobs"] += not job.attempts
        job.attempts += 1
        job.server = server
        self._in_flight[job.id] = job
        server.served += 1
        self._bytes += job.num_bytes
        job.answer_by = time.monotonic() + self.config.timeout_s + WATCHDOG_S
        packet = JOB.pack(RUN, job.id, *job.size, job.max_shown, job.seed)
        server.send(packet, [job.input_fd, job.output_fd])
        if server.served >= self.config.jobs_per_zygote and not server.draining:
            self._retire(server)

    def _open_files(self, job: Job) -> None:
        """Open the input and a new, empty output."""
        if job.input_fd < 0:
            job.input_fd = job.make_input()
        if job.output_fd >= 0:
            os.close(job.output_fd)
            job.output_fd = -1
        job.output_fd = os.memfd_create("result", os.MFD_CLOEXEC)

    # ---------------------------------------------------------------------------------------- fork servers
    def _replenish(self) -> None:
        """Start the fork servers that are missing, unless a pause after failed starts is not over."""
        now = time.monotonic()
        wanted = {False: self.num_servers, True: SERVERS_OF_SCIENCE if self._wants_science else 0}
        for science, starts in self._starts.items():
            running = [server for server in self._servers if server.science is science and not server.draining]
            for _ in range(wanted[science] - len(running)):
                if now >= starts.not_before and not self._closing:
                    self._launch(science)

    def _launch(self, science: bool) -> None:
        try:
            server = Server.launch(self.config, science=science)
        except OSError as error:
            self._start_failed(science, f"it cannot be started: {error}")
            return
        self._servers.append(server)
        self._selector.register(server.control, selectors.EVENT_READ, server)

    def _start_failed(self, science: bool, why: str) -> None:
        starts = self._starts[science]
        starts.failed(time.monotonic(), why)
        if starts.failures >= FREE_FAILURES and not science:
            self._fail_start(f"three fork servers in a row died while starting ({why}); {ADVICE}")

    def _read(self, server: Server) -> None:
        packet = server.receive()
        if not packet:
            self._bury(server)
        elif server.report is None:
            self._take_into_use(server, packet)
        else:
            self._collect(server, packet)

    def _take_into_use(self, server: Server, packet: bytes) -> None:
        refused = server.take_report(packet, before=self.report)
        if server.report is None:
            self._bury(server, refused)
            return
        self.report = dict(server.report)
        self._starts[server.science].worked()
        if not self._ready.done():
            self._ready.set_result(None)

    def _collect(self, server: Server, packet: bytes) -> None:
        number, late, status, elapsed, peak_bytes = REPLY.unpack(packet)
        job = self._in_flight.get(number)
        if job is None or job.server is not server:
            return
        self._leave_flight(job)
        sealed = (server.report or {}).get("seccomp", "").startswith("active")
        if sealed and not late and self._evidence.is_from_outside(status, peak_bytes - server.first_bytes):
            self._run_again(job, f"its process was killed from outside (signal {os.WTERMSIG(status)})")
            self._retire_if_due(server)
            return
        self.counts["timeouts"] += bool(late)
        self.counts["killed"] += bool(status and not late)
        outcome = ChildResult(job.output_fd, bool(late), status, elapsed, self._was_read)
        job.output_fd = -1
        self._release(job)
        with self._lock:
            self._unread += 1
        try:
            job.future.set_result(outcome)
        except InvalidStateError:  # cancelled
            outcome.close()
        self._retire_if_due(server)

    def _retire_if_due(self, server: Server) -> None:
        """Replace a fork server that has grown; end one that has finished its last job."""
        if server.served % GROWTH_CHECK_JOBS == 0:
            grown = server.resident_bytes() - server.first_bytes
            if grown > self.config.grown_mb * 1e6:
                self._retire(server)
        if server.draining and not self._jobs_of(server):
            self._bury(server)

    def _retire(self, server: Server) -> None:
        """Stop giving jobs to a fork server and start another; it ends when its jobs are done."""
        if not server.draining:
            server.draining = True
            self.counts["restarts"] += 1

    def _bury(self, server: Server, why: str = "") -> None:
        """Kill the session of a fork server that has died or is not needed, and queue its jobs again."""
        self._selector.unregister(server.control)
        self._servers.remove(server)
        server.kill()
        for job in self._jobs_of(server):
            self._leave_flight(job)
            job.attempts += ATTEMPTS_OF_A_DEATH
            self._run_again(job, "its fork server died")
        if self._closing or server.draining:
            return
        self.counts["restarts"] += 1
        if server.report is None:
            self._start_failed(server.science, why or f"exit status {server.process.returncode}")

    def _run_again(self, job: Job, why: str) -> None:
        """Queue a job whose run was not ended by its snippet before its owner's other jobs."""
        job.server = None
        if job.future.cancelled():
            self._release(job)
        elif job.attempts >= MAX_ATTEMPTS:
            self._lose(job, f"its runs were ended by something else too often; the last time {why}")
        else:
            self.counts["resent"] += 1
            self._waiting[job.science].push(job.owner, job, front=True)

    def _fail_start(self, why: str) -> None:
        if not self._ready.done():
            self._ready.set_exception(SandboxError(why))

    def _lose_waiting(self, science: bool, why: str) -> None:
        for job in self._waiting[science].clear():
            self._lose(job, why)

    def _watch(self) -> None:
        """Kill fork servers that do not answer, and give up waiting jobs while none works."""
        now = time.monotonic()
        for job in list(self._in_flight.values()):
            if job.answer_by <= now and job.server in self._servers:
                log.warning("a fork server did not answer %.0f s after a deadline and is replaced", WATCHDOG_S)
                job.attempts += ATTEMPTS_OF_A_HANG
                self._bury(job.server)
        for server in list(self._servers):
            if server.report is None and now - server.started > self.config.start_timeout_s:
                self._bury(server)
        for science, starts in self._starts.items():
            if any(server.science is science and server.report is not None for server in self._servers):
                starts.working_at = now
            elif self._waiting[science] and now - starts.working_at > PATIENCE * self.config.start_timeout_s:
                self._lose_waiting(
                    science, f"no {starts.kind} fork server has worked for {now - starts.working_at:.0f} s"
                )

    # ---------------------------------------------------------------------------------------- ends
    def _leave_flight(self, job: Job) -> None:
        if self._in_flight.pop(job.id, None) is not None:
            self._bytes -= job.num_bytes

    def _release(self, job: Job) -> None:
        for fd in (job.input_fd, job.output_fd):
            if fd >= 0:
                os.close(fd)
        job.input_fd = job.output_fd = -1

    def _lose(self, job: Job, why: str) -> None:
        self._release(job)
        if job.future.cancelled():
            return
        self.counts["lost"] += 1
        number = self.counts["lost"]
        if number & (number - 1) == 0:  # the first, second, fourth, eighth...
            log.error("sandbox: %d snippets lost since the start; the latest because %s", number, why)
        with contextlib.suppress(InvalidStateError):  # cancelled meanwhile
            job.future.set_result(ChildResult(-1, lost=why))

    def _shut_down(self) -> None:
        jobs = [job for what, job in self._inbox if what == "job" and job is not None]
        jobs += [job for waiting in self._waiting.values() for job in waiting.clear()] + list(self._in_flight.values())
        for server in self._servers:
            server.kill()
        self._servers.clear()
        for job in jobs:
            self._lose(job, "the sandbox was closed")
        self._in_flight.clear()
        self._selector.close()
        os.close(self._wake)
