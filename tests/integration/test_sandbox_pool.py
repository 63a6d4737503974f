"""The pool under load and under kills: fairness, cancellation, limits, restarts, and nothing left over."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import os
import random
import resource
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from PIL import Image
from sandbox_samples import NOISE, general

from cv_lightning.sandbox import Sandbox, SandboxConfig, pool, server, starts
from cv_lightning.sandbox.cases import strays
from cv_lightning.sandbox.config import GENERAL_LAYERS
from cv_lightning.types import SandboxResult, ToolStatus

WAVE = 1000
"""Calls that wait at once in the soak."""
SLEEP = "import time\ntime.sleep({})\nresult = image"


def marked(number: int) -> str:
    """Code whose result tells its number, so that a result that went to another caller is seen."""
    return f"import re\nresult = Image.new('RGB', (8, 8), ({number % 256}, {number // 256 % 256}, {number // 65536}))"


def number_of(image: Image.Image) -> int:
    red, green, blue = image.getpixel((0, 0))  # type: ignore[misc]
    return int(red + 256 * green + 65536 * blue)


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def resident_mb() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def alive(pid: int) -> bool:
    """True if a process exists and is not a zombie."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


@contextlib.contextmanager
def repeatedly(action: Callable[[], None], pause: Callable[[], float]) -> Iterator[None]:
    """Do something again and again in another thread, meanwhile."""
    stop = threading.Event()

    def work() -> None:
        while not stop.wait(pause()):
            action()

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


async def run_all(sandbox: Sandbox, codes: list[str], owners: int = 7) -> list[SandboxResult]:
    return await asyncio.gather(*(sandbox.run(NOISE, code, owner=str(i % owners)) for i, code in enumerate(codes)))


# ------------------------------------------------------------------------------------------------ order and bounds
def test_trajectories_take_turns() -> None:
    finished: list[str] = []

    async def one(sandbox: Sandbox, owner: str) -> None:
        await sandbox.run(NOISE, SLEEP.format(0.01), owner=owner)
        finished.append(owner)

    async def run(sandbox: Sandbox) -> None:
        # One trajectory floods the queue before two others come.
        await asyncio.gather(*(one(sandbox, "flood") for _ in range(24)), one(sandbox, "b"), one(sandbox, "c"))

    with Sandbox(SandboxConfig(plan_tier=False, num_zygotes=1, max_in_flight=1)) as sandbox:
        asyncio.run(run(sandbox))
    assert max(finished.index("b"), finished.index("c")) <= 6, finished


def test_snippets_beyond_the_queue_limit_are_refused_with_the_setting() -> None:
    config = SandboxConfig(plan_tier=False, num_zygotes=1, max_in_flight=1, max_queue=3)
    with Sandbox(config) as sandbox:
        results = asyncio.run(run_all(sandbox, [SLEEP.format(0.2)] * 8))
    counts = Counter(result.status for result in results)
    assert counts[ToolStatus.INFRASTRUCTURE_ERROR] >= 3 and counts[ToolStatus.OK] >= 4 and sum(counts.values()) == 8
    assert all("max_queue" in result.error for result in results if result.status is ToolStatus.INFRASTRUCTURE_ERROR)


def test_bytes_in_flight_are_bounded_but_one_large_image_runs() -> None:
    large = Image.new("RGB", (2000, 1000))
    config = SandboxConfig(plan_tier=False, max_in_flight=4, max_in_flight_mb=1.0)
    seen: list[float] = []
    with Sandbox(config) as sandbox, repeatedly(lambda: seen.append(sandbox.stats["in_flight"]), lambda: 0.005):

        async def run() -> list[SandboxResult]:
            jobs = (sandbox.run(large, SLEEP.format(0.05), owner=str(i)) for i in range(4))
            return await asyncio.gather(*jobs)

        results = asyncio.run(run())
    assert [result.status for result in results] == [ToolStatus.OK] * 4 and max(seen) == 1


def test_a_long_queue_uses_neither_files_nor_memory() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    image = Image.new("RGB", (1000, 1000))
    with Sandbox(SandboxConfig(plan_tier=False)) as sandbox:
        before, most = resident_mb(), [0]

        async def run() -> list[SandboxResult]:
            jobs = (sandbox.run(image, marked(i), owner=str(i)) for i in range(200))
            return await asyncio.gather(*jobs)

        resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, open_files() + 60), hard))
        try:
            with repeatedly(lambda: most.append(open_files()), lambda: 0.02):
                results = asyncio.run(run())
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert [number_of(r.image) if r.image is not None else r for r in results] == list(range(200))
        assert resident_mb() - before < 150  # 200 inputs are 800 MB


def test_cancelling_at_any_moment_leaves_nothing_open() -> None:
    sandbox = general()
    rng = random.Random(1)

    async def run() -> None:
        for _ in range(30):
            task = asyncio.create_task(sandbox.run(NOISE, "import re\nresult = image"))
            await asyncio.sleep(rng.uniform(0.0, 0.015))
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    asyncio.run(run())
    assert sandbox.run_sync(NOISE, "import re\nresult = image").status is ToolStatus.OK
    gc.collect()
    before = open_files()
    asyncio.run(run())
    assert sandbox.run_sync(NOISE, "import re\nresult = image").status is ToolStatus.OK
    time.sleep(0.2)
    gc.collect()
    assert open_files() <= before


def test_cancelling_kills_the_child_and_takes_waiting_jobs_out() -> None:
    async def run(sandbox: Sandbox) -> float:
        tasks = [asyncio.create_task(sandbox.run(NOISE, "while True: pass", owner=str(i))) for i in range(6)]
        await asyncio.sleep(0.4)
        for task in tasks:
            task.cancel()
        begun = time.monotonic()
        result = await sandbox.run(NOISE, "import re\nresult = image", owner="b")
        assert result.status is ToolStatus.OK
        return time.monotonic() - begun

    sandbox = general()
    assert asyncio.run(run(sandbox)) < 1.0
    time.sleep(0.1)
    assert sandbox.stats["in_flight"] == 0 and sandbox.stats["queued"] == 0


# ------------------------------------------------------------------------------------------------ kills
def test_a_job_is_resent_when_its_fork_server_dies_and_lost_after_too_many_deaths() -> None:
    with Sandbox(SandboxConfig(plan_tier=False, num_zygotes=1, timeout_s=20)) as sandbox:

        def kill_when_busy() -> None:
            if sandbox.stats["in_flight"]:
                for pid in sandbox.server_pids():
                    os.kill(pid, signal.SIGKILL)

        before = sandbox.stats
        with repeatedly(kill_when_busy, lambda: 0.05):
            result = sandbox.run_sync(NOISE, SLEEP.format(10))
        assert result.status is ToolStatus.INFRASTRUCTURE_ERROR
        runs = pool.MAX_ATTEMPTS // (1 + pool.ATTEMPTS_OF_A_DEATH)
        assert sandbox.stats["resent"] - before["resent"] == runs - 1
        assert sandbox.stats["lost"] - before["lost"] == 1 and "its fork server died" in result.error
        assert sandbox.run_sync(NOISE, "import re\nresult = image").status is ToolStatus.OK


def test_a_fork_server_that_stops_answering_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "WATCHDOG_S", 0.5)
    with Sandbox(SandboxConfig(plan_tier=False, num_zygotes=1, timeout_s=0.3)) as sandbox:
        os.kill(sandbox.server_pids()[0], signal.SIGSTOP)
        result = sandbox.run_sync(NOISE, marked(77))
        assert result.image is not None and number_of(result.image) == 77 and sandbox.stats["resent"] == 1


def test_fork_servers_are_replaced_after_their_number_of_jobs() -> None:
    with Sandbox(SandboxConfig(plan_tier=False, num_zygotes=1, jobs_per_zygote=40)) as sandbox:
        first = sandbox.server_pids()
        results = asyncio.run(run_all(sandbox, [marked(i) for i in range(100)]))
        assert [number_of(r.image) for r in results if r.image is not None] == list(range(100))
        assert sandbox.stats["restarts"] >= 2 and not any(map(alive, first))
        assert sandbox.stats["resent"] == 0 and sandbox.stats["lost"] == 0


def test_a_fork_server_that_grows_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "GROWTH_CHECK_JOBS", 30)
    sizes = iter(range(0, 10**12, 300_000_000))  # 300 MB more each time that a server is asked; the limit is 200
    monkeypatch.setattr(server.Server, "resident_bytes", lambda _: next(sizes))
    with Sandbox(SandboxConfig(plan_tier=False, num_zygotes=1)) as sandbox:
        results = asyncio.run(run_all(sandbox, [marked(i) for i in range(40)]))
        assert all(result.status is ToolStatus.OK for result in results) and sandbox.stats["restarts"] >= 1


def test_every_fourth_child_killed_at_a_random_moment() -> None:
    rng = random.Random(4)
    with Sandbox(SandboxConfig(plan_tier=False)) as sandbox:

        def kill_some() -> None:
            for pid in sandbox.child_pids():
                if rng.random() < 0.25:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)

        with repeatedly(kill_some, lambda: rng.uniform(0.0, 0.02)):
            results = asyncio.run(run_all(sandbox, [marked(i) for i in range(120)]))
        for number, result in enumerate(results):
            # A child killed from outside is not its snippet's failure; each caller gets its own result.
            assert result.status in (ToolStatus.OK, ToolStatus.INFRASTRUCTURE_ERROR), result
            assert result.image is None or number_of(result.image) == number
        assert sum(result.status is ToolStatus.OK for result in results) > 30
        assert sandbox.stats["restarts"] == 0
        calm = asyncio.run(run_all(sandbox, [marked(i) for i in range(10)]))
        assert all(result.status is ToolStatus.OK for result in calm)


@pytest.mark.parametrize("number", [150, pytest.param(5000, marks=pytest.mark.slow)])
def test_redteam_no_call_is_lost_or_doubled_when_servers_and_children_are_killed(number: int) -> None:
    rng = random.Random(number)
    kills, goal = Counter[str](), 0.0
    with Sandbox(SandboxConfig(plan_tier=False, num_zygotes=2, timeout_s=60)) as sandbox:

        def kill_one() -> None:
            nonlocal goal
            # One kill for one or two finished calls, so that the load of the machine decides nothing.
            if sandbox.stats["process"] < goal:
                return
            goal = sandbox.stats["process"] + rng.choice([1, 2])
            servers = sandbox.server_pids()
            # Servers that have not finished starting are targets, too.
            is_server = sum(kills.values()) % 20 == 10
            what, pids = ("server", servers) if is_server else ("child", sandbox.child_pids())
            if pids:
                kills[what] += 1
                with contextlib.suppress(ProcessLookupError):
                    os.kill(rng.choice(pids), rng.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM]))

        with repeatedly(kill_one, lambda: rng.uniform(0.0, 0.03)):
            told: list[int | ToolStatus] = []
            for first in range(0, number, WAVE):
                codes = [marked(i) for i in range(first, min(number, first + WAVE))]
                for result in asyncio.run(run_all(sandbox, codes)):
                    told.append(number_of(result.image) if result.image is not None else result.status)
        print("kills", dict(kills), "resent", sandbox.stats["resent"], "restarts", sandbox.stats["restarts"])
        assert all(sandbox.layers[name].startswith("active") for name in GENERAL_LAYERS), sandbox.layers
        wrong = {place: got for place, got in enumerate(told) if got != place}
        assert not wrong and len(told) == number, wrong
        assert sandbox.stats["lost"] == 0
        assert kills["child"] >= number / 5 and kills["server"] and strays(sandbox) == []


@pytest.mark.parametrize("how", ["", "import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\n"])
def test_redteam_the_cpu_limit_is_the_snippets_failure_however_busy_the_machine(how: str) -> None:
    with Sandbox(SandboxConfig(plan_tier=False, num_zygotes=1, max_in_flight=2, timeout_s=60, cpu_s=1)) as sandbox:
        results = asyncio.run(run_all(sandbox, [how + f"x = {i}\nwhile True: pass" for i in range(2)]))
        assert [result.status for result in results] == [ToolStatus.TIMEOUT] * 2, results
        assert sandbox.stats["resent"] == 0 and sandbox.stats["lost"] == 0


def test_redteam_a_kill_near_the_cpu_limit_is_not_the_snippets_failure() -> None:
    with Sandbox(SandboxConfig(plan_tier=False, num_zygotes=1, timeout_s=60, cpu_s=2)) as sandbox:

        def kill_when_used() -> None:
            for pid in sandbox.child_pids():
                with contextlib.suppress(OSError):
                    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                    if sum(map(int, fields[11:13])) >= 1.2 * os.sysconf("SC_CLK_TCK") and not killed:
                        os.kill(pid, signal.SIGKILL)
                        killed.append(pid)

        killed: list[int] = []
        with repeatedly(kill_when_used, lambda: 0.01):
            result = sandbox.run_sync(NOISE, "import time\nwhile time.process_time() < 1.4: pass\nresult = image")
        assert killed and result.status is ToolStatus.OK and sandbox.stats["resent"] == 1, result


MACHINE_CODE = (
    "import ctypes, mmap\nm = mmap.mmap(-1, 4096, prot=7)\nm.write(bytes.fromhex({!r}))\n"
    "ctypes.CFUNCTYPE(ctypes.c_long)(ctypes.addressof(ctypes.c_char.from_buffer(m)))()\nresult = image"
)
ENDS = (
    MACHINE_CODE.format("b825000000bb01000000b909000000cd80c3"),  # kill by the 32-bit ABI
    MACHINE_CODE.format("b83e0000400f05c3"),  # kill by the x32 ABI
    MACHINE_CODE.format("ccc3"),
    MACHINE_CODE.format("0f0bc3"),
    "import os\nos.abort()",
    "import os\nos.kill(os.getpid(), 9)",
    "import signal\nsignal.raise_signal(signal.SIGTERM)",
    "import signal, time\nsignal.setitimer(signal.ITIMER_REAL, 0.05)\ntime.sleep(0.2)",
    "import os, signal\nsignal.signal(signal.SIGXFSZ, signal.SIG_DFL)\nos.ftruncate(4, 1 << 40)",
    "import faulthandler, time\nfaulthandler.dump_traceback_later(0.05, exit=True)\ntime.sleep(0.2)",
)


def test_redteam_no_snippet_can_look_like_one_killed_from_outside() -> None:
    sandbox = general()
    before = sandbox.stats
    for code in ENDS:
        assert sandbox.run_sync(NOISE, code).status in (ToolStatus.KILLED, ToolStatus.ERROR), code
    assert all(sandbox.stats[name] == before[name] for name in ("resent", "lost", "restarts"))


def test_a_deadline_belongs_to_one_attempt(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second attempt is under way when the first one's deadline comes, and ends before its own."""
    monkeypatch.setattr(pool, "WATCHDOG_S", 0.5)
    limit, killed = 6.0, list[int]()
    with Sandbox(SandboxConfig(plan_tier=False, num_zygotes=1, timeout_s=limit)) as sandbox:
        begun = time.monotonic()
        deadline = begun + limit + pool.WATCHDOG_S

        def kill_in_time() -> None:
            # The oldest child runs the snippet; a spare that is killed costs another attempt.
            if time.monotonic() > begun + 3.5 and not killed and (pids := sandbox.child_pids()):
                os.kill(pids[0], signal.SIGKILL)
                killed.append(pids[0])

        # It ends by the clock and not after so many seconds: the first attempt cannot, however slow the machine is.
        code = f"import time\ntime.sleep(max(0, {deadline + 1.0} - time.monotonic()))\nresult = image"
        with repeatedly(kill_in_time, lambda: 0.02):
            result = sandbox.run_sync(NOISE, code)
        assert killed and result.status is ToolStatus.OK and time.monotonic() > deadline, result
        assert sandbox.stats["resent"] == 1 and sandbox.stats["restarts"] == 0


def test_a_killed_child_is_resent_and_one_that_used_the_memory_itself_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = iter([7, 7, 8, 9, 9])
    monkeypatch.setattr(starts, "_out_of_memory_kills", lambda: next(counts))
    evidence = starts.KillEvidence(memory_mb=1000)
    much, little = 900 << 20, 20 << 20
    assert evidence.is_from_outside(signal.SIGKILL, much)  # no kill by the kernel: an operator
    assert not evidence.is_from_outside(signal.SIGKILL, much)  # memory ran out, and it had taken it
    assert evidence.is_from_outside(signal.SIGKILL, little)  # memory ran out for something else
    assert evidence.is_from_outside(signal.SIGTERM, little)
    for own in (
        signal.SIGSEGV,
        signal.SIGBUS,
        signal.SIGABRT,
        signal.SIGFPE,
        signal.SIGXFSZ,
        signal.SIGSYS,
        0,
        97 << 8,
    ):
        assert not evidence.is_from_outside(own, little)


def test_the_pool_recovers_after_many_failed_starts_and_logs_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    boot = "cv_lightning.sandbox.server._BOOT"
    working = server._BOOT
    with Sandbox(SandboxConfig(plan_tier=False, num_zygotes=1, timeout_s=20)) as sandbox:
        monkeypatch.setattr(boot, "raise SystemExit(3)")
        os.kill(sandbox.server_pids()[0], signal.SIGKILL)
        heals = threading.Timer(2.0, lambda: monkeypatch.setattr(boot, working))
        heals.start()
        result = sandbox.run_sync(NOISE, marked(5))
        heals.join()
        assert result.image is not None and number_of(result.image) == 5 and sandbox.stats["lost"] == 0
    text = caplog.text
    assert "died while starting (exit status 3)" in text and "work again" in text


def test_a_fork_server_without_its_filter_runs_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Other programs look for the library of the filter, and those may be killed."""
    boot, working = "cv_lightning.sandbox.server._BOOT", server._BOOT
    with Sandbox(SandboxConfig(plan_tier=False, num_zygotes=1, timeout_s=20)) as sandbox:
        monkeypatch.setattr(boot, "import ctypes.util; ctypes.util.find_library = lambda name: None; " + working)
        os.kill(sandbox.server_pids()[0], signal.SIGKILL)
        heals = threading.Timer(2.0, lambda: monkeypatch.setattr(boot, working))
        heals.start()
        result = sandbox.run_sync(NOISE, "import os\nos.kill(os.getpid(), 0)\nresult = image")
        heals.join()
        assert result.error_kind == "PermissionError", result
        assert sandbox.layers["seccomp"].startswith("active") and sandbox.stats["lost"] == 0
    assert "started without layers that an earlier one had: {'seccomp'" in caplog.text


def test_jobs_are_lost_when_no_server_works_for_long_and_later_ones_run(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    boot, working = "cv_lightning.sandbox.server._BOOT", server._BOOT
    monkeypatch.setattr(pool, "PATIENCE", 0.1)
    monkeypatch.setattr(starts, "LONGEST_PAUSE_S", 0.5)
    with Sandbox(SandboxConfig(plan_tier=False, num_zygotes=1, timeout_s=20, start_timeout_s=20)) as sandbox:
        monkeypatch.setattr(boot, "raise SystemExit(3)")
        os.kill(sandbox.server_pids()[0], signal.SIGKILL)
        lost = sandbox.run_sync(NOISE, marked(5))
        assert lost.status is ToolStatus.INFRASTRUCTURE_ERROR and "no basic fork server has worked" in lost.error
        monkeypatch.setattr(boot, working)
        monkeypatch.setattr(pool, "PATIENCE", 5.0)
        assert sandbox.run_sync(NOISE, marked(6)).status is ToolStatus.OK
    assert "1 snippets lost since the start" in caplog.text


def test_hostile_snippets_do_not_disturb_others_in_parallel() -> None:
    bombs = [
        "x = [bytearray(1 << 24) for _ in range(1000)]",
        "while True: pass",
        "import ctypes\nctypes.string_at(0)",
        "for i in range(10**6): np.zeros((1 << 20,)).fill(1); print('x' * 10000)",
        "import os\nos.write(4, b'x' * (1 << 27))",
        "result = Image.new('RGB', (60000, 60000))",
    ]
    codes = [bombs[i % len(bombs)] if i % 2 else marked(i) for i in range(24)]
    with Sandbox(SandboxConfig(plan_tier=False, timeout_s=1.0, cpu_s=1, max_in_flight=6)) as sandbox:
        results = asyncio.run(run_all(sandbox, codes))
        for number, result in enumerate(results):
            if number % 2:
                assert result.image is None and result.status is not ToolStatus.INFRASTRUCTURE_ERROR
            else:
                assert result.image is not None and number_of(result.image) == number, result
        assert sandbox.stats["restarts"] == 0 and strays(sandbox) == []


@pytest.mark.parametrize("number", [200, pytest.param(10_000, marks=pytest.mark.slow)])
def test_no_job_is_lost_or_doubled_when_fork_servers_die(number: int) -> None:
    rng = random.Random(number)
    general()  # so that its descriptors do not count below
    gc.collect()
    files, started = open_files(), time.monotonic()
    kills = 0
    with Sandbox(SandboxConfig(plan_tier=False, num_zygotes=2)) as sandbox:
        asyncio.run(run_all(sandbox, [marked(i) for i in range(20)]))
        memory, servers = resident_mb(), set(sandbox.server_pids())

        def kill_one() -> None:
            nonlocal kills
            pids = sandbox.server_pids()
            servers.update(pids)
            if len(pids) > 1:
                kills += 1
                os.kill(rng.choice(pids), signal.SIGKILL)

        # Enough pause between kills that no job meets many deaths and servers can start.
        with repeatedly(kill_one, lambda: rng.uniform(0.5, 1.0) + (2.0 if number > 1000 else 0.0)):
            told: list[int | ToolStatus] = []
            for first in range(0, number, WAVE):
                codes = [marked(i) for i in range(first, min(number, first + WAVE))]
                for result in asyncio.run(run_all(sandbox, codes)):
                    told.append(number_of(result.image) if result.image is not None else result.status)
        assert told == list(range(number))
        gc.collect()
        grown = resident_mb() - memory
        stats = sandbox.stats
        assert kills and stats["restarts"] >= kills - 1 and stats["lost"] == 0
        assert strays(sandbox) == []
        children = sandbox.child_pids()
    gc.collect()
    time.sleep(0.2)
    left = [pid for pid in (*servers, *children) if alive(pid)]
    figures = {"calls": number, "kills": kills, "resent": stats["resent"], "seconds": time.monotonic() - started,
               "grown_mb": grown, "files_left": open_files() - files, "processes_left": len(left)}  # fmt: skip
    print("soak", json.dumps(figures))
    assert not left and figures["files_left"] <= 0
    assert grown < 30, figures
