"""Special tokens of the Qwen-VL families, and which of them must not be sampled. Imports nothing heavy."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

END_OF_TURN = "<|im_end|>"
PADDING = "<|endoftext|>"
IMAGE_PAD = "<|image_pad|>"
VIDEO_PAD = "<|video_pad|>"
VISION_START, VISION_END = "<|vision_start|>", "<|vision_end|>"
VISION_TOKENS = (IMAGE_PAD, VIDEO_PAD, VISION_START, VISION_END, "<|vision_pad|>")
"""Only images may put these into a sequence (trap T6)."""

LOGIT_BAN = -100.0
"""Added to the logits of banned ids, before temperature, by engines and trainer alike."""


def vision_token_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids that only images may put into a sequence; banned in sampling and in log-probabilities (trap T6)."""
    vocabulary = tokenizer.get_vocab()
    return [vocabulary[token] for token in VISION_TOKENS if token in vocabulary]
