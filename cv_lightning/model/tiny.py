"""Tiny random-weight checkpoints of the real Qwen3-VL architecture, with its real processor.

Small enough to train from scratch on two CPU cores, yet loaded by the same code as the released models: everything
that reads a checkpoint folder (transformers, vLLM, the trainer) sees nothing special about it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from cv_lightning.model.tokens import END_OF_TURN, IMAGE_PAD, PADDING, VIDEO_PAD, VISION_END, VISION_START

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast, Qwen3VLConfig, Qwen3VLProcessor

CONTROL_TOKENS = (
    "<|im_start|>",
    VISION_START,
    VISION_END,
    "<|vision_pad|>",
    IMAGE_PAD,
    VIDEO_PAD,
)
"""Left out when a completion is decoded for people, as in Qwen's own tokenizers."""
MARKUP_TOKENS = (
    "<tool_call>",
    "</tool_call>",
    "<tool_response>",
    "</tool_response>",
    "<think>",
    "</think>",
    "<answer>",
    "</answer>",
)
"""Single tokens that belong to the text, so that decoding keeps them."""

POSITION_TABLE = 16
"""Side of the vision tower's learned position table; it is interpolated to the patch grid of each image."""
SINGLE_DIGITS = r"\d"
QWEN_PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How Qwen's tokenizers cut text before they merge (published in their tokenizer.json)."""


@dataclass(frozen=True, kw_only=True)
class TinyModelConfig:
    """Sizes of a tiny Qwen3-VL. The defaults have 2.5 M parameters and read 96x96 digits scenes."""

    hidden_size: int = 128
    """Width of the language model and of the vision tower; a multiple of `head_dim`."""
    num_layers: int = 4
    """Layers of the language model."""
    head_dim: int = 32
    """Width of an attention head; decides the split of mRoPE into time, height and width."""
    num_key_value_heads: int = 4
    """Divides hidden_size / head_dim."""
    vision_depth: int = 4
    """Blocks of the vision tower."""
    deepstack_layers: tuple[int, ...] = (1, 2)
    """Vision blocks whose features are added to the first layers of the language model."""
    patch_size: int = 16
    """Side of a vision patch in pixels."""
    merge_size: int = 2
    """Patches a side that become one vision token."""
    min_pixels: int = 5 * 32 * 32
    """Smaller images are enlarged. The defaults show every square image at 96x96 (36 patches, 9 tokens), and leave
    other shapes enough room that their size on the grid needs no second resize."""
    max_pixels: int = 12 * 32 * 32
    """Larger images are reduced."""
    image_mean: float = 1.0
    """1 makes a white background exactly 0, without which position embeddings drown in it and nothing is learned."""
    image_std: float = 0.5
    """Divisor after the mean is taken off, both on a scale of 0 to 1."""
    max_positions: int = 4096
    """Longest sequence in tokens."""
    tokenizer_merges: Literal["strings", "words"] = "strings"
    """strings: whole phrases of the corpus become one token, single digits stay apart, so that a tool call takes 6-21
    tokens; words: text is cut first as Qwen's tokenizers cut it (35-49 tokens a call)."""
    vocabulary: int = 640
    """Byte-pair entries at most: 256 bytes and the merges that the corpus gives; special tokens come on top."""
    seed: int = 0
    """Seed of the weights."""

    def __post_init__(self) -> None:
        heads = self.hidden_size // self.head_dim
        if self.hidden_size % self.head_dim or heads < 1 or heads % self.num_key_value_heads:
            raise ValueError(
                f"--hidden_size {self.hidden_size} must be a multiple of --head_dim {self.head_dim}, and the resulting "
                f"{heads} heads a multiple of --num_key_value_heads {self.num_key_value_heads}"
            )
        if self.head_dim % 8:
            raise ValueError(f"--head_dim {self.head_dim} must be a multiple of 8: mRoPE splits half of it 2 : 1 : 1")
        if any(not 0 <= layer < self.vision_depth for layer in self.deepstack_layers):
            raise ValueError(
                f"--deepstack_layers {list(self.deepstack_layers)} must lie in [0, {self.vision_depth}), the blocks "
                "that --vision_depth gives"
            )
        if len(self.deepstack_layers) > self.num_layers:
            raise ValueError(
                f"--deepstack_layers names {len(self.deepstack_layers)} blocks but --num_layers is {self.num_layers}; "
                "each needs a layer of the language model to be added to"
            )
        factor = self.patch_size * self.merge_size
        if not 0 < self.min_pixels <= self.max_pixels or self.max_pixels < factor**2:
            raise ValueError(
                f"--min_pixels {self.min_pixels} <= --max_pixels {self.max_pixels} must hold, and the latter hold one "
                f"vision token ({factor}x{factor})"
            )
        if self.vocabulary < 256:
            raise ValueError(f"--vocabulary {self.vocabulary} must be at least 256, one entry a byte")


def write_tiny_checkpoint(
    folder: str | Path, config: TinyModelConfig, *, corpus: Iterable[str], chat_template: str
) -> int:
    """Write a random-weight checkpoint that `AutoProcessor`, `AutoModelForImageTextToText` and vLLM load.

    The caller's random state is left as it was.

    Args:
        folder: made if absent; files of an earlier checkpoint are overwritten.
        config: the sizes.
        corpus: texts that the tokenizer learns its merges from; markup such as `<tool_call>` is cut out of them.
        chat_template: Jinja text of the chat template that the processor and tokenizer carry.

    Returns:
        Number of parameters.
    """
    import torch
    from transformers import Qwen3VLForConditionalGeneration

    processor = _processor(config, _tokenizer(config, corpus, chat_template), chat_template)
    processor.save_pretrained(folder)
    model_config = _model_config(config, processor.tokenizer)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = Qwen3VLForConditionalGeneration(model_config)
    model.generation_config.eos_token_id = [processor.tokenizer.eos_token_id]
    model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
    model.save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())


def train_byte_pairs(config: TinyModelConfig, corpus: Iterable[str]) -> Tokenizer:
    """Byte-level byte-pair tokenizer whose merges come from `corpus`; every text stays encodable."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    pieces = Regex(SINGLE_DIGITS if config.tokenizer_merges == "strings" else QWEN_PIECES)
    byte_pairs = Tokenizer(models.BPE())
    byte_pairs.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(pieces, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    byte_pairs.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocabulary,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    byte_pairs.train_from_iterator(_without_markup(corpus), trainer)
    return byte_pairs


def _without_markup(corpus: Iterable[str]) -> Iterable[str]:
    """The stretches of text between special tokens: merges never cross those."""
    import re

    marks = re.compile("|".join(re.escape(token) for token in (END_OF_TURN, PADDING, *CONTROL_TOKENS, *MARKUP_TOKENS)))
    for text in corpus:
        yield from (piece for piece in marks.split(text) if piece)


def _tokenizer(config: TinyModelConfig, corpus: Iterable[str], chat_template: str) -> PreTrainedTokenizerFast:
    from tokenizers import AddedToken
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=train_byte_pairs(config, corpus),
        eos_token=END_OF_TURN,
        pad_token=PADDING,
        extra_special_tokens=list(CONTROL_TOKENS),
        model_max_length=config.max_positions,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in MARKUP_TOKENS])
    tokenizer.image_token, tokenizer.video_token = IMAGE_PAD, VIDEO_PAD
    tokenizer.chat_template = chat_template
    return tokenizer


def _processor(config: TinyModelConfig, tokenizer: PreTrainedTokenizerFast, chat_template: str) -> Qwen3VLProcessor:
    from transformers import Qwen2VLImageProcessor, Qwen3VLProcessor, Qwen3VLVideoProcessor

    image_processor = Qwen2VLImageProcessor(
        patch_size=config.patch_size,
        merge_size=config.merge_size,
        temporal_patch_size=2,
        size={"shortest_edge": config.min_pixels, "longest_edge": config.max_pixels},
        image_mean=[config.image_mean] * 3,
        image_std=[config.image_std] * 3,
    )
    video_processor = Qwen3VLVideoProcessor(patch_size=config.patch_size, merge_size=config.merge_size)
    return Qwen3VLProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        video_processor=video_processor,
        chat_template=chat_template,
    )


def _model_config(config: TinyModelConfig, tokenizer: PreTrainedTokenizerFast) -> Qwen3VLConfig:
    from transformers import Qwen3VLConfig

    token_ids = tokenizer.get_vocab()
    heads = config.hidden_size // config.head_dim
    half = config.head_dim // 2
    text = {
        "vocab_size": -(-len(tokenizer) // 64) * 64,
        "hidden_size": config.hidden_size,
        "intermediate_size": 2 * config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_positions,
        "rope_scaling": {
            "rope_type": "default",
            "mrope_section": [half // 2, half // 4, half // 4],
            "mrope_interleaved": True,
        },
        # Tied embeddings keep vLLM's packed CPU head at its old weights after a sync.
        "tie_word_embeddings": False,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {
        "depth": config.vision_depth,
        "hidden_size": config.hidden_size,
        "intermediate_size": 2 * config.hidden_size,
        "num_heads": heads,
        "patch_size": config.patch_size,
        "spatial_merge_size": config.merge_size,
        "temporal_patch_size": 2,
        "out_hidden_size": config.hidden_size,
        "num_position_embeddings": POSITION_TABLE**2,
        "deepstack_visual_indexes": list(config.deepstack_layers),
    }
    return Qwen3VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=token_ids[IMAGE_PAD],
        video_token_id=token_ids[VIDEO_PAD],
        vision_start_token_id=token_ids[VISION_START],
        vision_end_token_id=token_ids[VISION_END],
        tie_word_embeddings=False,
    )
