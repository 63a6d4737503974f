"""The algorithm of a run, `model.init_args.algorithm`. docs/algorithms.md has the formulas."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal, get_args

from cv_lightning.rl.advantages import GRPO, AdvantageEstimator
from cv_lightning.rl.aggregation import Aggregation
from cv_lightning.rl.groups import MaskConfig
from cv_lightning.rl.kl import KLConfig
from cv_lightning.rl.losses import PolicyLoss, PPOClip


@dataclass(frozen=True, kw_only=True)
class DynamicSamplingConfig:
    """More tasks are rolled out where rewards of a group do not differ (DAPO, 2503.14476)."""

    max_oversample: float = 1.0
    """Above 1: an iteration rolls tasks out in order until `data.tasks_per_iteration` groups have rewards that differ,
    or so many times as many tasks have been tried. 1: off."""

    def __post_init__(self) -> None:
        if not self.max_oversample >= 1:
            raise ValueError(
                f"model.algorithm.dynamic_sampling.max_oversample must be at least 1 (1: off), not "
                f"{self.max_oversample}"
            )


@dataclass(frozen=True, kw_only=True)
class AlgorithmConfig:
    """What a run optimises: all that lies between the rewards of an iteration and its optimizer steps."""

    advantage: AdvantageEstimator | None = None
    """How rewards become advantages, by `class_path`: `GRPO` (null), `DrGRPO`, `RLOO`, `ReinforcePlusPlusBaseline`, or
    a class of your own."""
    mask: MaskConfig = field(default_factory=MaskConfig)
    """Trajectories that have a reward but are not learned from."""
    loss: PolicyLoss | None = None
    """The policy loss, by `class_path`: `PPOClip` (null), `GSPO`, `CISPO`, `DPPO`, or a class of your own."""
    aggregation: Aggregation = "token_mean"
    """How token losses become one number; every count spans micro-batches and ranks. `token_mean`: each token of the
    mini-batch weighs the same (what the released recipe names). `seq_mean_token_mean`: each trajectory does (what the
    released recipe optimises: with its micro-batch of 1 the mean of a mean over one sequence's tokens is a mean over
    sequences; so is its KL term). `seq_mean_token_sum`: trajectories weigh as their length. `constant_length`: the same
    over a constant (Dr.GRPO, 2503.20783)."""
    constant_length: int | None = None
    """Tokens; the constant of `constant_length`, usually the longest response allowed. Null with any other."""
    kl: KLConfig = field(default_factory=KLConfig)
    """Penalty on the divergence from a reference policy, in the loss or in the reward."""
    entropy_weight: float = 0.0
    """Weight of the entropy bonus; the recipe: 0."""
    old_logprobs: Literal["engine", "trainer"] = "engine"
    """What the ratio is taken against: the engine's log-probabilities, or one pass of the trainer's before the first
    step, times an importance weight to the engine."""
    tis_clip: float | None = 2.0
    """Bound of the importance weight exp(old - engine) that the loss of each token is multiplied by where
    `old_logprobs` is `trainer` (token-level truncated importance sampling). Null: no weight."""
    sequence_mask: tuple[float, float] | None = None
    """Band of the geometric-mean importance ratio, e.g. [0.99, 1.01]: trajectories outside are masked where
    `old_logprobs` is `trainer`; their tokens still count in the normalisers. Null: none is masked."""
    num_minibatches: int = 2
    """Optimizer steps per iteration."""
    dynamic_sampling: DynamicSamplingConfig = field(default_factory=DynamicSamplingConfig)
    """Whether an iteration rolls out more tasks than it trains on."""

    def __post_init__(self) -> None:
        key = "model.algorithm"
        if self.num_minibatches < 1:
            raise ValueError(f"{key}.num_minibatches must be at least 1, not {self.num_minibatches}")
        if self.entropy_weight < 0:
            raise ValueError(f"{key}.entropy_weight must be at least 0, not {self.entropy_weight}")
        if self.old_logprobs not in ("engine", "trainer"):
            raise ValueError(f"{key}.old_logprobs is engine or trainer, not {self.old_logprobs!r}")
        if self.tis_clip is not None and self.tis_clip <= 0:
            raise ValueError(f"{key}.tis_clip must be above 0 (or null: off), not {self.tis_clip}")
        if self.sequence_mask is not None and not 0 <= self.sequence_mask[0] < self.sequence_mask[1]:
            raise ValueError(f"{key}.sequence_mask must be [low, high], 0 <= low < high: {self.sequence_mask}")
        if self.sequence_mask is not None and self.old_logprobs == "engine":
            raise ValueError(f"{key}.sequence_mask masks by the engine's ratio: set {key}.old_logprobs to trainer")
        _check_aggregation(self.aggregation, self.constant_length)

    def resolved(self) -> AlgorithmConfig:
        """The config with the classes that null stands for."""
        return replace(self, advantage=self.advantage or GRPO(), loss=self.loss or PPOClip())


def _check_aggregation(aggregation: str, constant_length: int | None) -> None:
    key = "model.algorithm"
    if aggregation not in (known := get_args(Aggregation)):
        raise ValueError(f"{key}.aggregation is one of {', '.join(known)}, not {aggregation!r}")
    if aggregation == "constant_length":
        if constant_length is None or constant_length < 1:
            raise ValueError(
                f"{key}.aggregation constant_length needs {key}.constant_length, at least 1 token (usually the longest "
                f"response allowed), not {constant_length}"
            )
    elif constant_length is not None:
        raise ValueError(
            f"{key}.constant_length is not read with {key}.aggregation {aggregation}: leave it out, or set the "
            "aggregation to constant_length"
        )
