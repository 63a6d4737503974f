"""Correction for the mismatch between the engine that sampled and the trainer's own log-probabilities."""

from __future__ import annotations

import torch
from torch import Tensor

from cv_lightning.rl.losses.base import MAX_LOG_RATIO, TokenBatch


def importance_weights(
    tokens: TokenBatch, tis_clip: float | None, sequence_mask: tuple[float, float] | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Weight of every token for the gap between the engine and the trainer's `old_logprobs`.

    Args:
        tokens: With `rollout_logprobs`.
        tis_clip: The token's ratio is truncated at this (truncated importance sampling); None: no weight.
        sequence_mask: Sequences whose geometric-mean ratio lies outside [low, high] get a weight of 0; None: none does.

    Returns:
        Weights [N], and metric shares: the raw ratio, what was truncated, what was masked, the absolute gap in nats.
    """
    assert tokens.rollout_logprobs is not None
    gap = tokens.old_logprobs - tokens.rollout_logprobs
    raw = gap.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    weight, clipped, masked = torch.ones_like(raw), torch.zeros_like(tokens.mask), torch.zeros_like(tokens.mask)
    if tis_clip is not None:
        weight, clipped = raw.clamp(max=tis_clip), raw > tis_clip
    if sequence_mask is not None:
        # The mean of log-ratios, not their sum: a product over a long sequence leaves any band.
        low, high = sequence_mask
        ratio = tokens.sequence_means(gap).exp()
        masked = (ratio < low) | (ratio > high)
        weight = weight.masked_fill(masked, 0.0)
    return weight, {
        "importance_weight_mean": tokens.mean(raw),
        "tis_clip_frac": tokens.mean(clipped),
        "sequence_mask_frac": tokens.mean(masked),
        "engine_gap_mean": tokens.mean(gap.abs()),
    }
