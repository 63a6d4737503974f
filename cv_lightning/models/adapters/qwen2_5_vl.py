"""Qwen2.5-VL."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

from cv_lightning.models.adapters.base import Architecture
from cv_lightning.models.adapters.qwen_vl import QwenVLAdapter
from cv_lightning.models.adapters.sizes import TinySizes

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase


class Qwen25VLAdapter(QwenVLAdapter):
    """Most blocks of the vision tower attend within windows."""

    title = "Qwen2.5-VL"
    model_types = ("qwen2_5_vl",)
    processor_class = "Qwen2_5_VLProcessor"
    liger_function = "apply_liger_kernel_to_qwen2_5_vl"
    # liger's rope replaces a function that the model no longer calls.
    liger_parts: ClassVar = {"rms_norm": True, "swiglu": True, "rope": False}
    mrope_shares = (2, 3, 3)
    tiny_patch_size = 14
    tiny_classes = ("Qwen2VLVideoProcessor", "Qwen2_5_VLConfig", "Qwen2_5_VLForConditionalGeneration")

    def architecture(self, config: PretrainedConfig) -> Architecture:
        """See `ModelAdapter`."""
        return replace(super().architecture(config), vision_gated=True)

    def check_tiny(self, sizes: TinySizes) -> None:
        """Windows and whole-image blocks have to fit the vision tower."""
        super().check_tiny(sizes)
        if not 1 <= sizes.full_attention_every <= sizes.vision_depth or sizes.window_tokens < 1:
            raise ValueError(
                f"--full_attention_every {sizes.full_attention_every} must be 1 to --vision_depth "
                f"{sizes.vision_depth}, and --window_tokens {sizes.window_tokens} at least 1"
            )

    def tiny_text(self, sizes: TinySizes, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
        """See `QwenVLAdapter`."""
        rope = {"type": "mrope", "rope_type": "default", "mrope_section": self.mrope_section(sizes)}
        own = {"intermediate_size": 3 * sizes.hidden_size, "bos_token_id": None, "rope_scaling": rope}
        return super().tiny_text(sizes, tokenizer) | own

    def tiny_vision(self, sizes: TinySizes) -> dict[str, Any]:
        """See `QwenVLAdapter`."""
        every = sizes.full_attention_every
        return super().tiny_vision(sizes) | {
            "intermediate_size": 3 * sizes.hidden_size,
            "window_size": sizes.window_tokens * sizes.merge_size * self.tiny_patch_size,
            "fullatt_block_indexes": list(range(every - 1, sizes.vision_depth, every)),
        }
