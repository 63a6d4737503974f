"""Measures the sandbox beside its floor: fork and exit of the same process, memfd in and out, the bare operation.

    python scripts/bench/sandbox.py --json FILE

Prints one figure a line and writes them as JSON. Ours and the floor take turns, so that both see the same load.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import mmap
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context
from multiprocessing.pool import Pool as ProcessPool
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from cv_lightning.sandbox import Sandbox, SandboxConfig, plan  # noqa: E402
from cv_lightning.sandbox.child import load_input  # noqa: E402
from cv_lightning.sandbox.heap import TUNABLES  # noqa: E402
from cv_lightning.sandbox.sandbox import sealed_pixels  # noqa: E402
from cv_lightning.types import ToolStatus  # noqa: E402

CROP, ROTATE = "result = image.crop((10, 10, 500, 400))", "result = image.rotate(90, expand=True)"
OPERATIONS: dict[str, Callable[[Image.Image], Image.Image]] = {
    CROP: lambda image: image.crop((10, 10, 500, 400)),
    ROTATE: lambda image: image.rotate(90, expand=True),
}
PLAIN_KINDS = (
    "rotate_literal transpose_old transpose_new imageops crop_literal crop_variable crop_size crop_resize enhance "
    "filter tone_and_geometry"
).split()
SNIPPETS = ROOT / "tests/golden/transforms.public.json"
SLEEPER = """
import json, select, sys, time
late = []
while not select.select([sys.stdin], [], [], 0)[0]:
    begun = time.perf_counter()
    time.sleep(0.1)
    late.append(1000 * (time.perf_counter() - begun - 0.1))
print(json.dumps(late))
"""
BLOCK = 10
Times = list[float]
Figures = dict[str, float]


def make_image() -> Image.Image:
    """1024x1024 RGB noise."""
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (1024, 1024, 3), dtype=np.uint8))


def timed(function: Callable[[], object], number: int) -> Times:
    """Milliseconds of each of `number` calls."""
    times = []
    for _ in range(number):
        begun = time.perf_counter()
        function()
        times.append(1000 * (time.perf_counter() - begun))
    return times


def quantile(times: Times, share: float) -> float:
    """A quantile of the times."""
    return sorted(times)[min(len(times) - 1, int(share * len(times)))]


# ------------------------------------------------------------------------------------------------ the floor
def prepare_floor() -> None:
    """Load in a floor's process what a fork server loads."""
    from cv_lightning.sandbox import zygote

    zygote.load_libraries(science=False)


def floor_call(image: Image.Image, code: str) -> None:
    """One call of the floor: pixels in by memfd, a fork that exits, the bare operation, pixels out by memfd.

    With the sandbox's own ways to write and map pixels, which are the fastest known here.
    """
    given = sealed_pixels(image)
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    result = OPERATIONS[code](load_input(given, *image.size))
    made = sealed_pixels(result)
    with (
        mmap.mmap(made, os.fstat(made).st_size, mmap.MAP_PRIVATE, mmap.PROT_READ) as mapped,
        memoryview(mapped) as view,
    ):
        Image.frombytes("RGB", result.size, view, "raw", "RGBX")
    os.close(given)
    os.close(made)


def floor_times(arguments: tuple[str, int]) -> Times:
    """Milliseconds of a number of floor calls, after one to warm up."""
    image = make_image()
    floor_call(image, arguments[0])
    return timed(lambda: floor_call(image, arguments[0]), arguments[1])


def pool_call(arguments: tuple[bytes, tuple[int, int], str]) -> tuple[bytes, tuple[int, int]]:
    """What a warm process pool does for a call: pixels by pipe."""
    result = OPERATIONS[arguments[2]](Image.frombytes("RGB", arguments[1], arguments[0]))
    return result.tobytes(), result.size


# ------------------------------------------------------------------------------------------------ children
def general(image: Image.Image, number: int) -> Figures:
    """Snippets in a child beside the floor, a thread of the caller and a warm pool of processes."""
    figures: Figures = {}
    # For the floor's processes, which inherit it: the allocator of a fork server. In this one it comes too late.
    os.environ["GLIBC_TUNABLES"] = TUNABLES
    with (
        Sandbox(SandboxConfig(plan_tier=False)) as sandbox,
        get_context("spawn").Pool(2, prepare_floor) as processes,
        ThreadPoolExecutor(2) as threads,
    ):
        for name, code in (("crop", CROP), ("rotate", ROTATE)):
            figures |= latency(name, code, sandbox, image, processes, number)
            figures |= throughput(name, code, sandbox, image, processes, threads, number)
            thread = timed(lambda code=code: threads.submit(OPERATIONS[code], image).result(), number)
            task = (image.tobytes(), image.size, code)
            warm = timed(lambda task=task: processes.apply(pool_call, (task,)), BLOCK)
            figures |= {f"{name}_thread_ms": statistics.median(thread), f"{name}_warm_pool_ms": statistics.median(warm)}
        figures["child_private_mb"] = child_private_mb(sandbox, image)
    ratios = (figures["crop_throughput_over_floor"], figures["rotate_throughput_over_floor"])
    return figures | {"throughput_over_floor": min(ratios)}


def latency(name: str, code: str, sandbox: Sandbox, image: Image.Image, processes: ProcessPool, number: int) -> Figures:
    """One call after the other, ours and the floor's in turn."""
    floor: Times = []
    ours: Times = []
    sandbox.run_sync(image, code)
    for _ in range(max(1, number // BLOCK)):
        floor += processes.apply(floor_times, ((code, BLOCK),))
        ours += timed(lambda: sandbox.run_sync(image, code), BLOCK)
    base = statistics.median(floor)
    return {
        f"{name}_floor_ms": base,
        f"{name}_ms": statistics.median(ours),
        f"{name}_over_floor": statistics.median(ours) / base,
        f"{name}_p99_over_floor": quantile(ours, 0.99) / base,
    }


def throughput(
    name: str,
    code: str,
    sandbox: Sandbox,
    image: Image.Image,
    processes: ProcessPool,
    threads: ThreadPoolExecutor,
    number: int,
) -> Figures:
    """Calls a second with two callers, beside two floors at once; in turn."""
    ours_s, floor_s, calls = 0.0, 0.0, 0
    for _ in range(max(1, number // (2 * BLOCK))):
        both = processes.map(floor_times, [(code, 2 * BLOCK)] * 2, chunksize=1)
        floor_s += max(sum(times) for times in both) / 1000
        begun = time.perf_counter()
        list(threads.map(lambda _: sandbox.run_sync(image, code), range(4 * BLOCK)))
        ours_s += time.perf_counter() - begun
        calls += 4 * BLOCK
    return {
        f"{name}_calls_per_s": calls / ours_s,
        f"{name}_floor_calls_per_s": calls / floor_s,
        f"{name}_throughput_over_floor": floor_s / ours_s,
    }


def child_private_mb(sandbox: Sandbox, image: Image.Image) -> float:
    """Most memory that a child had for itself while it turned the image, in MB (needs leave to read its /proc)."""
    peak = 0
    with ThreadPoolExecutor(1) as threads:
        running = threads.submit(sandbox.run_sync, image, ROTATE + "\nimport time\ntime.sleep(0.5)")
        while not running.done():
            for pid in sandbox.child_pids():
                peak = max(peak, private_bytes(pid))
            time.sleep(0.01)
    return peak / 1e6 if peak else float("nan")


def private_bytes(pid: int) -> int:
    """Private pages of a process in bytes; 0 where they cannot be read."""
    with contextlib.suppress(OSError):
        rows = (line.split() for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:])
        return sum(int(row[1]) * 1024 for row in rows if row[0] in ("Private_Clean:", "Private_Dirty:"))
    return 0


def overrun(image: Image.Image) -> Figures:
    """Milliseconds past the deadline while other callers keep every core busy, beside a process that only sleeps.

    How late that one is woken is what the machine itself adds to any deadline under the same load.
    """
    limit, late = 0.1, []
    with (
        Sandbox(SandboxConfig(plan_tier=False, timeout_s=limit, cpu_s=10)) as sandbox,
        busy(sandbox, image),
        subprocess.Popen([sys.executable, "-c", SLEEPER], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as sleeper,
    ):
        for _ in range(300):
            result = sandbox.run_sync(image, "while True: pass")
            if result.status is ToolStatus.TIMEOUT:
                late.append(1000 * (result.elapsed_s - limit))
        told = json.loads(sleeper.communicate(b"")[0])
    return {
        "overrun_p50_ms": statistics.median(late),
        "overrun_p99_ms": quantile(late, 0.99),
        "sleeper_p99_ms": quantile(told, 0.99),
        "sleeper_max_ms": max(told),
    }


@contextlib.contextmanager
def busy(sandbox: Sandbox, image: Image.Image) -> Iterator[None]:
    """Callers of cheap snippets, one a core, meanwhile."""
    stop = threading.Event()

    def call() -> None:
        while not stop.is_set():
            sandbox.run_sync(image, ROTATE)

    callers = [threading.Thread(target=call) for _ in range(os.cpu_count() or 1)]
    for caller in callers:
        caller.start()
    try:
        yield
    finally:
        stop.set()
        for caller in callers:
            caller.join()


def layers_cost(image: Image.Image, number: int) -> float:
    """Median with all layers over that with none; the two take turns."""
    off = ("landlock", "seccomp", "rlimits", "uid")
    bare = Sandbox(SandboxConfig(plan_tier=False, allow_unsafe=True, disabled_layers=off))
    sealed = Sandbox(SandboxConfig(plan_tier=False))
    with sealed, bare:
        calls = [lambda one=one: one.run_sync(image, ROTATE) for one in (sealed, bare)]
        timed(calls[0], 3), timed(calls[1], 3)
        pairs = [(timed(calls[0], 1)[0], timed(calls[1], 1)[0]) for _ in range(2 * number)]
    return statistics.median(a for a, _ in pairs) / statistics.median(b for _, b in pairs)


# ------------------------------------------------------------------------------------------------ plans
def plans(image: Image.Image, number: int) -> Figures:
    """Plans in the caller beside the bare operation."""
    config = SandboxConfig(plan_budget_ms=1000.0)
    crop = timed(lambda: plan.run(image, CROP, config), number)
    pairs = [
        (timed(lambda: plan.run(image, ROTATE, config), 1)[0], timed(lambda: OPERATIONS[ROTATE](image), 1)[0])
        for _ in range(number)
    ]
    return {
        "plan_crop_ms": statistics.median(crop),
        "plan_rotate_over_op": statistics.median(a for a, _ in pairs) / statistics.median(b for _, b in pairs),
    }


def plan_share(file: Path) -> Figures:
    """Fraction of the snippets of a golden file that are plans: of the plain kinds, and of all."""
    cases = [case for case in json.loads(file.read_text(encoding="utf-8"))["cases"] if case["code"]]

    def share(chosen: list[dict[str, str]]) -> float:
        prepared = [plan.prepare(case["code"], (400, 300)) for case in chosen]
        return sum(one is not None for one in prepared) / len(chosen)

    plain = [case for case in cases if case["kind"] in PLAIN_KINDS]
    return {"plan_share": share(plain), "plan_share_all_kinds": share(cases)}


def main() -> None:
    """Entry."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", help="file for the figures")
    parser.add_argument("--number", type=int, default=100, help="calls by figure")
    parser.add_argument("--snippets", type=Path, default=SNIPPETS, help="golden/transforms file for plan_share")
    options = parser.parse_args()
    image = make_image()
    figures = plans(image, options.number) | general(image, options.number)
    figures |= overrun(image) | {"layers_cost": layers_cost(image, options.number)}
    if options.snippets.exists():
        figures |= plan_share(options.snippets)
    for name, value in figures.items():
        print(f"{name:32} {value:.3f}")
    if options.json:
        Path(options.json).write_text(json.dumps(figures, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
