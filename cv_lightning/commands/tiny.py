"""`cv-lightning tiny`: write a tiny random-weight checkpoint for the embedded digits task."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from cv_lightning.agent.prompt import PromptConfig
from cv_lightning.command_line import run_verb
from cv_lightning.digits.demonstrations import tokenizer_corpus
from cv_lightning.digits.scenes import DigitsConfig
from cv_lightning.digits.tiny import write_tiny_checkpoint
from cv_lightning.models.adapters.tiny import TinyModelConfig


@dataclass(frozen=True, kw_only=True)
class TinyCheckpoint:
    """A tiny checkpoint. --family and --seed are short for --model.family and --model.seed."""

    out: Path
    """Folder; made if absent."""
    model: TinyModelConfig = field(default_factory=TinyModelConfig)
    """Family, sizes and seed of the model."""
    digits: DigitsConfig = field(default_factory=DigitsConfig)
    """Task whose phrases the tokenizer merges."""
    prompt: PromptConfig = field(default_factory=PromptConfig)
    """The agent's texts, merged too."""


def write(checkpoint: TinyCheckpoint) -> int:
    """Write the checkpoint; returns its number of parameters."""
    corpus = tokenizer_corpus(checkpoint.digits, checkpoint.prompt)
    return write_tiny_checkpoint(checkpoint.out, checkpoint.model, corpus=corpus)


def _write(checkpoint: TinyCheckpoint) -> None:
    print(f"{write(checkpoint) / 1e6:.2f} M parameters in {checkpoint.out}")


main = partial(
    run_verb,
    TinyCheckpoint,
    name="tiny",
    run=_write,
)
