"""PPO's clipped loss with a bound for each direction and a dual clip."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from cv_lightning.rl.losses.base import MAX_LOG_RATIO, PolicyLoss, TokenBatch, check_range


class PPOClip(PolicyLoss):
    """max(-A r, -A clip(r, 1 - low, 1 + high)) with the token's ratio r; where A < 0, at most dual_clip * |A|.

    PPO (1707.06347), clip-higher (DAPO, 2503.14476), dual clip (1912.09729). The defaults are the recipe's.

    Args:
        clip_low: The ratio is bounded below at 1 - clip_low.
        clip_high: The ratio is bounded above at 1 + clip_high.
        dual_clip: Above 1. Bound of the loss for negative advantages, in units of the advantage; `.inf`: off.
    """

    def __init__(self, clip_low: float = 0.2, clip_high: float = 0.28, dual_clip: float = 10.0) -> None:
        check_range("clip_low", clip_low, 0, 1)
        check_range("clip_high", clip_high, 0, math.inf)
        check_dual_clip(dual_clip)
        self.clip_low, self.clip_high, self.dual_clip = clip_low, clip_high, dual_clip

    def __call__(self, tokens: TokenBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and metrics of one micro-batch, see `PolicyLoss`."""
        log_ratio = tokens.log_ratio()
        ratio = log_ratio.exp()
        loss, clipped, dual_clipped = clip_ratio(
            ratio, tokens.advantages, self.clip_low, self.clip_high, self.dual_clip
        )
        clamped = (tokens.logprobs - tokens.old_logprobs).abs() > MAX_LOG_RATIO
        saturated = clamped & (tokens.advantages != 0) & ~clipped & ~dual_clipped
        return tokens.pg_loss(loss), {
            "clip_frac": tokens.mean(clipped),
            "dual_clip_frac": tokens.mean(dual_clipped),
            "ratio_saturated_frac": tokens.mean(saturated),
            "ratio_mean": tokens.mean(ratio),
            "approx_kl": tokens.mean(-log_ratio),
        }


class ClippedLoss(NamedTuple):
    """What `clip_ratio` returns, each [N]."""

    loss: Tensor
    """The loss of each token, with gradient."""
    clipped: Tensor
    """Bool: the trust region bounds this token."""
    dual_clipped: Tensor
    """Bool: the dual clip bounds it."""


def clip_ratio(
    ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float, dual_clip: float = math.inf
) -> ClippedLoss:
    """PPO's loss per token for any ratio.

    Args:
        ratio: [N] With gradient.
        advantages: [N]
        clip_low: The ratio is bounded below at 1 - clip_low.
        clip_high: The ratio is bounded above at 1 + clip_high.
        dual_clip: Bound of the loss for negative advantages, in units of the advantage.
    """
    plain = -advantages * ratio
    bounded = -advantages * ratio.clamp(1 - clip_low, 1 + clip_high)
    upper = torch.maximum(plain, bounded)
    # A cap of infinity times an advantage of 0 would be NaN; it only ever bounds negative advantages.
    cap = torch.where(advantages < 0, -advantages * dual_clip, torch.full_like(advantages, torch.inf))
    return ClippedLoss(torch.minimum(upper, cap), bounded.detach() > plain.detach(), upper.detach() > cap)


def check_dual_clip(dual_clip: float) -> None:
    """Refuse a dual clip that would bound a ratio of 1.

    Raises:
        ValueError: It is not above 1.
    """
    if not dual_clip > 1:
        raise ValueError(f"model.algorithm.loss.dual_clip must be above 1 (.inf: off), not {dual_clip}")
