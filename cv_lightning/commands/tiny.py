"""`python -m cv_lightning tiny`: write a tiny random-weight Qwen3-VL checkpoint for the embedded digits task."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

from cv_lightning.agent.prompt import PromptConfig, chat_template
from cv_lightning.data.demonstrations import tokenizer_corpus
from cv_lightning.data.digits import DigitsConfig
from cv_lightning.model.tiny import TinyModelConfig, write_tiny_checkpoint


@dataclass(frozen=True, kw_only=True)
class TinyCheckpoint:
    """A checkpoint to write."""

    out: Path
    """Folder; made if absent."""
    seed: int = 0
    """Seed of the weights."""
    model: TinyModelConfig = field(default_factory=TinyModelConfig)
    """Sizes of the model."""
    digits: DigitsConfig = field(default_factory=DigitsConfig)
    """The task whose phrases the tokenizer merges."""
    prompt: PromptConfig = field(default_factory=PromptConfig)
    """The agent's words, merged too."""


def write(checkpoint: TinyCheckpoint) -> int:
    """Write the checkpoint; returns its number of parameters."""
    return write_tiny_checkpoint(
        checkpoint.out,
        replace(checkpoint.model, seed=checkpoint.seed),
        corpus=tokenizer_corpus(checkpoint.digits, checkpoint.prompt),
        chat_template=chat_template(),
    )


def main(args: list[str] | None = None) -> int:
    """Command line entry; returns the exit code."""
    import jsonargparse

    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    try:
        checkpoint = jsonargparse.auto_cli(TinyCheckpoint, as_positional=False, args=args, prog="cv_lightning tiny")
    except ValueError as error:  # a config's own cross-check; it names the flag
        print(error, file=sys.stderr)
        return 2
    parameters = write(checkpoint)
    print(f"{parameters / 1e6:.2f} M parameters in {checkpoint.out}")
    return 0
