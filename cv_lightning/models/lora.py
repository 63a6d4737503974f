"""Low-rank adapters (LoRA, 2106.09685) through peft, which need a fraction of full fine-tuning's optimizer state.

Engine and export get merged weights, so that no other code handles adapters. Without its adapters, the policy is its
own reference.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cv_lightning.ranges import PositiveFloat, PositiveInt, check_ranges
from cv_lightning.types import CheckpointError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from cv_lightning.models.adapters import ModelAdapter

ADAPTER = "default"
"""peft's name for the only adapter."""
BASE, FACTORS = ".base_layer.", (".lora_A.", ".lora_B.")
"""Parts of the names of an adapted layer's own parameters and of its low-rank factors."""


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Size and place of the adapters. They have no dropout, because engine and trainer would disagree."""

    rank: PositiveInt = 32
    """Rank of each weight's update. RL needs small ranks only ("LoRA without regret", Thinking Machines, 2025)."""
    alpha: PositiveFloat = 32.0
    """The update is scaled by alpha / rank. LoRA needs about ten times the learning rate of full fine-tuning."""
    targets: tuple[str, ...] | None = None
    """Linear layers of the language model that get an adapter; null: all of them. The vision tower gets none."""

    def __post_init__(self) -> None:
        check_ranges(self, "model.init_args.policy.lora")
        if self.targets == ():
            raise ValueError("model.init_args.policy.lora.targets is empty; name layers, or leave it out for all")


def add_adapters(model: PreTrainedModel, config: LoraConfig, adapter: ModelAdapter) -> None:
    """Add adapters, whose update is 0 at first, and freeze all other parameters.

    Raises:
        CheckpointError: No layer matches the targets.
    """
    import peft
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

    given = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # type: ignore[arg-type]  # annotated as an integer, used as a factor
        target_modules=target_pattern(config, adapter),
        lora_dropout=0.0,
    )
    try:
        peft.inject_adapter_in_model(given, model, ADAPTER)
    except ValueError as error:
        raise CheckpointError(f"model.policy.lora.targets {list(_targets(config, adapter))}: {error}") from error
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_factor(name))
        if parameter.requires_grad and not is_deepspeed_zero3_enabled():  # ZeRO-3 keeps float32 copies
            parameter.data = parameter.data.float()  # most steps are smaller than a 16-bit number's last digit


def is_factor(name: str) -> bool:
    """True for the name of a parameter that belongs to a low-rank factor."""
    return any(mark in name for mark in FACTORS)


def target_pattern(config: LoraConfig, adapter: ModelAdapter) -> str:
    """Regular expression for the full names of adapted layers."""
    names = "|".join(map(re.escape, _targets(config, adapter)))
    return rf"{adapter.lora_scope}({names})"


def _targets(config: LoraConfig, adapter: ModelAdapter) -> tuple[str, ...]:
    return adapter.lora_targets if config.targets is None else config.targets


def adapter_layers(model: torch.nn.Module) -> dict[str, Any]:
    """Adapted layers by name; empty without LoRA."""
    return {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}


@contextmanager
def adapters_off(model: torch.nn.Module) -> Iterator[None]:
    """Context manager that disables the adapters, so that the model is the one before training."""
    layers = list(adapter_layers(model).values())
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
