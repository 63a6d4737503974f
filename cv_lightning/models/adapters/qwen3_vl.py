"""Qwen3-VL, dense."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

from cv_lightning.models.adapters.base import Architecture
from cv_lightning.models.adapters.qwen_vl import QwenVLAdapter
from cv_lightning.models.adapters.sizes import TinySizes

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

POSITION_TABLE = 16
"""Side of a tiny vision tower's learned position table, which is interpolated to the patch grid of each image."""


class Qwen3VLAdapter(QwenVLAdapter):
    """Features of some vision blocks are added to the first layers of the language model (deepstack)."""

    title = "Qwen3-VL"
    model_types = ("qwen3_vl",)
    processor_class = "Qwen3VLProcessor"
    liger_function = "apply_liger_kernel_to_qwen3_vl"
    liger_parts: ClassVar = {"rms_norm": True, "swiglu": False, "rope": True}  # it has no gated unit for this family
    unsaved_engine_buffers = ("deepstack_input_embeds",)
    mrope_shares = (2, 1, 1)
    tiny_patch_size = 16
    tiny_classes = ("Qwen3VLVideoProcessor", "Qwen3VLConfig", "Qwen3VLForConditionalGeneration")

    def architecture(self, config: PretrainedConfig) -> Architecture:
        """See `ModelAdapter`. Each deepstack level has a projection of its own."""
        mergers = 1 + len(config.vision_config.deepstack_visual_indexes)
        return replace(super().architecture(config), head_norm=True, mergers=mergers)

    def check_tiny(self, sizes: TinySizes) -> None:
        """Deepstack needs vision blocks to take features from, and layers to add them to."""
        super().check_tiny(sizes)
        if any(not 0 <= layer < sizes.vision_depth for layer in sizes.deepstack_layers):
            raise ValueError(
                f"--deepstack_layers {list(sizes.deepstack_layers)} must lie in [0, {sizes.vision_depth}), the blocks "
                "that --vision_depth gives"
            )
        if len(sizes.deepstack_layers) > sizes.num_layers:
            raise ValueError(
                f"--deepstack_layers names {len(sizes.deepstack_layers)} blocks but --num_layers is "
                f"{sizes.num_layers}; each needs a layer of the language model to be added to"
            )

    def tiny_text(self, sizes: TinySizes, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
        """See `QwenVLAdapter`."""
        rope = {"rope_type": "default", "mrope_section": self.mrope_section(sizes), "mrope_interleaved": True}
        own = {"intermediate_size": 2 * sizes.hidden_size, "head_dim": sizes.head_dim, "rope_scaling": rope}
        return super().tiny_text(sizes, tokenizer) | own

    def tiny_vision(self, sizes: TinySizes) -> dict[str, Any]:
        """See `QwenVLAdapter`."""
        return super().tiny_vision(sizes) | {
            "intermediate_size": 2 * sizes.hidden_size,
            "num_position_embeddings": POSITION_TABLE**2,
            "deepstack_visual_indexes": list(sizes.deepstack_layers),
        }
