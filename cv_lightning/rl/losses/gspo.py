"""Group sequence policy optimisation: one ratio for a whole sequence."""

from __future__ import annotations

import logging
import math

from torch import Tensor

from cv_lightning.ranges import Fraction, check_ranges
from cv_lightning.rl.losses.base import KEY, Cap, ClipHigh, PolicyLoss, TokenBatch
from cv_lightning.rl.losses.ppo_clip import clipped_loss

LOG = logging.getLogger(__name__)
MAX_LOG_SEQUENCE_RATIO = 10.0
"""Upper clamp of a sequence's mean log-ratio, as in the released code."""
SUSPICIOUS_CLIP = 0.2
"""A clip range of PPO's size, which a sequence's mean log-ratio never leaves."""


class GSPO(PolicyLoss):
    """PPO's loss with the geometric mean of a sequence's ratios instead of the token's (GSPO-token, 2507.18071).

    Each token's gradient flows through its own log-probability alone, which with one advantage per sequence is GSPO's
    gradient. The defaults are those of the paper's section 5.1. The paper aggregates with `seq_mean_token_mean`.

    Args:
        clip_low: The sequence's ratio is bounded below at 1 - clip_low.
        clip_high: The sequence's ratio is bounded above at 1 + clip_high.
        dual_clip: Above 1. Upper bound of the loss for negative advantages, in units of |A|; `.inf`: off.
    """

    def __init__(
        self,
        clip_low: Fraction = 3e-4,
        clip_high: ClipHigh = 4e-4,
        dual_clip: Cap = math.inf,
    ) -> None:
        check_ranges(GSPO.__init__, KEY, locals())
        self.clip_low = clip_low
        self.clip_high = clip_high
        self.dual_clip = dual_clip
        if clip_high >= SUSPICIOUS_CLIP:
            LOG.warning(
                "model.algorithm.loss GSPO with clip_high %g: a sequence's ratio hardly ever leaves that range (the "
                "paper has 4e-4). A config below may have set it for another loss: name clip_low and clip_high too",
                clip_high,
            )

    def __call__(self, tokens: TokenBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and metrics of one micro-batch, see `PolicyLoss`."""
        log_ratio = (tokens.logprobs - tokens.old_logprobs).detach()
        mean = tokens.sequence_means(log_ratio)
        ratio = (tokens.logprobs - tokens.logprobs.detach() + mean).clamp(max=MAX_LOG_SEQUENCE_RATIO).exp()
        bounds = 1 - self.clip_low, 1 + self.clip_high
        return clipped_loss(tokens, log_ratio, ratio, mean > MAX_LOG_SEQUENCE_RATIO, bounds, self.dual_clip)
