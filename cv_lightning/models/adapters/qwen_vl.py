"""Common base of the Qwen-VL families: ChatML, patches merged into tokens, positions in three dimensions."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from cv_lightning.images import ImageLimits, ImageRule
from cv_lightning.models.adapters.base import (
    Architecture,
    ImageInputs,
    ModelAdapter,
    PackedInputs,
    Part,
    joined,
)
from cv_lightning.models.adapters.sizes import TinySizes
from cv_lightning.types import DataError, EngineError

if TYPE_CHECKING:
    import torch
    from PIL import Image
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin


START_OF_TURN, END_OF_TURN = "<|im_start|>", "<|im_end|>"
IMAGE_PAD, VIDEO_PAD = "<|image_pad|>", "<|video_pad|>"
VISION_START, VISION_END = "<|vision_start|>", "<|vision_end|>"
ROLES = ("system", "user", "assistant")
CHAT_TEMPLATE = (Path(__file__).parent / "qwen_vl.jinja").read_text(encoding="utf-8").rstrip("\n")


class QwenVLAdapter(ModelAdapter):
    """Base class of the families; it is not a family itself."""

    end_of_turn = END_OF_TURN
    padding = "<|endoftext|>"
    image_token = IMAGE_PAD
    vision_tokens = (IMAGE_PAD, VIDEO_PAD, VISION_START, VISION_END, "<|vision_pad|>")
    control_tokens = (START_OF_TURN, VISION_START, VISION_END, "<|vision_pad|>", IMAGE_PAD, VIDEO_PAD)
    mrope_shares: ClassVar[tuple[int, int, int]]
    """Ratio of the rotary frequencies of time, height and width in half of a head's width."""
    tiny_classes: ClassVar[tuple[str, str, str]]
    """Names of the family's video processor, config and model in transformers."""

    # ------------------------------------------------------------------ chat
    def chat_template(self) -> str:
        """ChatML; tool responses are user messages."""
        return CHAT_TEMPLATE

    def messages_of(self, prompt: str) -> list[tuple[str, list[str]]]:
        """See `ModelAdapter`."""
        pieces = prompt.split(START_OF_TURN)
        if pieces[0] or pieces[-1] != "assistant\n":
            raise EngineError(f"the prompt was not made by the chat template: {prompt[:80]!r}...{prompt[-40:]!r}")
        messages = []
        for piece in pieces[1:-1]:
            role, _, content = piece.partition("\n")
            if role not in ROLES:
                raise EngineError(f"the prompt has a message of {role[:20]!r}; known are {', '.join(ROLES)}")
            texts = content.removesuffix("\n").removesuffix(END_OF_TURN).split(VISION_START + IMAGE_PAD + VISION_END)
            messages.append((role, texts))
        return messages

    # ------------------------------------------------------------------ images
    def make_image_rule(self) -> ImageRule:
        """Sides are multiples of patch size times merge size, within the processor's pixel limits."""
        image_processor = self.processor.image_processor
        return ImageLimits(
            factor=image_processor.patch_size * image_processor.merge_size,
            min_pixels=image_processor.size["shortest_edge"],
            max_pixels=image_processor.size["longest_edge"],
        )

    def process_images(self, images: Sequence[Image.Image]) -> list[ImageInputs]:
        """Images as flattened patches.

        `pixel_values` [patches, channels * time * patch * patch] are float32; `image_grid_thw` [1, 3] is the number of
        patches in time, height and width.
        """
        features = self.processor.image_processor(images=list(images), return_tensors="pt")
        merge = self.processor.image_processor.merge_size
        grids = features["image_grid_thw"]
        pieces = features["pixel_values"].float().split(grids.prod(-1).tolist())
        return [
            ImageInputs({"pixel_values": pixels, "image_grid_thw": grid[None]}, (height // merge, width // merge))
            for pixels, grid, (_, height, width) in zip(pieces, grids, grids.tolist(), strict=True)
        ]

    def engine_arguments(self, max_images: int) -> dict[str, Any]:
        """The trainer's pixel limits; vLLM would otherwise use those of the checkpoint's folder."""
        size = self.processor.image_processor.size
        limits = {name: size[name] for name in ("shortest_edge", "longest_edge")}
        return super().engine_arguments(max_images) | {"mm_processor_kwargs": {"size": limits}}

    # ------------------------------------------------------------------ sequences
    def positions(self, is_image: np.ndarray, images: Sequence[ImageInputs]) -> np.ndarray:
        """Text, temporal, height and width positions of one sequence, [4, tokens].

        Text counts up by one in all four. An image's tokens share one temporal position and count rows and columns of
        its merged grid from there; text continues after the largest of them. Equal to the models' `get_rope_index` for
        still images.
        """
        length, pads = len(is_image), np.flatnonzero(is_image)
        positions = np.empty((4, length), dtype=np.int64)
        positions[0] = np.arange(length)
        start, position, used = 0, 0, 0
        for height, width in (image.grid for image in images):
            first = int(pads[used])
            end = first + height * width
            used += height * width
            if int(pads[used - 1]) != end - 1:
                raise DataError(
                    f"the {height * width} tokens of an image, from token {first} on, are interrupted by text"
                )
            positions[1:, start:first] = np.arange(position, position + first - start)
            position += first - start
            positions[1:, first:end] = _grid(height, width) + position
            position += max(height, width)
            start = end
        positions[1:, start:] = np.arange(position, position + length - start)
        return positions

    def packed_hidden(self, model: PreTrainedModel, inputs: PackedInputs) -> torch.Tensor:
        """See `ModelAdapter`."""
        images = {}
        if inputs.images and inputs.image_index is not None:
            features = model.model.get_image_features(**inputs.image_tensors(), return_dict=True)
            if inputs.image_index.numel() != len(inputs.images):  # else every image is shown once, in order
                order = inputs.image_index.tolist()
                features.pooler_output = [features.pooler_output[i] for i in order]
                deep = getattr(features, "deepstack_features", None)
                if deep is not None:
                    features.deepstack_features = [[level[i] for i in order] for level in deep]
            images["mm_encoder_outputs"] = {"image": features}
        output = model.model(
            input_ids=inputs.input_ids,
            position_ids=inputs.position_ids,
            mm_token_type_ids=(inputs.input_ids == self.image_id).long(),
            use_cache=False,
            **images,
        )
        hidden: torch.Tensor = output.last_hidden_state
        return hidden

    def plain_inputs(
        self, ids: torch.Tensor, mask: torch.Tensor, images: Sequence[ImageInputs]
    ) -> dict[str, torch.Tensor]:
        """See `ModelAdapter`."""
        types = (ids == self.image_id).long() * mask
        inputs = {"input_ids": ids, "attention_mask": mask, "mm_token_type_ids": types}
        return inputs | {name: tensor.to(ids.device) for name, tensor in joined(images).items()}

    # ------------------------------------------------------------------ parameters
    def part_of(self, name: str) -> Part:
        """The mergers of the vision tower are the projector."""
        if ".visual." not in name:
            return "language"
        return "projector" if ".merger" in name or "_merger" in name else "vision"

    def architecture(self, config: PretrainedConfig) -> Architecture:
        """See `ModelAdapter`."""
        text, vision = config.get_text_config(), config.vision_config
        head_width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        return Architecture(
            layers=text.num_hidden_layers,
            hidden=text.hidden_size,
            intermediate=text.intermediate_size,
            query_width=text.num_attention_heads * head_width,
            key_width=text.num_key_value_heads * head_width,
            head_norm=False,
            vocabulary=text.vocab_size,
            vision_depth=vision.depth,
            vision_hidden=vision.hidden_size,
            vision_intermediate=vision.intermediate_size,
            vision_gated=False,
            mergers=1,
            patch=vision.patch_size,
            merge=vision.spatial_merge_size,
        )

    # ------------------------------------------------------------------ tiny checkpoints
    def check_tiny(self, sizes: TinySizes) -> None:
        """Half of a head's width has to split by the family's mRoPE."""
        unit = 2 * sum(self.mrope_shares)
        if sizes.head_dim % unit:
            raise ValueError(
                f"--head_dim {sizes.head_dim} must be a multiple of {unit}: the mRoPE of {self.model_types[0]} "
                f"splits half of it {' : '.join(map(str, self.mrope_shares))}"
            )

    def mrope_section(self, sizes: TinySizes) -> list[int]:
        """Number of rotary frequencies of time, height and width; together head_dim / 2."""
        return [sizes.head_dim // 2 * share // sum(self.mrope_shares) for share in self.mrope_shares]

    def tiny_processor(
        self, sizes: TinySizes, tokenizer: PreTrainedTokenizerBase, chat_template: str
    ) -> ProcessorMixin:
        """See `ModelAdapter`. The families have the same image processor, with different patch sizes."""
        import transformers

        tokenizer.image_token, tokenizer.video_token = IMAGE_PAD, VIDEO_PAD
        patches = {"patch_size": self.tiny_patch_size, "merge_size": sizes.merge_size}
        area = (self.tiny_patch_size * sizes.merge_size) ** 2
        made: ProcessorMixin = getattr(transformers, self.processor_class)(
            image_processor=transformers.Qwen2VLImageProcessor(
                temporal_patch_size=2,
                size={"shortest_edge": sizes.min_tokens * area, "longest_edge": sizes.max_tokens * area},
                image_mean=[sizes.image_mean] * 3,
                image_std=[sizes.image_std] * 3,
                **patches,
            ),
            tokenizer=tokenizer,
            video_processor=getattr(transformers, self.tiny_classes[0])(**patches),
            chat_template=chat_template,
        )
        return made

    def tiny_model(self, sizes: TinySizes, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
        """See `ModelAdapter`."""
        import transformers

        ids = tokenizer.get_vocab()
        names = {"image_token": IMAGE_PAD, "video_token": VIDEO_PAD}
        names |= {"vision_start_token": VISION_START, "vision_end_token": VISION_END}
        config, model = (getattr(transformers, name) for name in self.tiny_classes[1:])
        made: PreTrainedModel = model(
            config(
                text_config=self.tiny_text(sizes, tokenizer),
                vision_config=self.tiny_vision(sizes),
                tie_word_embeddings=sizes.tie_embeddings,
                **{f"{name}_id": ids[token] for name, token in names.items()},
            )
        )
        return made

    def tiny_text(self, sizes: TinySizes, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
        """Settings of a tiny language model; families add their own."""
        return {
            "vocab_size": -(-len(tokenizer) // 64) * 64,
            "hidden_size": sizes.hidden_size,
            "num_hidden_layers": sizes.num_layers,
            "num_attention_heads": sizes.hidden_size // sizes.head_dim,
            "num_key_value_heads": sizes.num_key_value_heads,
            "max_position_embeddings": sizes.max_positions,
            "tie_word_embeddings": sizes.tie_embeddings,
            "initializer_range": sizes.initializer_range,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        }

    def tiny_vision(self, sizes: TinySizes) -> dict[str, Any]:
        """Settings of a tiny vision tower; families add their own."""
        return {
            "depth": sizes.vision_depth,
            "hidden_size": sizes.hidden_size,
            "num_heads": sizes.hidden_size // sizes.head_dim,
            "patch_size": self.tiny_patch_size,
            "spatial_merge_size": sizes.merge_size,
            "temporal_patch_size": 2,
            "out_hidden_size": sizes.hidden_size,
            "initializer_range": sizes.initializer_range,
        }


@lru_cache(maxsize=4096)
def _grid(height: int, width: int) -> np.ndarray:
    """Temporal, row and column offsets of an image's tokens from its first one, [3, height * width]."""
    rows, columns = np.divmod(np.arange(height * width), width)
    return np.stack([np.zeros_like(rows), rows, columns])
