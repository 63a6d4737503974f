"""Fixtures and switches that several tests share."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

from cv_lightning.environment import prepare_environment

# Before anything imports torch or vLLM.
os.environ.setdefault("OMP_NUM_THREADS", "1")
prepare_environment()

# A shell's background job and nohup ignore these; runs that the tests start would inherit that and heed no signal.
for number, default in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, default)

if TYPE_CHECKING:
    from cv_lightning.agent.dialogue import DialogueEncoder


# The same generated cases in every run; the long runs (--run-slow) draw new ones.
settings.register_profile("same", derandomize=True)
settings.register_profile("new", derandomize=False, print_blob=True)


def pytest_configure(config: pytest.Config) -> None:
    settings.load_profile("new" if config.getoption("--run-slow") else "same")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--run-slow", action="store_true", help="run the tests marked slow too")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip what this machine cannot run (gpu) or was not asked to (slow)."""
    if not config.getoption("--run-slow"):
        _skip(items, "slow", "takes minutes; --run-slow runs it")
    if any("gpu" in item.keywords for item in items):
        import torch

        if not torch.cuda.is_available():
            _skip(items, "gpu", "needs a CUDA device")


def _skip(items: list[pytest.Item], mark: str, reason: str) -> None:
    for item in items:
        if item.get_closest_marker(mark):
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny random-weight Qwen3-VL with the quickstart's tokenizer."""
    from cv_lightning.commands.tiny import TinyCheckpoint, write

    folder = tmp_path_factory.mktemp("tiny")
    write(TinyCheckpoint(out=folder))
    return folder


@pytest.fixture(scope="session")
def encoder(tiny_checkpoint: Path) -> DialogueEncoder:
    """Dialogue encoder of the tiny checkpoint."""
    from cv_lightning.agent.dialogue import DialogueEncoder
    from cv_lightning.models.loading import PolicyConfig, load_adapter

    return DialogueEncoder(load_adapter(PolicyConfig(path=str(tiny_checkpoint))))


@pytest.fixture(scope="session")
def tiny_qwen25(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny random-weight Qwen2.5-VL: tied embeddings as in the 3B, fewer key-value heads than heads, and
    weights large enough that every part shows in its log-probabilities."""
    from cv_lightning.commands.tiny import TinyCheckpoint, write
    from cv_lightning.models.adapters.tiny import TinyModelConfig

    folder = tmp_path_factory.mktemp("qwen25")
    sizes = TinyModelConfig(
        family="qwen2_5_vl",
        num_layers=2,
        num_key_value_heads=2,
        vision_depth=3,
        min_tokens=4,
        max_tokens=24,
        tie_embeddings=True,
        initializer_range=0.2,
        seed=1,
    )
    write(TinyCheckpoint(out=folder, model=sizes))
    return folder
