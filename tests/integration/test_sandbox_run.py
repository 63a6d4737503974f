"""The sandbox with real fork servers and children."""

import asyncio
import json
import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cv_lightning.commands.sandbox import main
from cv_lightning.sandbox import Sandbox, SandboxConfig, plan
from cv_lightning.types import SandboxError, ToolStatus

NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (96, 128, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with Sandbox(SandboxConfig(plan_tier=False, timeout_s=2.0)) as running:
        yield running


def test_packaged_cases_are_contained(capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["--self-test", "--json"])
    shown = json.loads(capsys.readouterr().out)
    assert code == 0 and shown["failed"] == 0 and shown["passed"] > 60, [c for c in shown["cases"] if not c["ok"]]


@pytest.mark.parametrize(
    ("code", "kind"),
    [("result = 'x'", "not_an_image"), ("result = Image.new('L', (5000, 5000))", "too_large"), ("x = 1", "no_result"),
     ("result = np.full((9, 9, 3), np.nan)", "nan"), ("result = np.zeros((0, 9, 3), np.uint8)", "zero_size"),
     ("result = image.resize((400, 1))", "aspect"), ("result = np.zeros((4, 4, 7), np.uint8)", "wrong_mode"), ("x = y", "NameError")],
)  # fmt: skip
def test_bad_results_are_typed_errors(sandbox: Sandbox, code: str, kind: str) -> None:
    result = sandbox.run_sync(NOISE, code)
    assert (result.status, result.error_kind) == (ToolStatus.ERROR, kind) and result.error


def test_refusals(sandbox: Sandbox) -> None:
    assert sandbox.run_sync(NOISE, "x" * 5000).error_kind == "too_long"
    assert sandbox.run_sync(NOISE, None).error_kind == "not_text"  # type: ignore[arg-type]
    assert sandbox.run_sync(None, "x = 1").error_kind == "no_image"  # type: ignore[arg-type]


def test_plan_equals_child(sandbox: Sandbox) -> None:
    rng, taken = random.Random(0), 0
    for _ in range(150):
        lines = ["w, h = image.size"]
        for _ in range(rng.randint(1, 3)):
            x, y = rng.randint(-9, 40), rng.randint(-9, 40)
            step = rng.choice(
                [f"image.crop(({x}, {y}, {x} + {rng.randint(5, 90)}, {y} + h // 2))", f"image.rotate({rng.choice([0, 90, -90, 180, 270, 33])}, expand={rng.random() < 0.5})",
                 f"image.transpose({rng.randrange(7)})", f"image.resize(({rng.randint(9, 99)}, {rng.randint(9, 99)}))", "image.convert('L')",
                 "ImageOps.mirror(image)", f"ImageEnhance.Contrast(image).enhance({rng.uniform(0.2, 2):.2f})"]
            )  # fmt: skip
            lines.append(f"image = {step}")
        code = "\n".join([*lines, "result = image"])
        planned = plan.run(NOISE, code, SandboxConfig())
        if planned is None:
            continue
        taken += 1
        child = sandbox.run_sync(NOISE, code)
        assert child.image is not None and planned.image is not None, (code, child.error)
        assert child.image.size == planned.image.size and child.image.tobytes() == planned.image.tobytes(), code
        assert [(o.name, o.arguments, o.used) for o in child.operations] == [
            (o.name, o.arguments, o.used) for o in planned.operations
        ], code
    assert taken > 100


def test_async_cancellation_kills_the_child(sandbox: Sandbox) -> None:
    async def run() -> float:
        task = asyncio.create_task(sandbox.run(NOISE, "while True: pass", owner="a"))
        await asyncio.sleep(0.3)
        task.cancel()
        begun = time.monotonic()
        result = await sandbox.run(NOISE, "result = image", owner="b")
        assert result.status is ToolStatus.OK
        return time.monotonic() - begun

    assert asyncio.run(run()) < 1.0


@pytest.mark.parametrize("number", [200, pytest.param(10_000, marks=pytest.mark.slow)])
def test_no_job_is_lost_when_fork_servers_die(number: int) -> None:
    files = len(os.listdir("/proc/self/fd"))
    with Sandbox(SandboxConfig(plan_tier=False, num_zygotes=2)) as sandbox:
        stop = threading.Event()

        def kill() -> None:
            while not stop.wait(2.5):
                pool = sandbox._pool
                if pool is not None and len(pool.server_pids) > 1:
                    os.kill(random.choice(pool.server_pids), signal.SIGKILL)

        killer = threading.Thread(target=kill)
        killer.start()

        async def run() -> list[ToolStatus]:
            results = await asyncio.gather(
                *(sandbox.run(NOISE, f"time = {i}\nresult = image", owner=str(i % 7)) for i in range(number))
            )
            return [result.status for result in results]

        statuses = asyncio.run(run())
        stop.set()
        killer.join()
        assert statuses == [ToolStatus.OK] * number
    assert len(os.listdir("/proc/self/fd")) <= files + 2


def test_without_landlock_nothing_can_be_opened() -> None:
    config = SandboxConfig(plan_tier=False, allow_unsafe=True, disabled_layers=("landlock",))
    with Sandbox(config) as sandbox:
        assert "open denied" in sandbox.layers["files"]
        assert sandbox.run_sync(NOISE, "open('/etc/passwd')").error_kind == "PermissionError"
        assert sandbox.run_sync(NOISE, "import re\nresult = cv2.flip(np.array(image), 1)").status is ToolStatus.OK


def test_refuses_to_start_without_a_required_layer() -> None:
    with pytest.raises(ValueError, match="allow_unsafe"):
        Sandbox(SandboxConfig(disabled_layers=("seccomp",)))
    with pytest.raises(SandboxError, match="not started"):
        Sandbox().run_sync(NOISE, "x = 1")


def test_command_runs_one_snippet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "code.py").write_text("result = image.rotate(90, expand=True)")
    NOISE.save(tmp_path / "in.png")
    assert main(["--run", str(tmp_path / "code.py"), str(tmp_path / "in.png"), "-o", str(tmp_path / "out.png")]) == 0
    assert json.loads(capsys.readouterr().out)["core"] == ["rotate_90"]
    assert Image.open(tmp_path / "out.png").size == (96, 128)
