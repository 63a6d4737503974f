"""Check of an exported folder: its logits on an image and a question against those of the weights it is made from."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from cv_lightning.images import to_model_image
from cv_lightning.models.adapters import ModelAdapter
from cv_lightning.models.buffers import weightless_model
from cv_lightning.models.export import ADAPTER_CONFIG
from cv_lightning.models.loading import PolicyConfig, load_adapter
from cv_lightning.types import CheckpointError

if TYPE_CHECKING:
    import torch
    from transformers import BatchFeature, PreTrainedConfig, PreTrainedModel

QUESTION = "What is written in this image?"
SAME, MERGED_APART = 1e-5, {"float32": 1e-4, "bfloat16": 5e-2, "float16": 5e-2}
"""Largest accepted difference relative to the largest logit: for equal arithmetic, and for adapters that are added to
the weights on one side and to the activations on the other."""


def reference_logits(
    tensors: Iterable[tuple[str, torch.Tensor]], config: PreTrainedConfig, dtype: torch.dtype, inputs: BatchFeature
) -> torch.Tensor:
    """Logits of a model that is filled with tensors without copying them.

    Args:
        tensors: (name in the model, full tensor) of every parameter; tied ones once.
        config: The model's architecture.
        dtype: Type of its parameters.
        inputs: Inputs from `probe`.
    """
    model = weightless_model(config, dtype)
    model.load_state_dict(dict(tensors), strict=False, assign=True)
    model.tie_weights()
    if left := [name for name, parameter in model.named_parameters() if parameter.is_meta]:
        raise CheckpointError(f"no weights for {len(left)} parameters, the first {left[0]}")
    return _logits(model, inputs)


def probe(folder: Path, given: ModelAdapter | None = None) -> BatchFeature:
    """Inputs for an image and a question, made by the folder's own processor and chat template.

    Args:
        folder: Folder of the model.
        given: The model's adapter; None: selected by its model type.
    """
    adapter = load_adapter(PolicyConfig(path=str(folder), adapter=given))
    side = 4 * adapter.image_rule.factor
    image = to_model_image(Image.linear_gradient("L").resize((side, side)), adapter.image_rule)
    message: dict[str, Any] = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}
    text = adapter.processor.apply_chat_template([message], add_generation_prompt=True)
    made: BatchFeature = adapter.processor(text=[text], images=[image], return_tensors="pt")
    return made


def folder_logits(folder: Path, dtype: str, base: str, inputs: BatchFeature) -> torch.Tensor:
    """Logits of an exported folder as transformers loads it, or of `base` with the adapters in the folder."""
    import torch
    from transformers import AutoModelForImageTextToText

    separate = (folder / ADAPTER_CONFIG).is_file()
    model: Any = AutoModelForImageTextToText.from_pretrained(base if separate else folder, dtype=getattr(torch, dtype))
    if separate:
        import peft

        model = peft.PeftModel.from_pretrained(model, str(folder))
    return _logits(model, inputs)


def _logits(model: PreTrainedModel, inputs: BatchFeature) -> torch.Tensor:
    import torch

    with torch.no_grad():
        logits: torch.Tensor = model.eval()(**inputs).logits
    return logits


def check_same(expected: torch.Tensor, found: torch.Tensor, dtype: str, separate: bool) -> float:
    """Largest difference of two logit tensors relative to the largest expected logit.

    Raises:
        CheckpointError: The difference is larger than rounding explains.
    """
    scale = float(expected.abs().max())
    gap = float((expected - found).abs().max()) / max(scale, 1e-30)
    bound = MERGED_APART[dtype] if separate else SAME
    if not gap <= bound:
        raise CheckpointError(
            f"the exported model computes other logits than the checkpoint: difference {gap:.1e} of the largest, "
            f"accepted {bound:.0e}. Another transformers version than this project pins? Nothing was written"
        )
    return gap
