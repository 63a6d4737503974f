"""Check of the buffers that a model computes instead of reading them from its checkpoint, such as rotary frequencies.

They must be float32 whatever the type of the parameters is. Rotary frequencies rounded to 16 bits rotate the queries
and keys of a long sequence by several radians, and nothing fails: the loss is only worse than it should be.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import TYPE_CHECKING

from cv_lightning.types import CVLightningError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel

SHOWN = 4
"""Most buffers that a message names."""


def weightless_model(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """A model whose parameters are on the meta device and whose buffers are computed on the CPU."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForImageTextToText

    with init_empty_weights(include_buffers=False):
        model: PreTrainedModel = AutoModelForImageTextToText.from_config(config, dtype=dtype)
    return model


def computed_buffers(config: PreTrainedConfig) -> dict[str, torch.Tensor]:
    """Floating-point buffers of a plain float32 build of a model, by name, on the CPU, without allocating its weights.

    Persistent buffers are left out, because only a checkpoint has their values.
    """
    import torch

    architecture = deepcopy(config)
    architecture._attn_implementation = "eager"  # a loaded model's config may name our implementation
    return {
        f"{path}.{name}" if path else name: buffer
        for path, module in weightless_model(architecture, torch.float32).named_modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and buffer.is_floating_point() and name in module._non_persistent_buffers_set
    }


def check_buffers(model: PreTrainedModel, which: str, expected: Mapping[str, torch.Tensor]) -> None:
    """Check that a model's computed buffers equal those of a plain float32 build bit for bit.

    Args:
        model: A loaded model, possibly sharded.
        which: Name of the model for the message, such as `policy`.
        expected: Buffers from `computed_buffers`.

    Raises:
        CVLightningError: A buffer is missing, has another type or shape, or differs; the message names it.
    """
    found = dict(model.named_buffers(remove_duplicate=False))
    wrong = [f"{name} {fault}" for name, plain in expected.items() if (fault := _fault(found.get(name), plain))]
    if wrong:
        more = f" and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
        raise CVLightningError(
            f"buffers of the {which} are not those of a plain float32 load: {'; '.join(wrong[:SHOWN])}{more}. "
            "Positions would be wrong. Something casts them while or after the model is loaded: leave "
            "--trainer.precision out, take a strategy of cv_lightning.strategies, and the versions of transformers and "
            "deepspeed that pyproject.toml pins"
        )


def _fault(found: torch.Tensor | None, plain: torch.Tensor) -> str:
    """Description of a wrong buffer; empty if it is right."""
    if found is None:
        return "is missing"
    if found.shape != plain.shape:
        return f"has shape {list(found.shape)}, not {list(plain.shape)}"
    error = float((found.detach().cpu().double() - plain.double()).abs().max())
    if found.dtype != plain.dtype:
        return f"is {str(found.dtype).removeprefix('torch.')}, not float32 (off by up to {error:.1e})"
    return f"is off by up to {error:.1e}" if error != 0.0 else ""
