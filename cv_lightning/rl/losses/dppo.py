"""A trust region of the token's probability, not of its ratio."""

from __future__ import annotations

from torch import Tensor

from cv_lightning.rl.losses.base import PolicyLoss, TokenBatch, check_range


class DPPO(PolicyLoss):
    """-A min(r, cap) log p, without the tokens that left the trust region of total variation (2602.04879, Binary-TV).

    A token is dropped where the update pushes its probability up (A > 0) and it has risen by more than `clip_high`, or
    down and it has fallen by more than `clip_low`. Unlike a clip of the ratio this neither stops rare tokens, whose
    ratio is large at any step, nor lets likely tokens lose half their probability. The defaults are those of the
    authors' run script.

    Args:
        clip_low: How far a token's probability may fall.
        clip_high: How far a token's probability may rise.
        ratio_cap: Above 1. Bound of the weight, for either sign of the advantage; `.inf`: off.
    """

    def __init__(self, clip_low: float = 0.15, clip_high: float = 0.15, ratio_cap: float = 20.0) -> None:
        check_range("clip_low", clip_low, 0, 1)
        check_range("clip_high", clip_high, 0, 1)
        if not ratio_cap > 1:
            raise ValueError(f"model.algorithm.loss.ratio_cap must be above 1 (.inf: off), not {ratio_cap}")
        self.clip_low, self.clip_high, self.ratio_cap = clip_low, clip_high, ratio_cap

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
