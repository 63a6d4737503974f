"""Tiny random-weight checkpoints of the real Qwen3-VL and Qwen2.5-VL architectures, with their real processors.

Small enough to train from scratch on two CPU cores, yet loaded by the same code as the released models: everything
that reads a checkpoint folder (transformers, vLLM, the trainer) sees nothing special about it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cv_lightning.models.tokens import END_OF_TURN, IMAGE_PAD, PADDING, VIDEO_PAD, VISION_END, VISION_START

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import (
        PreTrainedModel,
        PreTrainedTokenizerFast,
        Qwen2_5_VLProcessor,
        Qwen2VLImageProcessor,
        Qwen3VLProcessor,
    )

Family = Literal["qwen3_vl", "qwen2_5_vl"]
PATCH_SIZES: dict[Family, int] = {"qwen3_vl": 16, "qwen2_5_vl": 14}
"""Side of a vision patch in pixels."""
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
    """Sizes of a tiny Qwen-VL.

    The defaults have 2.5 M (Qwen3-VL) or 2.3 M (Qwen2.5-VL) parameters and read digits scenes of 3x3 vision tokens.
    """

    family: Family = "qwen3_vl"
    """Architecture."""
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
    """Qwen3-VL: vision blocks whose features are added to the first layers of the language model."""
    full_attention_every: int = 2
    """Qwen2.5-VL: every so many-th vision block attends to the whole image (the 8th in the released models), the
    others within windows."""
    window_tokens: int = 2
    """Qwen2.5-VL: side of a window in vision tokens (4 in the released models)."""
    merge_size: int = 2
    """Patches a side that become one vision token."""
    min_tokens: int = 5
    """Images of fewer vision tokens are enlarged. The defaults show every square image as 3x3 tokens (96x96 pixels
    in Qwen3-VL, 84x84 in Qwen2.5-VL), and leave other shapes enough room that their size on the grid needs no second
    resize."""
    max_tokens: int = 12
    """Images of more vision tokens are reduced."""
    image_mean: float = 1.0
    """1 makes a white background exactly 0, without which position embeddings drown in it and nothing is learned."""
    image_std: float = 0.5
    """Divisor after the mean is taken off, both on a scale of 0 to 1."""
    max_positions: int = 4096
    """Longest sequence in tokens."""
    tie_embeddings: bool = False
    """Output head and word embeddings are one matrix, as in the small released models."""
    initializer_range: float = 0.02
    """Standard deviation of the random weights; the released models began with 0.02."""
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
        shares = self.mrope_shares
        if self.head_dim % (2 * sum(shares)):
            raise ValueError(
                f"--head_dim {self.head_dim} must be a multiple of {2 * sum(shares)}: the mRoPE of --family "
                f"{self.family} splits half of it {' : '.join(map(str, shares))}"
            )
        self._check_vision()
        if self.vocabulary < 256:
            raise ValueError(f"--vocabulary {self.vocabulary} must be at least 256, one entry a byte")

    def _check_vision(self) -> None:
        if not 1 <= self.min_tokens <= self.max_tokens:
            raise ValueError(f"1 <= --min_tokens {self.min_tokens} <= --max_tokens {self.max_tokens} must hold")
        if self.family == "qwen2_5_vl":
            if not 1 <= self.full_attention_every <= self.vision_depth or self.window_tokens < 1:
                raise ValueError(
                    f"--full_attention_every {self.full_attention_every} must be 1 to --vision_depth "
                    f"{self.vision_depth}, and --window_tokens {self.window_tokens} at least 1"
                )
            return
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

    @property
    def mrope_shares(self) -> tuple[int, int, int]:
        """Parts of half a head's width that rotate by time, height and width; their ratio is what counts."""
        return (2, 3, 3) if self.family == "qwen2_5_vl" else (2, 1, 1)

    @property
    def mrope_section(self) -> list[int]:
        """Rotary frequencies by time, height and width; together head_dim / 2."""
        return [self.head_dim // 2 * share // sum(self.mrope_shares) for share in self.mrope_shares]

    @property
    def patch_size(self) -> int:
        """Side of a vision patch in pixels."""
        return PATCH_SIZES[self.family]

    @property
    def factor(self) -> int:
        """Side of a vision token in pixels."""
        return self.patch_size * self.merge_size

    @property
    def min_pixels(self) -> int:
        """Smallest image the model sees."""
        return self.min_tokens * self.factor**2

    @property
    def max_pixels(self) -> int:
        """Largest image the model sees."""
        return self.max_tokens * self.factor**2


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

    make_processor, make_model = (
        (_qwen25_processor, _qwen25_model) if config.family == "qwen2_5_vl" else (_qwen3_processor, _qwen3_model)
    )
    processor = make_processor(config, _tokenizer(config, corpus, chat_template), chat_template)
    processor.save_pretrained(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = make_model(config, processor.tokenizer)
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


def _image_processor(config: TinyModelConfig) -> Qwen2VLImageProcessor:
    """Both families have the same class, at different patch sizes."""
    from transformers import Qwen2VLImageProcessor

    return Qwen2VLImageProcessor(
        patch_size=config.patch_size,
        merge_size=config.merge_size,
        temporal_patch_size=2,
        size={"shortest_edge": config.min_pixels, "longest_edge": config.max_pixels},
        image_mean=[config.image_mean] * 3,
        image_std=[config.image_std] * 3,
    )


def _text_sizes(config: TinyModelConfig, tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """What the language models of both families are told alike."""
    return {
        "vocab_size": -(-len(tokenizer) // 64) * 64,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.hidden_size // config.head_dim,
        "num_key_value_heads": config.num_key_value_heads,
        "max_position_embeddings": config.max_positions,
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": config.initializer_range,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def _vision_sizes(config: TinyModelConfig) -> dict[str, Any]:
    """What the vision towers of both families are told alike."""
    return {
        "depth": config.vision_depth,
        "hidden_size": config.hidden_size,
        "num_heads": config.hidden_size // config.head_dim,
        "patch_size": config.patch_size,
        "spatial_merge_size": config.merge_size,
        "temporal_patch_size": 2,
        "out_hidden_size": config.hidden_size,
        "initializer_range": config.initializer_range,
    }


def _special_ids(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    ids = tokenizer.get_vocab()
    names = {"image_token": IMAGE_PAD, "video_token": VIDEO_PAD}
    names |= {"vision_start_token": VISION_START, "vision_end_token": VISION_END}
    return {f"{name}_id": ids[token] for name, token in names.items()}


# ------------------------------------------------------------------------------------------------ Qwen3-VL
def _qwen3_processor(
    config: TinyModelConfig, tokenizer: PreTrainedTokenizerFast, chat_template: str
) -> Qwen3VLProcessor:
    from transformers import Qwen3VLProcessor, Qwen3VLVideoProcessor

    return Qwen3VLProcessor(
        image_processor=_image_processor(config),
        tokenizer=tokenizer,
        video_processor=Qwen3VLVideoProcessor(patch_size=config.patch_size, merge_size=config.merge_size),
        chat_template=chat_template,
    )


def _qwen3_model(config: TinyModelConfig, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    text = _text_sizes(config, tokenizer) | {
        "intermediate_size": 2 * config.hidden_size,
        "head_dim": config.head_dim,
        "rope_scaling": {
            "rope_type": "default",
            "mrope_section": config.mrope_section,
            "mrope_interleaved": True,
        },
    }
    vision = _vision_sizes(config) | {
        "intermediate_size": 2 * config.hidden_size,
        "num_position_embeddings": POSITION_TABLE**2,
        "deepstack_visual_indexes": list(config.deepstack_layers),
    }
    return Qwen3VLForConditionalGeneration(
        Qwen3VLConfig(
            text_config=text,
            vision_config=vision,
            tie_word_embeddings=config.tie_embeddings,
            **_special_ids(tokenizer),
        )
    )


# ------------------------------------------------------------------------------------------------ Qwen2.5-VL
def _qwen25_processor(
    config: TinyModelConfig, tokenizer: PreTrainedTokenizerFast, chat_template: str
) -> Qwen2_5_VLProcessor:
    from transformers import Qwen2_5_VLProcessor, Qwen2VLVideoProcessor

    return Qwen2_5_VLProcessor(
        image_processor=_image_processor(config),
        tokenizer=tokenizer,
        video_processor=Qwen2VLVideoProcessor(patch_size=config.patch_size, merge_size=config.merge_size),
        chat_template=chat_template,
    )


def _qwen25_model(config: TinyModelConfig, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    text = _text_sizes(config, tokenizer) | {
        "intermediate_size": 3 * config.hidden_size,
        "bos_token_id": None,
        "rope_scaling": {"type": "mrope", "rope_type": "default", "mrope_section": config.mrope_section},
    }
    vision = _vision_sizes(config) | {
        "intermediate_size": 3 * config.hidden_size,
        "window_size": config.window_tokens * config.factor,
        "fullatt_block_indexes": list(
            range(config.full_attention_every - 1, config.vision_depth, config.full_attention_every)
        ),
    }
    return Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(
            text_config=text,
            vision_config=vision,
            tie_word_embeddings=config.tie_embeddings,
            **_special_ids(tokenizer),
        )
    )
