"""`python -m cv_lightning tiny`: write a tiny random-weight checkpoint for the embedded digits task."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path

from cv_lightning.agent.prompt import PromptConfig
from cv_lightning.digits.demonstrations import tokenizer_corpus
from cv_lightning.digits.scenes import DigitsConfig
from cv_lightning.digits.tiny import write_tiny_checkpoint
from cv_lightning.models.adapters import known_types
from cv_lightning.models.adapters.tiny import TinyModelConfig


@dataclass(frozen=True, kw_only=True)
class TinyCheckpoint:
    """A checkpoint to write."""

    out: Path
    """Folder; made if absent."""
    model: TinyModelConfig = field(default_factory=TinyModelConfig)
    """Family, sizes and seed of the model."""
    digits: DigitsConfig = field(default_factory=DigitsConfig)
    """The task whose phrases the tokenizer merges."""
    prompt: PromptConfig = field(default_factory=PromptConfig)
    """The agent's words, merged too."""


def write(checkpoint: TinyCheckpoint) -> int:
    """Write the checkpoint; returns its number of parameters."""
    return write_tiny_checkpoint(
        checkpoint.out,
        checkpoint.model,
        corpus=tokenizer_corpus(checkpoint.digits, checkpoint.prompt),
    )


def main(args: list[str] | None = None) -> int:
    """Command line entry; returns the exit code."""
    import jsonargparse

    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = jsonargparse.ArgumentParser(prog="cv_lightning tiny", description=__doc__)
    parser.add_argument("--config", action="config", help="file with any of the arguments below")
    parser.add_argument("--family", type=str, default="qwen3_vl", help=f"architecture: {', '.join(known_types())}")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights")
    parser.add_class_arguments(TinyCheckpoint, as_group=False, sub_configs=True)
    for name in ("family", "seed"):
        parser.link_arguments(name, f"model.{name}")
    given = parser.parse_args(args)
    try:
        built = parser.instantiate(given)
        checkpoint = TinyCheckpoint(out=built.out, model=built.model, digits=built.digits, prompt=built.prompt)
    except ValueError as error:  # a config's own cross-check; it names the flag
        print(error, file=sys.stderr)
        return 2
    parameters = write(checkpoint)
    print(f"{parameters / 1e6:.2f} M parameters in {checkpoint.out}")
    return 0
