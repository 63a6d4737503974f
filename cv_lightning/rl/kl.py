"""Estimates of the KL divergence from a reference policy, in the loss and in the reward."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cv_lightning.rl.loss_config import KLEstimator, PolicyLossConfig


def kl_penalty(logprobs: Tensor, reference: Tensor, estimator: KLEstimator) -> Tensor:
    """Per-token estimate of KL(policy || reference) from one sample of the policy (Schulman 2020).

    With p, r the two log-probabilities: k1 = p - r, abs = |p - r|, k2 = (p - r)^2 / 2, k3 = e^(r - p) - (r - p) - 1.
    k3's exponent is clamped to +-20 and its value to 10, as in the reference: beyond, its gradient is 0, exactly
    where the policies are furthest apart (reference.md item 33); k2 has no such hole.

    Args:
        logprobs: [N] of the policy.
        reference: [N] of the reference policy.
        estimator: which one.

    Returns:
        [N]

    Raises:
        ValueError: the estimator is unknown.
    """
    gap = logprobs - reference
    if estimator == "k1":
        return gap
    if estimator == "abs":
        return gap.abs()
    if estimator == "k2":
        return 0.5 * gap.square()
    if estimator == "k3":
        inverse = (reference - logprobs).clamp(-20.0, 20.0)
        return (inverse.exp() - inverse - 1).clamp(-10.0, 10.0)
    raise ValueError(f"model.loss.kl is one of k1, abs, k2, k3, not {estimator!r}")


def rewards_with_kl(
    rewards: Sequence[float], logprobs: Tensor, reference: Tensor, row_index: Tensor, config: PolicyLossConfig
) -> NDArray[np.float64]:
    """Rewards less the weighted KL of each trajectory: the form that keeps the penalty out of the loss.

    reward_i - kl_weight * sum over i's sampled tokens of the estimate; advantages are computed from the result. `k1`
    makes its expectation exactly the KL-regularised objective (RLOO, 2402.14740). Tokens with a NaN or infinite
    log-probability count nothing.

    Args:
        rewards: one per row.
        logprobs: [N] of the policy that sampled (the engine's, or the trainer's before the first step).
        reference: [N] of the reference policy.
        row_index: [N] which of `rewards` each token belongs to; a row may have no token.
        config: estimator and weight.

    Returns:
        float64 [len(rewards)].

    Raises:
        ValueError: the config keeps the KL in the loss, or a row index has no reward.
    """
    if config.kl_in != "reward":
        raise ValueError("model.loss.kl_in is loss: the policy loss holds the penalty, and the reward must not as well")
    if len(row_index) and int(row_index.max()) >= len(rewards):
        raise ValueError(f"row {int(row_index.max())} has tokens but there are {len(rewards)} rewards")
    penalty = kl_penalty(logprobs.detach().double(), reference.detach().double(), config.kl)
    penalty = torch.where(penalty.isfinite(), penalty, torch.zeros_like(penalty))
    sums = penalty.new_zeros(len(rewards)).index_add(0, row_index, penalty)
    return np.asarray(rewards, dtype=np.float64) - config.kl_weight * sums.cpu().numpy()
