"""A trust region of the token's probability instead of its ratio."""

from __future__ import annotations

from torch import Tensor

from cv_lightning.ranges import Fraction, check_ranges
from cv_lightning.rl.losses.base import KEY, Cap, PolicyLoss, TokenBatch


class DPPO(PolicyLoss):
    """-A min(r, cap) log p, without the tokens outside the trust region of total variation (2602.04879, Binary-TV).

    A token is dropped if the update raises its probability (A > 0) and it has risen by more than `clip_high`, or lowers
    it and it has fallen by more than `clip_low`. Unlike a clip of the ratio, this does not stop rare tokens, whose
    ratio is large at any step, nor let likely tokens lose half their probability. The defaults are those of the
    authors' run script.

    Args:
        clip_low: Largest decrease of a token's probability.
        clip_high: Largest increase of a token's probability.
        ratio_cap: Above 1. Upper bound of the weight, for advantages of both signs; `.inf`: off.
    """

    def __init__(
        self,
        clip_low: Fraction = 0.15,
        clip_high: Fraction = 0.15,
        ratio_cap: Cap = 20.0,
    ) -> None:
        check_ranges(DPPO.__init__, KEY, locals())
        self.clip_low = clip_low
        self.clip_high = clip_high
        self.ratio_cap = ratio_cap

    def __call__(self, tokens: TokenBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and metrics of one micro-batch, see `PolicyLoss`."""
        log_ratio = tokens.log_ratio().detach()
        ratio = log_ratio.exp()
        moved = tokens.logprobs.detach().exp() - tokens.old_logprobs.exp()
        too_high = (tokens.advantages > 0) & (moved > self.clip_high)
        too_low = (tokens.advantages < 0) & (moved < -self.clip_low)
        outside = too_high | too_low
        weight = ratio.clamp(max=self.ratio_cap).masked_fill(outside, 0.0)
        return tokens.pg_loss(-tokens.advantages * weight * tokens.score()), {
            "clip_frac": tokens.mean(outside),
            "ratio_cap_frac": tokens.mean((ratio > self.ratio_cap) & ~outside),
            "ratio_mean": tokens.mean(ratio),
            "approx_kl": tokens.mean(-log_ratio),
        }
