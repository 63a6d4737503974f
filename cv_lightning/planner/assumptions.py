"""The flags of `plan`, in a file that imports nothing, so that its help is fast."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Gpu = Literal["b200", "h200", "h100", "a100", "a100-40", "l40s", "a6000", "rtx4090", "rtx3090"]


@dataclass(frozen=True, kw_only=True)
class Assumptions:
    """Assumptions about a run that its configs do not state."""

    gpu: Gpu = "h100"
    """Kind of GPU."""
    memory_gb: float | None = None
    """Memory of one GPU, or of the machine for a run on the CPU, in GB; by default the kind's."""
    mfu: float = 0.35
    """Fraction of the peak compute that training and prefill reach."""
    decode_tokens_per_s: float | None = None
    """Tokens that one GPU samples a second, over all its trajectories; by default what its bandwidth allows."""
    tokens_per_sequence: int | None = None
    """Mean length of a conversation or trajectory in tokens; by default 8192, or the longest allowed where that is
    shorter."""
    sampled_tokens: int = 600
    """Mean tokens of a trajectory that the policy samples; the rest is prompt, images and tool responses."""
    image_share: float = 0.5
    """Fraction of the tokens that are image tokens."""
    overhead_gb: float = 4.0
    """CUDA context, NCCL's buffers and fragmentation on each GPU, in GB."""

    def __post_init__(self) -> None:
        if not 0 < self.mfu <= 1 or not 0 <= self.image_share < 1:
            raise ValueError(f"--mfu {self.mfu} must be in (0, 1] and --image_share {self.image_share} in [0, 1)")
        for name in ("memory_gb", "decode_tokens_per_s", "tokens_per_sequence", "sampled_tokens"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"--{name} {value} must be above 0")


@dataclass(frozen=True, kw_only=True)
class PlanOptions(Assumptions):
    """Estimate memory and time of a training, and whether it fits.

    It takes the --config files and every setting of `fit`; the flags below are assumptions that no config states. Of
    the model only its config.json is read; for the models of the recipes not even that is needed. Exit code 0: planned;
    1: with --strict, the run does not fit; 2: wrong command line.
    """

    strict: bool = False
    """Exit with 1 where the run does not fit."""
    json: Path | None = None
    """Write the figures, in bytes and seconds, into this file; - prints them."""
