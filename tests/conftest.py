"""Fixtures that several tests share."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

from cv_lightning.agent.dialogue import DialogueEncoder


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
    from cv_lightning.model.loading import image_limits, load_processor

    processor = load_processor(str(tiny_checkpoint))
    return DialogueEncoder(processor.tokenizer, image_limits(processor))
