"""Low-rank adapters (LoRA, 2106.09685) through peft: full fine-tuning's gradient at a fraction of its optimizer state.

Engine and export get merged weights, so that nothing else has to know of adapters; without them the policy is its
own reference.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cv_lightning.types import CheckpointError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from cv_lightning.models.adapters import ModelAdapter

ADAPTER = "default"
"""peft's name of the one adapter."""
BASE, FACTORS = ".base_layer.", (".lora_A.", ".lora_B.")
"""Marks in the names of an adapted layer's own parameters and of its low-rank factors."""


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Size and place of the adapters. They have no dropout: engine and trainer would disagree."""

    rank: int = 32
    """Of the update of each weight. Small ranks are enough for RL ("LoRA without regret", Thinking Machines, 2025)."""
    alpha: float = 32.0
    """The update is scaled by this over the rank. LoRA wants about ten times the learning rate of full fine-tuning."""
    targets: tuple[str, ...] | None = None
    """Linear layers of the language model that get one; null: all of them. The vision tower stays as it is."""

    def __post_init__(self) -> None:
        if self.rank < 1 or not self.alpha > 0 or self.targets == ():
            raise ValueError(
                f"model.policy.lora: rank {self.rank} must be at least 1, alpha {self.alpha} above 0, and targets "
                f"{self.targets} not empty"
            )


def add_adapters(model: PreTrainedModel, config: LoraConfig, adapter: ModelAdapter) -> None:
    """Put adapters that change nothing yet into the model, and freeze everything else.

    Raises:
        CheckpointError: No layer has a name among the targets.
    """
    import peft
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

    given = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # type: ignore[arg-type]  # an integer by its hint, a factor in its use
        target_modules=target_pattern(config, adapter),
        lora_dropout=0.0,
    )
    try:
        peft.inject_adapter_in_model(given, model, ADAPTER)
    except ValueError as error:
        raise CheckpointError(f"model.policy.lora.targets {list(_targets(config, adapter))}: {error}") from error
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(mark in name for mark in FACTORS))
        if parameter.requires_grad and not is_deepspeed_zero3_enabled():  # which keeps float32 copies by itself
            parameter.data = parameter.data.float()  # most steps are smaller than a 16-bit number's last digit


def target_pattern(config: LoraConfig, adapter: ModelAdapter) -> str:
    """The regular expression that the whole name of an adapted layer matches."""
    names = "|".join(map(re.escape, _targets(config, adapter)))
    return rf"{adapter.lora_scope}({names})"


def _targets(config: LoraConfig, adapter: ModelAdapter) -> tuple[str, ...]:
    return adapter.lora_targets if config.targets is None else config.targets


def adapter_layers(model: torch.nn.Module) -> dict[str, Any]:
    """The adapted layers by name; empty without LoRA."""
    return {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}


@contextmanager
def adapters_off(model: torch.nn.Module) -> Iterator[None]:
    """The model as it was before training, for as long as the context lasts."""
    layers = list(adapter_layers(model).values())
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
