"""The policy loss on flat tokens. Pure torch; nothing here knows of models, batches or ranks.

Normalisers are *global* counts over micro-batches and ranks, fixed before the first micro-batch, so that k
micro-batches give the gradient of one.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from cv_lightning.rl.aggregation import row_means, token_weights
from cv_lightning.rl.kl import kl_penalty
from cv_lightning.rl.loss_config import PolicyLossConfig
from cv_lightning.rl.surrogates import MAX_LOG_RATIO, SURROGATES, Tokens, token_log_ratio

__all__ = ["LossInputs", "PolicyLossConfig", "importance_weights", "policy_loss"]


@dataclass(slots=True, kw_only=True)
class LossInputs:
    """The flat sampled tokens of one micro-batch; N may be 0, where a rank has fewer micro-batches than another."""

    logprobs: Tensor
    """[N] of the policy, with gradient."""
    old: Tensor
    """[N] what the ratio is taken against: the engine's, or the trainer's before the first step."""
    advantages: Tensor
    """[N]"""
    row_index: Tensor
    """[N] integers: which trajectory each token belongs to. Trajectories are never split over micro-batches."""
    num_tokens: float
    """Sampled tokens of the whole mini-batch, over micro-batches and ranks."""
    num_rows: float
    """Trajectories with a sampled token, same scope."""
    engine: Tensor | None = None
    """[N] engine log-probabilities, where `old` is the trainer's. Not where `old` is the engine's: the mismatch would
    be corrected twice (trap T53)."""
    reference: Tensor | None = None
    """[N] of the reference policy."""
    entropy: Tensor | None = None
    """[N] nats, of the policy's distributions; with gradient where `entropy_weight` is above 0."""

    def __post_init__(self) -> None:
        size = self.logprobs.shape
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor) and (value.dim() != 1 or value.shape != size):
                raise ValueError(
                    f"{field.name} has shape {list(value.shape)}; one entry per sampled token: {list(size)}"
                )
        if len(self.logprobs) and not (self.num_tokens > 0 and self.num_rows > 0):
            raise ValueError(
                f"num_tokens ({self.num_tokens}) and num_rows ({self.num_rows}) count the whole mini-batch, "
                f"which has at least the {len(self.logprobs)} tokens here"
            )


def policy_loss(inputs: LossInputs, config: PolicyLossConfig) -> tuple[Tensor, dict[str, Tensor]]:
    """This micro-batch's share of the global loss, and of its metrics.

    Shares add up over micro-batches and ranks. A token whose `old` or `engine` log-probability is NaN or infinite has
    no weight and is counted in `nonfinite_frac`; one whose `reference` log-probability is has no KL penalty and is
    counted in `nonfinite_reference_frac`. The normalisers stay as they are. A NaN of the policy's own is not hidden.
    With N = 0 the loss is 0 and still has a graph, and the metrics have the same names.

    Args:
        inputs: the tokens.
        config: what to optimise.

    Returns:
        Scalar loss, and detached scalar metric shares. `loss` and `surrogate_loss` are weighted as `aggregation` says,
        all others are means over tokens: `clip_frac`, `clip_dual_frac`, `ratio_saturated_frac` (no gradient, because
        the log-ratio is clamped), `ratio_mean` (before any clip), `approx_kl` (old minus policy), `nonfinite_frac`;
        with `engine` `importance_weight_mean` (before truncation), `importance_capped_frac`, `importance_masked_frac`,
        `engine_gap_mean` (absolute, nats); with `reference` `kl_to_reference`, `nonfinite_reference_frac`; with
        `entropy` `entropy`.

    Raises:
        ValueError: an input is missing that the config reads.
    """
    _check_inputs(inputs, config)
    tokens = _finite_tokens(inputs)
    surrogate = SURROGATES[config.policy](tokens, config.clips)
    metrics = {
        "clip_frac": surrogate.clipped,
        "clip_dual_frac": surrogate.capped,
        "ratio_saturated_frac": surrogate.saturated,
        "ratio_mean": surrogate.ratio,
        "approx_kl": -surrogate.log_ratio,
    }
    per_token = surrogate.loss
    if inputs.engine is not None:
        factor, marks = importance_weights(tokens.old, _aligned(inputs.engine, tokens), tokens, config)
        per_token = per_token * factor
        metrics |= marks
    surrogate_loss = per_token.detach()
    terms, marks = _regularisers(tokens, inputs, config)
    per_token = per_token + terms
    metrics |= marks
    weights = token_weights(tokens.row_index, inputs.num_tokens, inputs.num_rows, config).to(per_token.dtype)
    weights = weights * tokens.keep
    loss = (per_token * weights).sum() if len(weights) else inputs.logprobs.sum() * 0.0
    count = max(inputs.num_tokens, 1e-9)  # 0 only where no rank has a token
    shares = {name: (value.to(weights.dtype) * tokens.keep).sum() / count for name, value in metrics.items()}
    shares["nonfinite_frac"] = (~tokens.keep).sum() / count
    return loss, {"loss": loss.detach(), "surrogate_loss": (surrogate_loss * weights).sum(), **shares}


def importance_weights(
    old: Tensor, engine: Tensor, tokens: Tokens, config: PolicyLossConfig
) -> tuple[Tensor, dict[str, Tensor]]:
    """Weight of every token for the gap between the engine that sampled and the trainer's `old`.

    Args:
        old: [N] of the trainer, before the first step.
        engine: [N] of the engine.
        tokens: rows, and which tokens are kept.
        config: cap of the token weight, band of the sequence mask.

    Returns:
        Weights [N], and metrics [N]: the raw ratio, what was truncated, what was masked, the absolute gap.
    """
    gap = old - engine
    raw = gap.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    weight, capped, masked = torch.ones_like(raw), torch.zeros_like(tokens.keep), torch.zeros_like(tokens.keep)
    if config.importance_cap is not None:
        weight, capped = raw.clamp(max=config.importance_cap), raw > config.importance_cap
    if config.importance_band is not None:
        # The mean of log-ratios, not their sum: a product over a long sequence leaves any band (trap T19).
        low, high = config.importance_band
        sequence = row_means(gap, tokens.row_index, tokens.keep).exp()
        masked = (sequence < low) | (sequence > high)
        weight = weight.masked_fill(masked, 0.0)
    return weight, {
        "importance_weight_mean": raw,
        "importance_capped_frac": capped,
        "importance_masked_frac": masked,
        "engine_gap_mean": gap.abs(),
    }


def _regularisers(
    tokens: Tokens, inputs: LossInputs, config: PolicyLossConfig
) -> tuple[Tensor | float, dict[str, Tensor]]:
    """What KL and entropy add to the loss of each token, and their metrics [N]."""
    terms: Tensor | float = 0.0
    metrics = {}
    if inputs.reference is not None:
        usable = inputs.reference.isfinite()
        reference = torch.where(usable, inputs.reference.to(tokens.logprobs.dtype), tokens.logprobs.detach())
        penalty = kl_penalty(tokens.logprobs, reference, config.kl) * usable
        metrics["nonfinite_reference_frac"] = ~usable
        metrics["kl_to_reference"] = penalty.detach()
        if config.kl_importance:
            penalty = penalty * token_log_ratio(tokens).exp()
        if config.kl_weight > 0 and config.kl_in == "loss":
            terms = terms + config.kl_weight * penalty
    if inputs.entropy is not None:
        metrics["entropy"] = inputs.entropy.detach()
        if config.entropy_weight > 0:
            terms = terms - config.entropy_weight * inputs.entropy
    return terms, metrics


def _check_inputs(inputs: LossInputs, config: PolicyLossConfig) -> None:
    if config.kl_weight > 0 and config.kl_in == "loss" and inputs.reference is None:
        raise ValueError("model.loss.kl_weight is above 0 but no log-probabilities of a reference policy were given")
    if config.entropy_weight > 0:
        if inputs.entropy is None:
            raise ValueError("model.loss.entropy_weight is above 0 but no entropy was given")
        if len(inputs.logprobs) and inputs.logprobs.requires_grad and not inputs.entropy.requires_grad:
            raise ValueError("model.loss.entropy_weight is above 0 but the entropy carries no gradient")


def _finite_tokens(inputs: LossInputs) -> Tokens:
    """The tokens in at least float32; where `old` or `engine` is no number, `old` is the policy's and `keep` False."""
    dtype = torch.promote_types(inputs.logprobs.dtype, torch.float32)
    logprobs = inputs.logprobs.to(dtype)
    keep = inputs.old.isfinite()
    if inputs.engine is not None:
        keep = keep & inputs.engine.isfinite()
    return Tokens(
        logprobs=logprobs,
        old=torch.where(keep, inputs.old.to(dtype), logprobs.detach()),
        advantages=inputs.advantages.to(dtype),
        row_index=inputs.row_index.long(),
        keep=keep,
    )


def _aligned(engine: Tensor, tokens: Tokens) -> Tensor:
    return torch.where(tokens.keep, engine.to(tokens.old.dtype), tokens.old)
