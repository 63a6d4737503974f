"""What the policy loss optimises: the one dataclass behind `model.loss`. docs/algorithms.md has the formulas."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

PolicyKind = Literal["ppo_clip", "gspo", "cispo", "dppo"]
Aggregation = Literal["token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "constant_length"]
KLEstimator = Literal["k1", "abs", "k2", "k3"]


class Clips(NamedTuple):
    """Resolved trust-region numbers of a policy loss."""

    low: float
    """How far down; a distance of the ratio from 1, or of the probability (`dppo`)."""
    high: float
    """How far up; the same unit."""
    cap: float
    """Bound of the ratio where the two above do not bound it; infinity: none."""


PUBLISHED_CLIPS: dict[PolicyKind, Clips] = {
    "ppo_clip": Clips(0.2, 0.28, 10.0),  # DAPO's clip-higher (2503.14476), with the recipe's dual clip
    "gspo": Clips(3e-4, 4e-4, math.inf),  # section 5.1 of 2507.18071
    "cispo": Clips(1.0, 4.0, math.inf),  # no lower bound (2506.13585); upper 5 (2510.13786)
    "dppo": Clips(0.15, 0.15, 20.0),  # the authors' run script for 2602.04879, and the ratio's cap there
}
"""What `clip_low`, `clip_high` and `clip_dual` are where the config leaves them out."""


@dataclass(frozen=True, kw_only=True)
class PolicyLossConfig:
    """Policy loss, trust region, aggregation, KL, entropy and correction to the engine."""

    policy: PolicyKind = "ppo_clip"
    """`ppo_clip`: clipped token ratio with clip-higher and dual clip. `gspo`: the ratio of a whole sequence (geometric
    mean), clipped. `cispo`: REINFORCE with the clipped ratio as a constant weight, so that no token loses its gradient.
    `dppo`: a token's gradient is dropped where the update has already moved its probability, not its ratio, too far
    the way it pushes (Binary-TV)."""
    clip_low: float | None = None
    """Ratio bounded below at 1 - clip_low (`dppo`: probability may fall by this). Null: the policy's published value:
    0.2, `gspo` 3e-4, `cispo` 1 (no bound), `dppo` 0.15."""
    clip_high: float | None = None
    """Ratio bounded above at 1 + clip_high (`dppo`: probability may rise by this). Null: 0.28, `gspo` 4e-4, `cispo` 4,
    `dppo` 0.15."""
    clip_dual: float | None = None
    """Above 1. For negative advantages the loss is bounded at this times the advantage (dual clip, 1912.09729); `dppo`:
    cap of the ratio for either sign. `.inf`: off. Null: 10, `gspo` off, `dppo` 20. `cispo` has none."""
    aggregation: Aggregation = "token_mean"
    """How token losses become one number; every count spans micro-batches and ranks. `token_mean`: each token of the
    mini-batch weighs the same (what the released recipe names). `seq_mean_token_mean`: each trajectory does (what the
    released recipe optimises: with its micro-batch of 1 the mean of a mean over one sequence's tokens is a mean over
    sequences; so is its KL term). `seq_mean_token_sum`: trajectories weigh as their length. `constant_length`: the same
    over a constant (Dr.GRPO, 2503.20783)."""
    constant_length: int | None = None
    """Tokens; the constant of `constant_length`, usually the longest response allowed. Null with any other."""
    kl_weight: float = 0.0
    """Weight of the KL divergence from the reference policy; 0: no reference is loaded. The recipe: 0.001."""
    kl: KLEstimator = "k3"
    """Estimator per token, with p, r the log-probabilities of policy and reference: `k1` p - r, `abs` |p - r|, `k2`
    (p - r)^2 / 2, `k3` e^(r - p) - (r - p) - 1 (the recipe's). In the loss, `k2` has the gradient of the reverse KL on
    policy; `k1` has none in expectation unless `kl_importance` is on. In the reward, `k1` is the unbiased one."""
    kl_in: Literal["loss", "reward"] = "loss"
    """`loss`: a penalty per token. `reward`: its sum over a trajectory is taken off the reward before advantages."""
    kl_importance: bool = False
    """Multiply the loss's KL by the policy ratio, gradient included: unbiased off policy too (2512.02556)."""
    entropy_weight: float = 0.0
    """Weight of the entropy bonus; the recipe: 0."""
    importance_cap: float | None = 2.0
    """With `old_logprobs: trainer`: the surrogate times exp(old - engine) per token, truncated at this (token-level
    truncated importance sampling). Null: no weight. Never applied with `old_logprobs: engine`."""
    importance_band: tuple[float, float] | None = None
    """With `old_logprobs: trainer`: a trajectory whose geometric-mean importance ratio lies outside is masked, e.g.
    [0.99, 1.01]; its tokens still count in the normalisers. Null: none is."""

    def __post_init__(self) -> None:
        _check_clips(self)
        _check_aggregation(self)
        _check_kl(self)
        if self.entropy_weight < 0:
            raise ValueError(f"model.loss.entropy_weight must be at least 0, not {self.entropy_weight}")
        if self.importance_cap is not None and self.importance_cap <= 0:
            raise ValueError(f"model.loss.importance_cap must be above 0 (or null: off), not {self.importance_cap}")
        if self.importance_band is not None and not 0 <= self.importance_band[0] < self.importance_band[1]:
            raise ValueError(f"model.loss.importance_band must be [low, high], 0 <= low < high: {self.importance_band}")

    @property
    def clips(self) -> Clips:
        """The trust region with published values where the config has none."""
        low, high, cap = PUBLISHED_CLIPS[self.policy]
        return Clips(
            low if self.clip_low is None else self.clip_low,
            high if self.clip_high is None else self.clip_high,
            cap if self.clip_dual is None else self.clip_dual,
        )

    @property
    def needs_reference(self) -> bool:
        """True if log-probabilities of a reference policy are read, in the loss or in the reward."""
        return self.kl_weight > 0


def _check_clips(config: PolicyLossConfig) -> None:
    if config.policy not in PUBLISHED_CLIPS:
        raise ValueError(f"model.loss.policy is one of {', '.join(PUBLISHED_CLIPS)}, not {config.policy!r}")
    low, high, cap = config.clips
    if not 0 <= low <= 1:
        raise ValueError(f"model.loss.clip_low must be between 0 and 1, not {low}")
    if not high >= 0 or (config.policy == "dppo" and high > 1):
        raise ValueError(f"model.loss.clip_high must be at least 0, and for policy dppo at most 1, not {high}")
    if not cap > 1:
        raise ValueError(f"model.loss.clip_dual must be above 1 (.inf: off), not {cap}")
    if config.policy == "cispo" and config.clip_dual is not None:
        raise ValueError(
            "model.loss.clip_dual is not read by policy cispo, whose weight clip_high bounds: leave it out"
        )


def _check_aggregation(config: PolicyLossConfig) -> None:
    if config.aggregation not in (known := get_args(Aggregation)):
        raise ValueError(f"model.loss.aggregation is one of {', '.join(known)}, not {config.aggregation!r}")
    if config.aggregation == "constant_length":
        if config.constant_length is None or config.constant_length < 1:
            raise ValueError(
                "model.loss.aggregation constant_length needs model.loss.constant_length, at least 1 token "
                f"(usually the longest response allowed), not {config.constant_length}"
            )
    elif config.constant_length is not None:
        raise ValueError(
            f"model.loss.constant_length is not read with model.loss.aggregation {config.aggregation}: leave it out, "
            "or set the aggregation to constant_length"
        )


def _check_kl(config: PolicyLossConfig) -> None:
    if config.kl not in (known := get_args(KLEstimator)):
        raise ValueError(f"model.loss.kl is one of {', '.join(known)}, not {config.kl!r}")
    if config.kl_in not in ("loss", "reward"):
        raise ValueError(f"model.loss.kl_in is loss or reward, not {config.kl_in!r}")
    if not config.kl_weight >= 0:
        raise ValueError(f"model.loss.kl_weight must be at least 0, not {config.kl_weight}")
    if config.kl_in == "reward" and config.kl_weight == 0:
        raise ValueError(
            "model.loss.kl_in reward is not read where model.loss.kl_weight is 0: raise one, or leave both"
        )
    if config.kl_importance and (config.kl_weight == 0 or config.kl_in == "reward"):
        raise ValueError("model.loss.kl_importance needs model.loss.kl_weight above 0 and model.loss.kl_in loss")
