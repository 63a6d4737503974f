"""A policy loss of one's own: SAPO, a soft gate in place of PPO's clip (2511.20347)."""

from __future__ import annotations

import torch
from torch import Tensor

from cv_lightning.rl.losses import PolicyLoss, TokenBatch


class SAPO(PolicyLoss):
    """-A g(r) with the gate g(r) = 4 / tau * sigmoid(tau (r - 1)), steeper for negative advantages.

    Args:
        tau_positive: Temperature of the gate where the advantage is above 0.
        tau_negative: Temperature of the gate elsewhere.
    """

    def __init__(self, tau_positive: float = 1.0, tau_negative: float = 1.05) -> None:
        if min(tau_positive, tau_negative) <= 0:
            raise ValueError(f"SAPO: tau_positive {tau_positive} and tau_negative {tau_negative} must be above 0")
        self.tau_positive, self.tau_negative = tau_positive, tau_negative

    def __call__(self, tokens: TokenBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and metrics of one micro-batch."""
        ratio = tokens.log_ratio().exp()
        tau = torch.where(tokens.advantages > 0, self.tau_positive, self.tau_negative)
        gate = torch.sigmoid(tau * (ratio - 1))
        metrics = {"ratio_mean": tokens.mean(ratio), "gate_mean": tokens.mean(4 * gate * (1 - gate))}
        return tokens.pg_loss(-tokens.advantages * gate * 4 / tau), metrics
