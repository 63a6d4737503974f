"""Tiny random-weight checkpoints of the real architectures, with their real processors.

They are small enough to train from scratch on two CPU cores; transformers, vLLM and the trainer load them with the code
that loads the released models.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from cv_lightning.models.adapters import ModelAdapter, adapter_for
from cv_lightning.models.adapters.tiny import TinyModelConfig

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

MARKUP_TOKENS = tuple(
    f"<{end}{name}>" for name in ("tool_call", "tool_response", "think", "answer") for end in ("", "/")
)
"""Tokens that belong to the text, so that decoding keeps them."""

SINGLE_DIGITS = r"\d"
QWEN_PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Regular expression by which Qwen's tokenizers split text before merging (from their tokenizer.json)."""


def write_tiny_checkpoint(folder: str | Path, config: TinyModelConfig, *, corpus: Iterable[str]) -> int:
    """Write a random-weight checkpoint that `AutoProcessor`, `AutoModelForImageTextToText` and vLLM load.

    The caller's random state is left as it was.

    Args:
        folder: Made if absent; files of an earlier checkpoint are overwritten.
        config: The sizes.
        corpus: Texts that the tokenizer learns its merges from; markup such as `<tool_call>` is cut out of them.

    Returns:
        Number of parameters.
    """
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()  # of a single small shard
    adapter = adapter_for(config.family)
    tokenizer = _tokenizer(config, corpus, adapter)
    adapter.tiny_processor(config, tokenizer, adapter.chat_template()).save_pretrained(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = adapter.tiny_model(config, tokenizer)
    model.generation_config.eos_token_id = [tokenizer.eos_token_id]
    model.generation_config.pad_token_id = tokenizer.pad_token_id
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
    byte_pairs.train_from_iterator(_without_markup(corpus, adapter_for(config.family)), trainer)
    return byte_pairs


def _without_markup(corpus: Iterable[str], adapter: ModelAdapter) -> Iterable[str]:
    """The parts of the texts between special tokens, which merges never cross."""
    import re

    special = (adapter.end_of_turn, adapter.padding, *adapter.control_tokens, *MARKUP_TOKENS)
    marks = re.compile("|".join(map(re.escape, special)))
    for text in corpus:
        yield from (piece for piece in marks.split(text) if piece)


def _tokenizer(config: TinyModelConfig, corpus: Iterable[str], adapter: ModelAdapter) -> PreTrainedTokenizerFast:
    from tokenizers import AddedToken
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=train_byte_pairs(config, corpus),
        eos_token=adapter.end_of_turn,
        pad_token=adapter.padding,
        extra_special_tokens=list(adapter.control_tokens),
        model_max_length=config.max_positions,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in MARKUP_TOKENS])
    tokenizer.chat_template = adapter.chat_template()
    return tokenizer
