"""Sizes of tiny random-weight checkpoints."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from cv_lightning.ranges import PositiveFloat, PositiveInt, Range, check_ranges


@dataclass(frozen=True, kw_only=True)
class TinySizes:
    """Sizes of a tiny model.

    The defaults have 2.5 M (Qwen3-VL) or 2.3 M (Qwen2.5-VL) parameters and read digits scenes of 3x3 vision tokens.
    """

    hidden_size: PositiveInt = 128
    """Width of the language model and of the vision tower; a multiple of `head_dim`."""
    num_layers: PositiveInt = 4
    """Layers of the language model."""
    head_dim: PositiveInt = 32
    """Width of an attention head; decides the split of mRoPE into time, height and width."""
    num_key_value_heads: PositiveInt = 4
    """Divides hidden_size / head_dim."""
    vision_depth: PositiveInt = 4
    """Blocks of the vision tower."""
    deepstack_layers: tuple[int, ...] = (1, 2)
    """Qwen3-VL: vision blocks whose features are added to the first layers of the language model."""
    full_attention_every: PositiveInt = 2
    """Qwen2.5-VL: interval of the vision blocks that attend to the whole image (8 in the released models); the others
    attend within windows."""
    window_tokens: PositiveInt = 2
    """Qwen2.5-VL: side of a window in vision tokens (4 in the released models)."""
    merge_size: PositiveInt = 2
    """Side of the square of patches that becomes one vision token."""
    min_tokens: PositiveInt = 5
    """Images of fewer vision tokens are enlarged. With the defaults every square image has 3x3 tokens (96x96 pixels
    in Qwen3-VL, 84x84 in Qwen2.5-VL), and other shapes need no second resize after rounding to the grid."""
    max_tokens: PositiveInt = 12
    """Images of more vision tokens are reduced."""
    image_mean: float = 1.0
    """1 makes a white background exactly 0; otherwise it outweighs the position embeddings and nothing is learned."""
    image_std: PositiveFloat = 0.5
    """Divisor after the mean is subtracted, both on a scale of 0 to 1."""
    max_positions: PositiveInt = 4096
    """Longest sequence in tokens."""
    tie_embeddings: bool = False
    """Share one matrix between output head and word embeddings, as the small released models do."""
    initializer_range: PositiveFloat = 0.02
    """Standard deviation of the random weights; the released models began with 0.02."""
    tokenizer_merges: Literal["strings", "words"] = "strings"
    """strings: whole phrases of the corpus become one token, but digits stay separate (6-21 tokens per tool call);
    words: text is first split like Qwen's tokenizers do (35-49 tokens per call)."""
    vocabulary: Annotated[int, Range(at_least=256)] = 640
    """Most byte-pair entries: 256 bytes and the merges of the corpus; special tokens are added to them."""
    seed: int = 0
    """Seed of the weights."""

    def __post_init__(self) -> None:
        check_ranges(self)
        heads = self.hidden_size // self.head_dim
        if self.hidden_size % self.head_dim or heads < 1 or heads % self.num_key_value_heads:
            raise ValueError(
                f"--hidden_size {self.hidden_size} must be a multiple of --head_dim {self.head_dim}, and the resulting "
                f"{heads} heads a multiple of --num_key_value_heads {self.num_key_value_heads}"
            )
        if self.min_tokens > self.max_tokens:
            raise ValueError(f"--min_tokens {self.min_tokens} must be at most --max_tokens {self.max_tokens}")
