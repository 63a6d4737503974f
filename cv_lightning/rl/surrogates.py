"""Policy losses per token: PPO clip, GSPO, CISPO, DPPO. Aggregation, KL and entropy come after.

A surrogate is minimised, so each has the advantage's sign turned. Ratios are policy over `old`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from cv_lightning.rl.aggregation import row_means
from cv_lightning.rl.loss_config import Clips, PolicyKind

MAX_LOG_RATIO = 20.0
"""Log-ratios are clamped to this, either way, before the exponential, as in the reference."""
MAX_LOG_SEQUENCE_RATIO = 10.0
"""Upper clamp of GSPO's log-ratio, as in the reference."""


@dataclass(slots=True, kw_only=True)
class Tokens:
    """What a surrogate reads."""

    logprobs: Tensor
    """[N], with gradient."""
    old: Tensor
    """[N], finite."""
    advantages: Tensor
    """[N]"""
    row_index: Tensor
    """[N] int64."""
    keep: Tensor
    """[N] bool; False: the token has no usable `old` and is to be ignored."""


@dataclass(slots=True, kw_only=True)
class Surrogate:
    """What a surrogate returns, each [N]."""

    loss: Tensor
    """With gradient."""
    ratio: Tensor
    """Policy over old, before any clip; detached. GSPO: of the token's sequence."""
    log_ratio: Tensor
    """Policy minus old of the token itself, clamped where the ratio is made of it; detached."""
    clipped: Tensor
    """Bool: the trust region bounds this token."""
    capped: Tensor
    """Bool: the dual clip or the ratio's cap bounds it."""
    saturated: Tensor
    """Bool: only the clamp of the log-ratio bounds it, so that the token has no gradient although no clip says so."""


def token_log_ratio(tokens: Tokens) -> Tensor:
    """Policy minus old per token, clamped, [N], with gradient."""
    return (tokens.logprobs - tokens.old).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def ppo_clip(tokens: Tokens, clips: Clips) -> Surrogate:
    """max(-A r, -A clip(r, 1 - low, 1 + high)), at most cap |A| where A < 0 (1707.06347, 2503.14476, 1912.09729)."""
    log_ratio = token_log_ratio(tokens)
    beyond = (tokens.logprobs - tokens.old).detach().abs() > MAX_LOG_RATIO
    return _clipped(log_ratio.exp(), log_ratio, beyond, tokens.advantages, clips)


def gspo(tokens: Tokens, clips: Clips) -> Surrogate:
    """PPO's loss with the geometric mean of a sequence's ratios in place of the token's (GSPO-token, 2507.18071).

    The mean is over the kept tokens of a row; each token's gradient flows through its own log-probability alone, which
    with one advantage a row is GSPO's gradient. Above `MAX_LOG_SEQUENCE_RATIO` the clamp leaves a row with A < 0
    without a gradient; `saturated` marks its tokens.
    """
    log_ratio = (tokens.logprobs - tokens.old).detach()
    mean = row_means(log_ratio, tokens.row_index, tokens.keep)
    ratio = (tokens.logprobs - tokens.logprobs.detach() + mean).clamp(max=MAX_LOG_SEQUENCE_RATIO).exp()
    return _clipped(ratio, log_ratio, mean > MAX_LOG_SEQUENCE_RATIO, tokens.advantages, clips)


def cispo(tokens: Tokens, clips: Clips) -> Surrogate:
    """-A sg(clip(r, 1 - low, 1 + high)) log p: the ratio is bounded, the gradient never dropped (2506.13585)."""
    log_ratio = token_log_ratio(tokens).detach()
    ratio = log_ratio.exp()
    weight = ratio.clamp(1 - clips.low, 1 + clips.high)
    return Surrogate(
        loss=-tokens.advantages * weight * _unit(tokens.logprobs),
        ratio=ratio,
        log_ratio=log_ratio,
        clipped=weight != ratio,
        capped=torch.zeros_like(tokens.keep),
        saturated=torch.zeros_like(tokens.keep),
    )


def dppo(tokens: Tokens, clips: Clips) -> Surrogate:
    """-A min(r, cap) log p, without the tokens that left the trust region of total variation (2602.04879, Binary-TV).

    A token is dropped where the update pushes its probability up (A > 0) and it has risen by more than `high`, or
    down and it has fallen by more than `low`. Unlike a clip of the ratio this neither stops rare tokens, whose ratio
    is large at any step, nor lets likely tokens lose half their probability.
    """
    log_ratio = token_log_ratio(tokens).detach()
    ratio = log_ratio.exp()
    moved = tokens.logprobs.detach().exp() - tokens.old.exp()
    up, down = tokens.advantages > 0, tokens.advantages < 0
    outside = (up & (moved > clips.high)) | (down & (moved < -clips.low))
    weight = ratio.clamp(max=clips.cap).masked_fill(outside, 0.0)
    return Surrogate(
        loss=-tokens.advantages * weight * _unit(tokens.logprobs),
        ratio=ratio,
        log_ratio=log_ratio,
        clipped=outside,
        capped=(ratio > clips.cap) & ~outside,
        saturated=torch.zeros_like(tokens.keep),
    )


SURROGATES: dict[PolicyKind, Callable[[Tokens, Clips], Surrogate]] = {
    "ppo_clip": ppo_clip,
    "gspo": gspo,
    "cispo": cispo,
    "dppo": dppo,
}


def _unit(logprobs: Tensor) -> Tensor:
    """1, with the gradient of the log-probabilities: a score-function loss whose value can be compared with others."""
    return 1.0 + (logprobs - logprobs.detach())


def _clipped(ratio: Tensor, log_ratio: Tensor, beyond: Tensor, advantages: Tensor, clips: Clips) -> Surrogate:
    """PPO's loss; `beyond` is True where the clamp of the log-ratio has cut the gradient of `ratio`."""
    plain = -advantages * ratio
    bounded = -advantages * ratio.clamp(1 - clips.low, 1 + clips.high)
    upper = torch.maximum(plain, bounded)
    # A cap of infinity times an advantage of 0 would be NaN; it only ever bounds negative advantages.
    negative = advantages < 0
    cap = torch.where(negative, -advantages * clips.cap, torch.full_like(advantages, torch.inf))
    clipped, capped = bounded.detach() > plain.detach(), upper.detach() > cap
    return Surrogate(
        loss=torch.minimum(upper, cap),
        ratio=ratio.detach(),
        log_ratio=log_ratio.detach(),
        clipped=clipped,
        capped=capped,
        saturated=beyond & (advantages != 0) & ~clipped & ~capped,
    )
