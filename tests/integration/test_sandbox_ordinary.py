"""Ordinary snippets work; those that cannot get an error with advice."""

import asyncio
import json
import random
from pathlib import Path

import pytest
from sandbox_samples import general

from cv_lightning.sandbox import Sandbox, SandboxConfig
from cv_lightning.sandbox.cases import test_image as full_image
from cv_lightning.types import SandboxResult, ToolStatus

FILE = Path(__file__).parents[1] / "ordinary_snippets.json"
SNIPPETS = {row["name"]: row["code"] for row in json.loads(FILE.read_text(encoding="utf-8"))["snippets"]}


REFUSED = {"code: thread_pool", "code: tempfile_", "code: oversize_result"}
"""These work in plain Python and not here; the error gives advice."""
GENEROUS = SandboxConfig(plan_tier=False, timeout_s=90.0, cpu_s=30)
"""Generous limits for a busy machine; the test is about what is refused."""


@pytest.mark.parametrize(
    ("config", "sample"),
    [
        pytest.param(GENEROUS, 110, id="sample"),
        pytest.param(GENEROUS, None, id="generous", marks=pytest.mark.slow),
        pytest.param(SandboxConfig(), None, id="default", marks=pytest.mark.slow),
    ],
)
def test_ordinary_snippets_work_as_in_plain_python(config: SandboxConfig, sample: int | None) -> None:
    """Every one of them gives an image in plain Python with the same libraries."""
    assert len(SNIPPETS) >= 299 and len(REFUSED) <= 0.01 * len(SNIPPETS)
    names = list(SNIPPETS) if sample is None else random.Random(6).sample(list(SNIPPETS), sample)

    async def run_all(sandbox: Sandbox) -> list[SandboxResult]:
        return await asyncio.gather(*(sandbox.run(full_image(), SNIPPETS[name], owner=name) for name in names))

    with Sandbox(config) as sandbox:
        results = asyncio.run(run_all(sandbox))
    failed = {name: result.error for name, result in zip(names, results, strict=True) if result.image is None}
    print("ordinary snippets", len(names), "failed", json.dumps(failed, indent=1))
    if config is GENEROUS:
        assert set(failed) <= REFUSED, failed
    assert len(failed) <= max(len(REFUSED), 0.01 * len(SNIPPETS)), failed


def test_saved_images_can_be_opened_again_and_no_file_is_made(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    code = f"image.rotate(90).save({str(path)!r})\nresult = Image.open({str(path)!r})"
    result = general().run_sync(full_image(), code)
    assert result.image is not None and result.image.tobytes() == full_image().rotate(90).tobytes()
    assert not path.exists()
    again = general().run_sync(full_image(), f"result = Image.open({str(path)!r})")
    assert again.status is ToolStatus.ERROR and again.error_kind in ("FileNotFoundError", "PermissionError")


def test_errors_of_saving_are_those_of_pillow() -> None:
    for code, kind in (("image.save('x.nonsense')", "ValueError"), ("image.save('noextension')", "ValueError"),
                       ("image.convert('RGBA').save('x.jpg')", "OSError")):  # fmt: skip
        assert general().run_sync(full_image(), code).error_kind == kind


def test_threads_and_oversize_results_get_a_hint_that_can_be_followed() -> None:
    pool = "from concurrent.futures import ThreadPoolExecutor\nresult = list(ThreadPoolExecutor(2).map(abs, [1]))"
    assert "plain loop" in general().run_sync(full_image(), pool).error
    large = general().run_sync(full_image(), "result = image.crop((0, 0, 4900, 2450))")
    assert large.error_kind == "" or large.status is ToolStatus.OK
    large = general().run_sync(full_image(), "result = image.crop((0, 0, 4900, 4900))")
    assert large.error_kind == "too_large" and "result.resize((4000, 4000))" in large.error
