"""The policy loss on flat tokens. Pure torch; nothing here knows of models, batches or ranks.

All inputs are `[N]`: the sampled tokens of a micro-batch. Normalisers are *global* counts over micro-batches and
ranks, fixed before the first micro-batch, so that k micro-batches give the gradient of one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class PolicyLossConfig:
    """Clipping, aggregation, KL and entropy."""

    clip_low: float = 0.2
    """The ratio is clipped below 1 - clip_low."""
    clip_high: float = 0.28
    """The ratio is clipped above 1 + clip_high (clip-higher, DAPO)."""
    clip_dual: float = 10.0
    """For negative advantages the loss is bounded by this times the advantage (dual clip)."""
    aggregation: Literal["token_mean", "seq_mean_token_mean"] = "token_mean"
    """`token_mean`: every token of the mini-batch weighs the same. `seq_mean_token_mean`: every trajectory does; what
    the released recipe really optimises with its micro-batch of 1 (reference.md item 35)."""
    kl_weight: float = 0.0
    """Weight of the KL penalty to the reference policy; 0: no reference is loaded. The recipe: 0.001."""
    kl: Literal["k1", "k2", "k3"] = "k3"
    """Estimator of the penalty (Schulman 2020); k3 is the recipe's."""
    entropy_weight: float = 0.0
    """Weight of the entropy bonus; the recipe: 0."""
    importance_cap: float = 2.0
    """Cap of the truncated importance weight from the engine, with `old_logprobs: trainer`."""

    def __post_init__(self) -> None:
        if not 0 <= self.clip_low < 1 or self.clip_high < 0 or self.clip_dual <= 1:
            raise ValueError("model.loss: 0 <= clip_low < 1, clip_high >= 0 and clip_dual > 1 must hold")
        if self.kl_weight < 0 or self.entropy_weight < 0 or self.importance_cap <= 0:
            raise ValueError("model.loss: kl_weight and entropy_weight must be at least 0, importance_cap above 0")


def clipped_surrogate(logprobs: Tensor, old: Tensor, advantages: Tensor, config: PolicyLossConfig) -> tuple[Tensor, Mapping[str, Tensor]]:
    """PPO's clipped loss with clip-higher and dual clip, per token.

    Args:
        logprobs: [N] of the policy, with gradient.
        old: [N] of the policy that sampled.
        advantages: [N]
        config: the clips.

    Returns:
        Loss per token [N], and the indicator of each clip [N].
    """
    log_ratio = (logprobs - old).clamp(-20.0, 20.0)
    ratio = log_ratio.exp()
    plain = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
    upper = torch.maximum(plain, clipped)
    bound = -advantages * config.clip_dual
    negative = advantages < 0
    loss = torch.where(negative, torch.minimum(upper, bound), upper)
    marks = {"clip_frac": (clipped > plain).float(), "clip_dual_frac": ((upper > bound) & negative).float()}
    return loss, marks


def kl_penalty(logprobs: Tensor, reference: Tensor, kind: str) -> Tensor:
    """Per-token estimate of KL(policy || reference), [N]: k1 = p - r, k2 = (p - r)^2 / 2, k3 = e^(r - p) - (r - p) - 1.

    k3 is clamped to [-10, 10] after its exponent to +-20, as the reference does; its gradient is 0 out there
    (reference.md item 33).
    """
    if kind == "k1":
        return logprobs - reference
    if kind == "k2":
        return 0.5 * (logprobs - reference).square()
    gap = (reference - logprobs).clamp(-20.0, 20.0)
    return (gap.exp() - gap - 1).clamp(-10.0, 10.0)


def token_weights(row_index: Tensor, num_tokens: float, num_rows: float, config: PolicyLossConfig) -> Tensor:
    """Weight of every token in the global loss, [N]; they sum to 1 over all micro-batches and ranks.

    Args:
        row_index: [N] which trajectory each token belongs to; a trajectory is never split.
        num_tokens: sampled tokens of the mini-batch, over all ranks.
        num_rows: trajectories with any sampled token, over all ranks.
        config: the aggregation.
    """
    if config.aggregation == "token_mean":
        return torch.full(row_index.shape, 1.0 / num_tokens, device=row_index.device)
    lengths = torch.bincount(row_index, minlength=1).clamp(min=1)
    return 1.0 / (lengths[row_index] * num_rows)


def policy_loss(
    logprobs: Tensor,
    old: Tensor,
    advantages: Tensor,
    weights: Tensor,
    config: PolicyLossConfig,
    *,
    engine: Tensor | None = None,
    reference: Tensor | None = None,
    entropy: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """This micro-batch's share of the global loss, and of its metrics.

    Args:
        logprobs: [N] of the policy, with gradient.
        old: [N] that the ratio is taken against.
        advantages: [N]
        weights: [N] of `token_weights`.
        config: the recipe.
        engine: [N] of the engine, where `old` is the trainer's: the loss is multiplied by the importance weight
            exp(old - engine), truncated at `importance_cap`. Never together with `old` from the engine (trap T53).
        reference: [N] of the reference policy, for the KL penalty.
        entropy: [N] of the distributions, for the bonus and the metric.

    Returns:
        Scalar loss, and metric shares that add up over micro-batches and ranks.
    """
    per_token, marks = clipped_surrogate(logprobs, old, advantages, config)
    metrics: dict[str, Tensor] = {**marks, "ratio_mean": (logprobs.detach() - old).clamp(-20, 20).exp()}
    if engine is not None:
        raw = (old - engine).clamp(-20.0, 20.0).exp()
        metrics["importance_weight_mean"] = raw
        per_token = per_token * raw.clamp(max=config.importance_cap)
    metrics["loss"] = per_token.detach()
    metrics["approx_kl"] = (old - logprobs).detach()
    if reference is not None:
        penalty = kl_penalty(logprobs, reference, config.kl)
        metrics["kl_to_reference"] = penalty.detach()
        per_token = per_token + config.kl_weight * penalty
    if entropy is not None:
        metrics["entropy"] = entropy.detach()
        if config.entropy_weight:
            per_token = per_token - config.entropy_weight * entropy
    loss = (per_token * weights).sum()
    return loss, {name: float((value * weights).sum()) for name, value in metrics.items()}
