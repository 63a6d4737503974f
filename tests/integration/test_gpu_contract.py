"""The GPU stack without a GPU: vLLM's pinned GPU build by its source, the pins, and that they still resolve."""

from __future__ import annotations

import importlib.util
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from gpu_wheel import CORE, LLM, SAMPLING, Source, download_wheel, pinned_version, problems

from cv_lightning.engines import EngineConfig
from cv_lightning.engines.vllm import _arguments
from cv_lightning.models.adapters.qwen3_vl import Qwen3VLAdapter

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel() -> Path:
    found = download_wheel()
    if isinstance(found, str):
        pytest.skip(found)
    return found


@pytest.fixture
def arguments(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Names that `vllm.LLM` is given on a GPU, and those of the CPU build."""
    adapter, config = Qwen3VLAdapter(), EngineConfig(async_scheduling=False)
    size = {"shortest_edge": 1, "longest_edge": 10**6}
    adapter.processor = SimpleNamespace(image_processor=SimpleNamespace(size=size))  # type: ignore[assignment]
    names: set[str] = set()
    for on_gpu in (True, False):
        monkeypatch.setattr(torch.cuda, "is_available", lambda on_gpu=on_gpu: on_gpu)
        names |= set(_arguments("folder", config, adapter, "bfloat16", 0, 2, sleeps=on_gpu))
    return names


def test_the_installed_vllm_has_what_the_engine_relies_on(arguments: set[str]) -> None:
    spec = importlib.util.find_spec("vllm")
    assert spec is not None and spec.origin is not None
    assert problems(Source(Path(spec.origin).parent), arguments) == []


@pytest.mark.slow
def test_the_pinned_gpu_build_has_what_the_engine_relies_on(wheel: Path, arguments: set[str]) -> None:
    assert pinned_version() in wheel.name
    assert problems(Source(wheel), arguments) == []


@pytest.mark.parametrize(
    ("file", "change", "said"),
    [
        (LLM, lambda text: text.replace("def reset_prefix_cache", "def reset_cache"), "no LLM.reset_prefix_cache"),
        (CORE, lambda text: text.replace("self.batch_queue", "self.batches"), "EngineCore has no batch_queue"),
        (SAMPLING, lambda text: text.replace("repetition_penalty: float = 1.0", "repetition_penalty: float = 1.1"),
         "repetition_penalty is 1.1"),
        ("config/vllm.py", lambda text: text.replace("async_scheduling = True", "async_scheduling = False"),
         "async scheduling is not on by default"),
        ("model_executor/models/qwen2_5_vl.py",
         lambda text: text.replace("        self.config = config\n", "        self.seen = torch.zeros(8)\n", 1),
         "seen is a tensor that sleep level 2 loses"),
    ],
)  # fmt: skip
def test_a_changed_vllm_is_noticed(arguments: set[str], file: str, change: Callable[[str], str], said: str) -> None:
    spec = importlib.util.find_spec("vllm")
    assert spec is not None and spec.origin is not None
    found = problems(Source(Path(spec.origin).parent, {file: change}), arguments | {"no_such_argument"})
    assert any(said in line for line in found), found
    assert "vllm.LLM: no argument no_such_argument" in found


@pytest.mark.slow
def test_both_extras_still_resolve_to_the_locked_versions() -> None:
    command = ["bash", "scripts/lock.sh", "--check"]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ}, capture_output=True, text=True, timeout=600, check=False
    )
    if done.returncode == 3:
        pytest.skip(done.stderr.strip()[-300:])
    assert done.returncode == 0, done.stdout + done.stderr
