"""PPO's clipped loss with a bound for each direction and a dual clip."""

from __future__ import annotations

import torch
from torch import Tensor

from cv_lightning.ranges import Fraction, check_ranges
from cv_lightning.rl.losses.base import KEY, MAX_LOG_RATIO, Cap, ClipHigh, PolicyLoss, TokenBatch


class PPOClip(PolicyLoss):
    """max(-A r, -A clip(r, 1 - low, 1 + high)) with the token's ratio r; if A < 0, at most dual_clip * |A|.

    PPO (1707.06347), clip-higher (DAPO, 2503.14476), dual clip (1912.09729). The defaults are the recipe's.

    Args:
        clip_low: The ratio is bounded below at 1 - clip_low.
        clip_high: The ratio is bounded above at 1 + clip_high.
        dual_clip: Above 1. Upper bound of the loss for negative advantages, in units of |A|; `.inf`: off.
    """

    def __init__(
        self,
        clip_low: Fraction = 0.2,
        clip_high: ClipHigh = 0.28,
        dual_clip: Cap = 10.0,
    ) -> None:
        check_ranges(PPOClip.__init__, KEY, locals())
        self.clip_low = clip_low
        self.clip_high = clip_high
        self.dual_clip = dual_clip

    def __call__(self, tokens: TokenBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and metrics of one micro-batch, see `PolicyLoss`."""
        log_ratio = tokens.log_ratio()
        clamped = (tokens.logprobs - tokens.old_logprobs).abs() > MAX_LOG_RATIO
        bounds = 1 - self.clip_low, 1 + self.clip_high
        return clipped_loss(tokens, log_ratio, log_ratio.exp(), clamped, bounds, self.dual_clip)


def clipped_loss(
    tokens: TokenBatch,
    log_ratio: Tensor,
    ratio: Tensor,
    clamped: Tensor,
    bounds: tuple[float, float],
    dual_clip: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    """PPO's loss and metrics for any ratio.

    Args:
        tokens: Tokens of the micro-batch.
        log_ratio: [N] Log-ratios of the tokens.
        ratio: [N] Ratios with gradient, of the tokens or of their sequences.
        clamped: [N] bool: the ratio has no gradient because its logarithm was clamped.
        bounds: Lower and upper bound of the ratio.
        dual_clip: Upper bound of the loss for negative advantages, in units of |A|.
    """
    plain, bounded = -tokens.advantages * ratio, -tokens.advantages * ratio.clamp(*bounds)
    upper = torch.maximum(plain, bounded)
    # A cap of infinity times an advantage of 0 would be NaN; it only ever bounds negative advantages.
    cap = torch.where(
        tokens.advantages < 0, -tokens.advantages * dual_clip, torch.full_like(tokens.advantages, torch.inf)
    )
    clipped, dual_clipped = bounded.detach() > plain.detach(), upper.detach() > cap
    saturated = clamped & (tokens.advantages != 0) & ~clipped & ~dual_clipped
    return tokens.pg_loss(torch.minimum(upper, cap)), {
        "clip_frac": tokens.mean(clipped),
        "dual_clip_frac": tokens.mean(dual_clipped),
        "ratio_saturated_frac": tokens.mean(saturated),
        "ratio_mean": tokens.mean(ratio),
        "approx_kl": tokens.mean(-log_ratio),
    }
