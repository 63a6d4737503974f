"""Estimates of the KL divergence from a reference policy, in the loss and in the reward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cv_lightning.ranges import NonNegativeFloat, PositiveInt, check_ranges

KLEstimator = Literal["k1", "abs", "k2", "k3"]


@dataclass(frozen=True, kw_only=True)
class KLConfig:
    """Penalty on the KL divergence from a reference policy."""

    weight: NonNegativeFloat = 0.0
    """0: no reference is loaded. The recipe: 0.001."""
    estimator: KLEstimator = "k3"
    """Estimate per token, see `kl_penalty`; the recipe: `k3`. In the loss, `k2` has the gradient of the reverse KL on
    policy, and `k1` has none in expectation unless `importance` is on. In the reward, `k1` is unbiased."""
    place: Literal["loss", "reward"] = "loss"
    """`loss`: a penalty per token. `reward`: its sum over a trajectory is subtracted from the reward before advantages
    are computed."""
    importance: bool = False
    """Multiply the loss's KL by the policy ratio, gradient included: unbiased off policy too (2512.02556)."""
    every: PositiveInt = 1
    """Interval in iterations between KL penalties in the loss. The reference runs only then, and the weight is
    multiplied by the interval (lazy regularisation, StyleGAN2, 1912.04958)."""
    reference_path: str | None = None
    """Hugging Face folder of the reference policy; null: `policy.path`. With LoRA and null, the reference is the policy
    without its adapters, and no second model is loaded."""

    def __post_init__(self) -> None:
        key = "model.init_args.algorithm.kl"
        check_ranges(self, key)
        if self.estimator not in get_args(KLEstimator):
            raise ValueError(f"{key}.estimator is one of k1, abs, k2, k3, not {self.estimator!r}")
        if self.place not in ("loss", "reward"):
            raise ValueError(f"{key}.place is loss or reward, not {self.place!r}")
        if self.place == "reward" and self.weight == 0:
            raise ValueError(f"{key}.place reward is not read if {key}.weight is 0: raise it, or leave both out")
        if self.importance and not self.in_loss:
            raise ValueError(f"{key}.importance needs {key}.weight above 0 and {key}.place loss")
        if self.every > 1 and not self.in_loss:
            raise ValueError(
                f"{key}.every {self.every}: must be 1 without a KL penalty in the loss ({key}.weight above 0, "
                f"{key}.place loss)"
            )

    @property
    def in_loss(self) -> bool:
        """True if the loss has the penalty."""
        return self.weight > 0 and self.place == "loss"

    @property
    def in_reward(self) -> bool:
        """True if the penalty is subtracted from the rewards."""
        return self.weight > 0 and self.place == "reward"

    def weight_at(self, iteration: int) -> float:
        """Weight of the penalty in the loss of an iteration, counted from 0; 0 if `every` skips the iteration."""
        return self.weight * self.every if self.in_loss and iteration % self.every == 0 else 0.0


def kl_penalty(logprobs: Tensor, reference: Tensor, estimator: KLEstimator) -> Tensor:
    """Per-token estimate of KL(policy || reference) from one sample of the policy (Schulman 2020).

    With p, r the two log-probabilities: k1 = p - r, abs = |p - r|, k2 = (p - r)^2 / 2, k3 = e^(r - p) - (r - p) - 1.
    k3's exponent is clamped to +-20 and its value to 10, as in the released code. Beyond that its gradient is 0,
    exactly where the policies are furthest apart; k2 has no such gap.

    Args:
        logprobs: [N] Log-probabilities of the policy.
        reference: [N] Log-probabilities of the reference policy.
        estimator: Name of the estimate.

    Returns:
        [N]

    Raises:
        ValueError: The estimator is unknown.
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
    raise ValueError(f"model.algorithm.kl.estimator is one of k1, abs, k2, k3, not {estimator!r}")


def rewards_with_kl(
    rewards: Sequence[float], logprobs: Tensor, reference: Tensor, sequence_index: Tensor, kl: KLConfig
) -> NDArray[np.float64]:
    """Rewards minus the weighted KL of each trajectory, summed over its sampled tokens.

    `k1` makes the expectation exactly the KL-regularised objective (RLOO, 2402.14740). Tokens whose log-probability is
    not finite count 0.

    Args:
        rewards: One per sequence.
        logprobs: [N] Log-probabilities of the policy that sampled.
        reference: [N] Log-probabilities of the reference policy.
        sequence_index: [N] Index of the reward that each token belongs to; a sequence may have no token.
        kl: Estimator and weight.

    Returns:
        float64 [len(rewards)].
    """
    penalty = kl_penalty(logprobs.detach().double(), reference.detach().double(), kl.estimator)
    penalty = torch.where(penalty.isfinite(), penalty, torch.zeros_like(penalty))
    sums = penalty.new_zeros(len(rewards)).index_add(0, sequence_index, penalty)
    return np.asarray(rewards, dtype=np.float64) - kl.weight * sums.cpu().numpy()
