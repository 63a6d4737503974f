"""Qwen2.5-VL."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

from cv_lightning.models.adapters.base import Architecture
from cv_lightning.models.adapters.qwen_vl import QwenVLAdapter, tiny_special_ids
from cv_lightning.models.adapters.sizes import TinySizes

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, Qwen2_5_VLProcessor


class Qwen25VLAdapter(QwenVLAdapter):
    """Most blocks of the vision tower attend within windows."""

    model_types = ("qwen2_5_vl",)
    processor_class = "Qwen2_5_VLProcessor"
    liger_function = "apply_liger_kernel_to_qwen2_5_vl"
    liger_parts: ClassVar = {
        "rms_norm": True,
        "swiglu": True,
        "rope": False,
    }  # its rope replaces one that is no longer called
    mrope_shares = (2, 3, 3)
    tiny_patch_size = 14

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

    def tiny_processor(
        self, sizes: TinySizes, tokenizer: PreTrainedTokenizerBase, chat_template: str
    ) -> Qwen2_5_VLProcessor:
        """See `ModelAdapter`."""
        from transformers import Qwen2_5_VLProcessor, Qwen2VLVideoProcessor

        return Qwen2_5_VLProcessor(
            image_processor=self.tiny_image_processor(sizes),
            tokenizer=tokenizer,
            video_processor=Qwen2VLVideoProcessor(patch_size=self.tiny_patch_size, merge_size=sizes.merge_size),
            chat_template=chat_template,
        )

    def tiny_model(self, sizes: TinySizes, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
        """See `ModelAdapter`."""
        from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

        every = sizes.full_attention_every
        text = {
            "intermediate_size": 3 * sizes.hidden_size,
            "bos_token_id": None,
            "rope_scaling": {"type": "mrope", "rope_type": "default", "mrope_section": self.mrope_section(sizes)},
        }
        vision = {
            "intermediate_size": 3 * sizes.hidden_size,
            "window_size": sizes.window_tokens * sizes.merge_size * self.tiny_patch_size,
            "fullatt_block_indexes": list(range(every - 1, sizes.vision_depth, every)),
        }
        return Qwen2_5_VLForConditionalGeneration(
            Qwen2_5_VLConfig(
                text_config=self.tiny_text(sizes, tokenizer) | text,
                vision_config=self.tiny_vision(sizes) | vision,
                tie_word_embeddings=sizes.tie_embeddings,
                **tiny_special_ids(tokenizer),
            )
        )
