"""Measures the sandbox beside its floor: fork and exit of a preloaded process, memfd in and out, the bare operation."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from cv_lightning.sandbox import Sandbox, SandboxConfig, plan
from cv_lightning.types import ToolStatus

CROP, ROTATE = "result = image.crop((10, 10, 500, 400))", "result = image.rotate(90, expand=True)"
OPERATIONS = {
    CROP: lambda image: image.crop((10, 10, 500, 400)),
    ROTATE: lambda image: image.rotate(90, expand=True),
}
Times = list[float]


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


def floor_call(image: Image.Image, code: str) -> None:
    """One call of the floor: pixels in by memfd, a fork that exits, the bare operation, pixels out by memfd."""
    fd = os.memfd_create("in")
    os.write(fd, image.tobytes())
    data = os.pread(fd, os.fstat(fd).st_size, 0)
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    result = OPERATIONS[code](Image.frombytes("RGB", image.size, data))
    os.ftruncate(fd, 0)
    os.pwrite(fd, result.tobytes(), 0)
    Image.frombytes("RGB", result.size, os.pread(fd, os.fstat(fd).st_size, 0))
    os.close(fd)


def _floor_loop(arguments: tuple[str, int]) -> tuple[float, Times]:
    from cv_lightning.sandbox import zygote

    zygote.load_libraries()
    image = make_image()
    floor_call(image, arguments[0])
    begun = time.perf_counter()
    times = timed(lambda: floor_call(image, arguments[0]), arguments[1])
    return arguments[1] / (time.perf_counter() - begun), times


def _pool_call(arguments: tuple[bytes, tuple[int, int], str]) -> tuple[bytes, tuple[int, int]]:
    result = OPERATIONS[arguments[2]](Image.frombytes("RGB", arguments[1], arguments[0]))
    return result.tobytes(), result.size


def general(image: Image.Image, number: int) -> dict[str, float]:
    """The general tier beside the floor, a thread of the caller and a warm pool of processes."""
    figures: dict[str, float] = {}
    context = get_context("spawn")
    with (
        Sandbox(SandboxConfig(plan_tier=False, num_zygotes=2)) as sandbox,
        context.Pool(2) as pool,
        ThreadPoolExecutor(2) as threads,
    ):
        for name, code in (("crop", CROP), ("rotate", ROTATE)):
            floor = pool.apply(_floor_loop, ((code, number),))[1]
            ours = timed(lambda code=code: sandbox.run_sync(image, code), number)
            both = sum(rate for rate, _ in pool.map(_floor_loop, [(code, number)] * 2, chunksize=1))
            begun = time.perf_counter()
            list(threads.map(lambda _, code=code: sandbox.run_sync(image, code), range(2 * number)))
            rate = 2 * number / (time.perf_counter() - begun)
            thread = timed(lambda code=code: threads.submit(OPERATIONS[code], image).result(), number)
            warm = timed(lambda code=code: pool.apply(_pool_call, ((image.tobytes(), image.size, code),)), 20)
            base = statistics.median(floor)
            figures |= {
                f"{name}_floor_ms": base,
                f"{name}_ms": statistics.median(ours),
                f"{name}_over_floor": statistics.median(ours) / base,
                f"{name}_p99_over_floor": quantile(ours, 0.99) / base,
                f"{name}_calls_per_s": rate,
                f"{name}_throughput_over_floor": rate / both,
                f"{name}_thread_ms": statistics.median(thread),
                f"{name}_warm_pool_ms": statistics.median(warm),
            }
        figures["overrun_p99_ms"] = overrun(image)
    figures["throughput_over_floor"] = min(
        figures["crop_throughput_over_floor"], figures["rotate_throughput_over_floor"]
    )
    return figures


def overrun(image: Image.Image) -> float:
    """Milliseconds past the deadline, p99, while other jobs load every core."""
    with (
        Sandbox(SandboxConfig(plan_tier=False, timeout_s=0.3, num_zygotes=2)) as sandbox,
        ThreadPoolExecutor(4) as threads,
    ):
        results = list(threads.map(lambda _: sandbox.run_sync(image, "while True: pass"), range(24)))
    late = [1000 * (result.elapsed_s - 0.3) for result in results if result.status is ToolStatus.TIMEOUT]
    return quantile(late, 0.99)


def layers_cost(image: Image.Image, number: int) -> float:
    """Median with all layers over that with none; the two take turns."""
    off = SandboxConfig(plan_tier=False, allow_unsafe=True, disabled_layers=("landlock", "seccomp", "rlimits", "uid"))
    bare, sealed = Sandbox(off), Sandbox(SandboxConfig(plan_tier=False))
    with sealed, bare:
        pairs = [
            (timed(lambda: sealed.run_sync(image, ROTATE), 1)[0], timed(lambda: bare.run_sync(image, ROTATE), 1)[0])
            for _ in range(number)
        ]
    return statistics.median(a for a, _ in pairs) / statistics.median(b for _, b in pairs)


def plans(image: Image.Image, number: int) -> dict[str, float]:
    """The plan tier and the bare operation."""
    config = SandboxConfig()
    crop = timed(lambda: plan.run(image, CROP, config), number)
    rotate = timed(lambda: plan.run(image, ROTATE, config), number)
    bare = timed(lambda: OPERATIONS[ROTATE](image), number)
    return {
        "plan_crop_ms": statistics.median(crop),
        "plan_rotate_over_op": statistics.median(rotate) / statistics.median(bare),
    }


def main() -> None:
    """Entry."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", help="file for the figures")
    parser.add_argument("--number", type=int, default=60, help="calls by figure")
    parser.add_argument("--snippets", help="golden/transforms file for plan_share")
    options = parser.parse_args()
    image = make_image()
    figures = (
        plans(image, options.number)
        | general(image, options.number)
        | {"layers_cost": layers_cost(image, options.number)}
    )
    if options.snippets:
        cases = [case["code"] for case in json.loads(Path(options.snippets).read_text())["cases"] if case["code"]]
        taken = [plan.run(Image.new("RGB", (400, 300)), code, SandboxConfig()) is not None for code in cases]
        figures["plan_share"] = sum(taken) / len(taken)
    for name, value in figures.items():
        print(f"{name:32} {value:.3f}")
    if options.json:
        Path(options.json).write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
