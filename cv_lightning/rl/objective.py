"""What a step minimises: the policy loss, and what KL and entropy add to it."""

from __future__ import annotations

import torch
from torch import Tensor

from cv_lightning.rl.aggregation import aggregation_weights
from cv_lightning.rl.algorithm import AlgorithmConfig
from cv_lightning.rl.importance import importance_weights
from cv_lightning.rl.kl import kl_penalty
from cv_lightning.rl.losses import PolicyLoss, PPOClip, TokenBatch


def total_loss(
    tokens: TokenBatch, algorithm: AlgorithmConfig, kl_weight: float | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """This micro-batch's share of the global loss, and of its metrics.

    Shares add up over micro-batches and ranks. A token whose old or rollout log-probability is NaN or infinite has no
    weight and is counted in `nonfinite_frac`; one whose reference log-probability is has no KL penalty and is counted
    in `nonfinite_reference_frac`. The normalisers stay as they are. A NaN of the policy's own is not hidden. With
    N = 0 the loss is 0 and still has a graph, and the metrics have the same names.

    Args:
        tokens: Of the micro-batch; its weights are set here.
        algorithm: What to optimise.
        kl_weight: Of the penalty in this iteration's loss; None: as `algorithm.kl` says for the first iteration.

    Returns:
        Scalar loss, and detached scalar metric shares. `loss` and `pg_loss` are weighted as `aggregation` says, all
        others are means over tokens: those of the policy loss; `nonfinite_frac`; with rollout log-probabilities
        `importance_weight_mean` (before truncation), `tis_clip_frac`, `sequence_mask_frac`, `engine_gap_mean`
        (absolute, nats); with reference log-probabilities `kl_to_reference`, `nonfinite_reference_frac`; with entropy
        `entropy`.

    Raises:
        ValueError: An input is missing that the algorithm reads.
    """
    kl_weight = algorithm.kl.weight_at(0) if kl_weight is None else kl_weight
    _check_inputs(tokens, kl_weight, algorithm.entropy_weight)
    aggregation = algorithm.aggregation, algorithm.constant_length
    weights = aggregation_weights(tokens.sequence_index, tokens.num_tokens, tokens.num_sequences, *aggregation)
    tokens.set_weights(weights)
    metrics: dict[str, Tensor] = {}
    if tokens.rollout_logprobs is not None:
        correction = algorithm.tis_clip, algorithm.sequence_mask
        tokens.importance_weights, metrics = importance_weights(tokens, *correction)
    policy_loss: PolicyLoss = algorithm.loss or PPOClip()
    pg_loss, found = policy_loss(tokens)
    terms, regularisers = _regularisers(tokens, algorithm, kl_weight)
    loss = pg_loss if terms is None else pg_loss + (terms * tokens.weights).sum()
    nonfinite = {"nonfinite_frac": (~tokens.mask).sum() / max(tokens.num_tokens, 1e-9)}
    own = {"loss": loss.detach(), "pg_loss": pg_loss.detach()}
    return loss, own | found | metrics | regularisers | nonfinite


def _regularisers(
    tokens: TokenBatch, algorithm: AlgorithmConfig, kl_weight: float
) -> tuple[Tensor | None, dict[str, Tensor]]:
    """What KL and entropy add to the loss of each token, [N], and their metric shares."""
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
        raise ValueError(
            "model.algorithm.kl.weight is above 0 but no log-probabilities of a reference policy were given"
        )
    if entropy_weight > 0:
        if tokens.entropy is None:
            raise ValueError("model.algorithm.entropy_weight is above 0 but no entropy was given")
        if len(tokens.logprobs) and tokens.logprobs.requires_grad and not tokens.entropy.requires_grad:
            raise ValueError("model.algorithm.entropy_weight is above 0 but the entropy carries no gradient")
