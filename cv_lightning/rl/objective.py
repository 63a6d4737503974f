"""The objective of an optimizer step: the policy loss, the KL penalty and the entropy bonus."""

from __future__ import annotations

import torch
from torch import Tensor

from cv_lightning.rl.aggregation import aggregation_weights
from cv_lightning.rl.algorithm import AlgorithmConfig
from cv_lightning.rl.kl import kl_penalty
from cv_lightning.rl.losses import PolicyLoss, PPOClip, TokenBatch
from cv_lightning.rl.losses.base import MAX_LOG_RATIO


def total_loss(
    tokens: TokenBatch, algorithm: AlgorithmConfig, kl_weight: float | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """This micro-batch's share of the global loss and of its metrics; shares add up over micro-batches and ranks.

    A token whose old or rollout log-probability is not finite has weight 0 and is counted in `nonfinite_frac`. One
    whose reference log-probability is not finite has no KL penalty and is counted in `nonfinite_reference_frac`. The
    normalisers stay as they are. A NaN of the policy's own log-probabilities is not hidden. With N = 0 the loss is 0
    and still has a graph, and the metrics have the same names.

    Args:
        tokens: Tokens of the micro-batch; their weights are set here.
        algorithm: What to optimise.
        kl_weight: Weight of the KL penalty in this iteration's loss; None: that of the first iteration.

    Returns:
        Scalar loss, and detached scalar metric shares by name (docs/algorithms.md). `loss` and `pg_loss` are weighted
        as `aggregation` says, all others are means over tokens.

    Raises:
        ValueError: An input is missing that the algorithm reads.
    """
    kl_weight = algorithm.kl.weight_at(0) if kl_weight is None else kl_weight
    _check_inputs(tokens, kl_weight, algorithm.entropy_weight)
    aggregation = algorithm.aggregation, algorithm.constant_length
    tokens.set_weights(
        aggregation_weights(tokens.sequence_index, tokens.num_tokens, tokens.num_sequences, *aggregation)
    )
    metrics: dict[str, Tensor] = {}
    if tokens.rollout_logprobs is not None:
        weights, metrics = importance_weights(tokens, algorithm.tis_clip, algorithm.sequence_mask)
        tokens.importance_weights = weights
    policy_loss: PolicyLoss = algorithm.loss or PPOClip()
    pg_loss, policy_metrics = policy_loss(tokens)
    terms, regulariser_metrics = _regularisers(tokens, algorithm, kl_weight)
    loss = pg_loss if terms is None else pg_loss + (terms * tokens.weights).sum()
    nonfinite = {"nonfinite_frac": (~tokens.mask).sum() / max(tokens.num_tokens, 1e-9)}
    losses = {"loss": loss.detach(), "pg_loss": pg_loss.detach()}
    return loss, losses | policy_metrics | metrics | regulariser_metrics | nonfinite


def importance_weights(
    tokens: TokenBatch, tis_clip: float | None, sequence_mask: tuple[float, float] | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Correction of every token for the gap between the engine's and the trainer's old log-probabilities.

    Args:
        tokens: Tokens with `rollout_logprobs`.
        tis_clip: Upper bound of a token's ratio (truncated importance sampling); None: all weights are 1.
        sequence_mask: Allowed range of a sequence's geometric-mean ratio; outside, weights are 0. None: any.

    Returns:
        Weights [N], and metric shares: mean raw ratio, fractions that are truncated and masked, absolute gap in nats.
    """
    assert tokens.rollout_logprobs is not None
    gap = tokens.old_logprobs - tokens.rollout_logprobs
    raw = gap.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    weight, clipped, masked = torch.ones_like(raw), torch.zeros_like(tokens.mask), torch.zeros_like(tokens.mask)
    if tis_clip is not None:
        weight, clipped = raw.clamp(max=tis_clip), raw > tis_clip
    if sequence_mask is not None:
        # The mean of log-ratios, not their sum: a product over a long sequence leaves any range.
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


def _regularisers(
    tokens: TokenBatch, algorithm: AlgorithmConfig, kl_weight: float
) -> tuple[Tensor | None, dict[str, Tensor]]:
    """KL penalty and entropy bonus of each token's loss, [N], and their metric shares."""
    terms: Tensor | None = None
    metrics = {}
    if tokens.reference_logprobs is not None:
        usable = tokens.reference_logprobs.isfinite()
        reference = tokens.reference_logprobs.to(tokens.logprobs.dtype)
        reference = torch.where(usable, reference, tokens.logprobs.detach())
        penalty = kl_penalty(tokens.logprobs, reference, algorithm.kl.estimator) * usable
        metrics["nonfinite_reference_frac"] = tokens.mean(~usable)
        metrics["kl_to_reference"] = tokens.mean(penalty)
        if algorithm.kl.importance:
            penalty = penalty * tokens.log_ratio().exp()
        if kl_weight > 0:
            terms = kl_weight * penalty
    if tokens.entropy is not None:
        metrics["entropy"] = tokens.mean(tokens.entropy)
        if algorithm.entropy_weight > 0:
            bonus = -algorithm.entropy_weight * tokens.entropy
            terms = bonus if terms is None else terms + bonus
    return terms, metrics


def _check_inputs(tokens: TokenBatch, kl_weight: float, entropy_weight: float) -> None:
    if kl_weight > 0 and tokens.reference_logprobs is None:
        raise ValueError("model.algorithm.kl.weight is above 0 but no log-probabilities of a reference were given")
    if entropy_weight > 0 and tokens.entropy is None:
        raise ValueError("model.algorithm.entropy_weight is above 0 but no entropy was given")
    learns = len(tokens.logprobs) and tokens.logprobs.requires_grad
    if entropy_weight > 0 and learns and tokens.entropy is not None and not tokens.entropy.requires_grad:
        raise ValueError("model.algorithm.entropy_weight is above 0 but the entropy carries no gradient")
