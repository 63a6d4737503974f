"""REINFORCE with a clipped importance weight, so that no token loses its gradient."""

from __future__ import annotations

from torch import Tensor

from cv_lightning.ranges import Fraction, check_ranges
from cv_lightning.rl.losses.base import KEY, ClipHigh, PolicyLoss, TokenBatch


class CISPO(PolicyLoss):
    """-A sg(clip(r, 1 - low, 1 + high)) log p: the weight is bounded, the gradient never dropped (2506.13585).

    The defaults bound the weight above at 5 (2510.13786) and not below.

    Args:
        clip_low: The weight is bounded below at 1 - clip_low; 1: no bound.
        clip_high: The weight is bounded above at 1 + clip_high.
    """

    def __init__(self, clip_low: Fraction = 1.0, clip_high: ClipHigh = 4.0) -> None:
        check_ranges(CISPO.__init__, KEY, locals())
        self.clip_low = clip_low
        self.clip_high = clip_high

    def __call__(self, tokens: TokenBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and metrics of one micro-batch, see `PolicyLoss`."""
        log_ratio = tokens.log_ratio().detach()
        ratio = log_ratio.exp()
        weight = ratio.clamp(1 - self.clip_low, 1 + self.clip_high)
        return tokens.pg_loss(-tokens.advantages * weight * tokens.score()), {
            "clip_frac": tokens.mean(weight != ratio),
            "ratio_mean": tokens.mean(ratio),
            "approx_kl": tokens.mean(-log_ratio),
        }
