"""Every part that liger-kernel replaces runs in the model and gives the same result."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import PreTrainedModel

from cv_lightning.images import to_model_image
from cv_lightning.models.adapters import adapter_for
from cv_lightning.models.loading import PolicyConfig, load_adapter, load_policy
from cv_lightning.models.logprobs import packed_logprobs
from cv_lightning.models.packing import TrainSequence, pack_sequences
from cv_lightning.models.patches import use_liger
from cv_lightning.models.vision import VisionCache

pytest.importorskip("liger_kernel")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Replaces liger's kernels by torch functions that count their calls, and pretends that there is a GPU."""
    from liger_kernel.transformers import rms_norm, rope, swiglu
    from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl
    from transformers.models.qwen3_vl import modeling_qwen3_vl

    counted: Counter[str] = Counter()

    class RMSNorm:
        @staticmethod
        def apply(
            x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float, casting: str, *_: Any
        ) -> torch.Tensor:
            counted["rms_norm"] += 1
            assert casting == "llama"
            return F.rms_norm(x.float(), x.shape[-1:], None, eps).to(x.dtype) * (weight + offset)

    def rotate(name: str, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *_: Any) -> Any:
        counted[name] += 1

        def turned(x: torch.Tensor) -> torch.Tensor:
            half = x.shape[-1] // 2
            cosine, sine = (y if y.dim() == 3 else y[None] for y in (cos, sin))
            return x * cosine[:, None] + torch.cat([-x[..., half:], x[..., :half]], -1) * sine[:, None]

        return turned(q), turned(k)

    def gate(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        counted["swiglu"] += 1
        return F.silu(a) * b

    monkeypatch.setattr(rms_norm, "LigerRMSNormFunction", RMSNorm)
    monkeypatch.setattr(rope, "dispatch", rotate)
    monkeypatch.setattr(swiglu, "_swiglu_dispatch", gate)
    for module in (modeling_qwen2_5_vl, modeling_qwen3_vl):  # liger replaces these for the whole process
        for name in list(vars(module)):
            if name.startswith("apply_") or name.endswith(("RMSNorm", "MLP")):
                monkeypatch.setattr(module, name, getattr(module, name))
    return counted


def logprobs(model: PreTrainedModel, path: Path) -> torch.Tensor:
    """Log-probabilities of a sequence with an image."""
    adapter = load_adapter(PolicyConfig(path=str(path)))
    image = to_model_image(Image.linear_gradient("L").resize((96, 64)).convert("RGB"), adapter.image_rule)
    (vision,) = VisionCache(adapter).get([image])
    pads = [model.config.image_token_id] * vision.num_tokens
    ids = [5, *pads, 6, 7, 8, 9]
    sequence = TrainSequence(token_ids=ids, loss_mask=[False] * (len(ids) - 4) + [True] * 4, vision=[vision])
    with torch.no_grad():
        return packed_logprobs(model, pack_sequences([sequence], model.config, adapter)).logprobs


@pytest.mark.parametrize("checkpoint", ["tiny_checkpoint", "tiny_qwen25"])
def test_every_part_that_liger_replaces_runs(
    request: pytest.FixtureRequest, checkpoint: str, calls: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path: Path = request.getfixturevalue(checkpoint)
    model = load_policy(PolicyConfig(path=str(path), dtype="float32", kernels="torch"))
    plain = logprobs(model, path)
    assert not calls
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    adapter = adapter_for(model.config.model_type)
    use_liger(model, adapter)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    fused = logprobs(model, path)
    text, vision = model.config.get_text_config(), model.config.vision_config
    layers, depth, family = text.num_hidden_layers, vision.depth, model.config.model_type
    expected = {"rms_norm": 4 * layers + 1} if family == "qwen3_vl" else {"rms_norm": 2 * layers + 1 + 2 * depth}
    expected |= {"rope": layers + depth} if adapter.liger_parts["rope"] else {}
    expected |= {"swiglu": layers} if adapter.liger_parts["swiglu"] else {}
    assert dict(calls) == expected
    assert set(expected) == {part for part, claimed in adapter.liger_parts.items() if claimed}
    torch.testing.assert_close(fused, plain, atol=1e-5, rtol=1e-5)
