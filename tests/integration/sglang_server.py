"""A real SGLang server on a CPU, where the package is installed (scripts/sglang_environment.sh)."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import httpx
import pytest
from test_server_engine import free_port

KERNELS = Path(__file__).parent / "sglang_kernels"
START_S = 900.0
"""Longest start; 40 s on two idle cores."""
COMMAND = (
    "-m sglang.launch_server --device cpu --attention-backend torch_native --mm-attention-backend sdpa --dtype float32 "
    "--host 127.0.0.1 --max-total-tokens 16384 --context-length 4096 --max-running-requests 16 --skip-server-warmup "
    "--grammar-backend none"
).split()


@cache
def sglang_python() -> str:
    """The interpreter that has SGLang; skips the test if there is none."""
    python = os.environ.get("CVL_SGLANG_PYTHON", sys.executable)
    found = subprocess.run([python, "-c", "import importlib.util as u, sys; sys.exit(not u.find_spec('sglang'))"])
    if found.returncode:
        pytest.skip(f"{python} has no sglang; see scripts/sglang_environment.sh")
    return python


def sglang_environment(**more: str) -> dict[str, str]:
    """Environment variables for `sglang_python`: this project's source and the stand-in for the kernels first."""
    path = os.pathsep.join([str(KERNELS), str(Path(__file__).parents[2])])
    return os.environ | {"SGLANG_USE_CPU_ENGINE": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": path} | more


@contextmanager
def sglang_server(checkpoint: Path, log: Path, *, embedding_cache_mb: int) -> Iterator[str]:
    """The address of a server for a checkpoint."""
    port = free_port()
    command = [sglang_python(), *COMMAND, "--model-path", str(checkpoint), "--port", str(port)]
    environment = sglang_environment(SGLANG_VLM_CACHE_SIZE_MB=str(embedding_cache_mb))
    url = f"http://127.0.0.1:{port}"
    with log.open("wb") as out, subprocess.Popen(command, stdout=out, stderr=out, env=environment) as process:
        try:
            deadline = time.monotonic() + START_S
            while not _is_up(url):
                assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
                time.sleep(1.0)
            yield url
        finally:
            process.terminate()
            process.wait(60)


def _is_up(url: str) -> bool:
    try:
        return httpx.get(f"{url}/model_info", trust_env=False, timeout=10.0).status_code == 200
    except httpx.HTTPError:
        return False
