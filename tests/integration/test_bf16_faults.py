"""The start-up check detects planted faults whose differences are larger than rounding to bfloat16 explains."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from module_samples import PROMPT, fit

from cv_lightning.callbacks.start_check import SFTStartCheck, check_start
from cv_lightning.commands.tiny import TinyCheckpoint, write
from cv_lightning.data.conversations import Conversation
from cv_lightning.data.modules import DemonstrationBatch
from cv_lightning.digits.modules import DigitSFTDataModule
from cv_lightning.models import packing
from cv_lightning.models.adapters import ImageInputs
from cv_lightning.models.adapters.qwen_vl import QwenVLAdapter
from cv_lightning.models.adapters.tiny import TinyModelConfig
from cv_lightning.models.loading import PolicyConfig, load_policy
from cv_lightning.models.patches import PatchProjection
from cv_lightning.models.vision import VisionCache
from cv_lightning.modules import base
from cv_lightning.modules.sft import SFTModule
from cv_lightning.rollout.mismatch import exceeds
from cv_lightning.types import CVLightningError, MismatchError

pytestmark = pytest.mark.filterwarnings("ignore:model.policy.dtype bfloat16")  # steps on 16-bit weights: one is enough
FAULTS = ("rotary", "swapped_image", "shifted_position")
FAMILIES: tuple[str, ...] = ("qwen3_vl", "qwen2_5_vl")


@pytest.fixture(scope="module", params=FAMILIES)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoint with weights so large that every part affects the log-probabilities, as in a trained model."""
    folder: Path = tmp_path_factory.mktemp(request.param)
    write(TinyCheckpoint(out=folder, model=TinyModelConfig(family=request.param, initializer_range=0.2)))
    return folder


@pytest.fixture(scope="module")
def conversations() -> list[Conversation]:
    """Conversations, of which half have two images."""
    data = DigitSFTDataModule(num_steps=1, conversations_per_step=12, warm_up_share=0.0)
    made = data.train_dataloader().build(0).conversations
    assert any(turn.result_image is not None for conversation in made for turn in conversation.turns)
    return list(made)


def module_of(checkpoint: Path, dtype: Any = "bfloat16") -> SFTModule:
    return SFTModule(PolicyConfig(path=str(checkpoint), dtype=dtype), prompt=PROMPT)


def plant(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Break the trainer's forward."""
    if fault == "rotary":

        def rounded(config: PolicyConfig) -> Any:
            model = load_policy(config)
            for buffer in model.buffers():
                buffer.data = buffer.data.bfloat16()
            return model

        monkeypatch.setattr(base, "load_policy", rounded)
    elif fault == "swapped_image":
        get = VisionCache.get
        monkeypatch.setattr(VisionCache, "get", lambda self, images: get(self, list(images))[::-1])
    else:
        positions = QwenVLAdapter.positions

        def shifted(adapter: QwenVLAdapter, is_image: np.ndarray, images: Sequence[ImageInputs]) -> np.ndarray:
            found = positions(adapter, is_image, images)
            if is_image.any():
                found[1:, int(is_image.argmax()) :] += 1
            return found

        monkeypatch.setattr(QwenVLAdapter, "positions", shifted)


def start(module: SFTModule, conversations: list[Conversation]) -> None:
    """Take one step of a run."""
    fit(module, lambda step: DemonstrationBatch(step, conversations), 1, callbacks=[SFTStartCheck()])


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_bf16_sft_starts_where_nothing_is_wrong(
    checkpoint: Path, conversations: list[Conversation], dtype: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        start(module_of(checkpoint, dtype), conversations)
    assert "from transformers' own" in caplog.text


@pytest.mark.parametrize("fault", FAULTS)
def test_bf16_sft_with_a_planted_fault_does_not_start(
    checkpoint: Path, conversations: list[Conversation], fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(fault, monkeypatch)
    said = "buffers of the policy" if fault == "rotary" else "other log-probabilities than transformers' own"
    with pytest.raises(CVLightningError, match=said):
        start(module_of(checkpoint), conversations)


def test_bf16_attention_across_sequences_does_not_start(
    checkpoint: Path, conversations: list[Conversation], monkeypatch: pytest.MonkeyPatch
) -> None:
    pack = packing._sequence_arrays

    def joined(*args: Any, offset: int, **kwargs: Any) -> Any:
        made = pack(*args, offset=offset, **kwargs)
        made["positions"][0] += offset  # text positions continue, as in one long sequence
        return made

    monkeypatch.setattr(packing, "_sequence_arrays", joined)
    with pytest.raises(MismatchError, match="itself alone"):
        start(module_of(checkpoint), conversations)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_bf16_a_patch_projection_that_is_not_the_convolution_does_not_start(
    checkpoint: Path, conversations: list[Conversation], dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = PatchProjection.forward
    monkeypatch.setattr(PatchProjection, "forward", lambda self, patches: project(self, patches.flip(-1)))
    with pytest.raises(MismatchError, match="transformers' own"):
        start(module_of(checkpoint, dtype), conversations)


def test_bf16_start_check_compares_the_conversation_with_most_to_show(
    checkpoint: Path, conversations: list[Conversation]
) -> None:
    module = module_of(checkpoint)
    module.policy = load_policy(module.policy_config)
    report = check_start(module, conversations, 1e-4)
    assert report is not None and len(report.from_plain) > 5 and len(report.from_alone) > len(report.from_plain)
    assert check_start(module, [], 1e-4) is None, "a rank without conversations takes part with dummies"


def test_limits_in_16_bits_look_at_mean_and_tail_and_at_the_largest_in_float32() -> None:
    small = torch.full((1000,), 0.01)
    assert not exceeds(small, "bfloat16", 1e-4, 0.06) and exceeds(small, "float32", 1e-4, 0.06)
    one = small.clone()
    one[0] = 5.0
    assert not exceeds(one, "bfloat16", 1e-4, 0.06), "a single token"
    one[:20] = 5.0
    assert exceeds(one, "bfloat16", 1e-4, 0.2) and exceeds(small * 7, "bfloat16", 1e-4, 0.06)
    assert exceeds(torch.tensor([float("nan")]), "bfloat16", 1e-4, 0.06) and exceeds(-small * 7, "float16", 1e-4, 0.06)
