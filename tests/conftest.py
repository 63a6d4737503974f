"""Fixtures and switches that several tests share."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from cv_lightning.environment import prepare_environment

# Before anything imports torch or vLLM.
os.environ.setdefault("OMP_NUM_THREADS", "1")
prepare_environment()

if TYPE_CHECKING:
    from cv_lightning.agent.dialogue import DialogueEncoder


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
    from cv_lightning.model.loading import image_limits, load_processor

    processor = load_processor(str(tiny_checkpoint))
    return DialogueEncoder(processor.tokenizer, image_limits(processor))


@pytest.fixture(scope="session")
def tiny_qwen25(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny random-weight Qwen2.5-VL: windowed vision attention, tied embeddings as in the 3B."""
    import torch
    from transformers import (
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
        Qwen2_5_VLProcessor,
        Qwen2VLImageProcessor,
    )

    from cv_lightning.model.loading import load_processor
    from cv_lightning.model.tokens import IMAGE_PAD, VIDEO_PAD, VISION_END, VISION_START

    folder = tmp_path_factory.mktemp("qwen25")
    given = load_processor(str(tiny_checkpoint))
    tokenizer, template = given.tokenizer, given.chat_template
    size = {"shortest_edge": 4 * 28 * 28, "longest_edge": 24 * 28 * 28}
    pixels = Qwen2VLImageProcessor(patch_size=14, merge_size=2, size=size)
    Qwen2_5_VLProcessor(pixels, tokenizer, given.video_processor, chat_template=template).save_pretrained(folder)
    ids = tokenizer.get_vocab()
    text = dict(vocab_size=-(-len(tokenizer) // 64) * 64, hidden_size=128, intermediate_size=128, num_hidden_layers=2)
    text |= dict(num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=2048, tie_word_embeddings=True)
    text |= dict(rope_scaling={"type": "mrope", "rope_type": "default", "mrope_section": [8, 4, 4]})
    text |= dict(
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.2,
    )
    vision = dict(depth=3, hidden_size=64, intermediate_size=128, num_heads=2, patch_size=14, spatial_merge_size=2)
    vision |= dict(out_hidden_size=128, window_size=56, fullatt_block_indexes=[1], initializer_range=0.2)
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=ids[IMAGE_PAD],
        video_token_id=ids[VIDEO_PAD],
        vision_start_token_id=ids[VISION_START],
        vision_end_token_id=ids[VISION_END],
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        Qwen2_5_VLForConditionalGeneration(config).save_pretrained(folder)
    return folder
