"""The config of the algorithm, `model.init_args.algorithm`. docs/algorithms.md has the formulas."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Annotated, Literal, get_args

from cv_lightning.ranges import Limit, NonNegativeFloat, PositiveInt, Range, check_ranges
from cv_lightning.rl.advantages import GRPO, AdvantageEstimator
from cv_lightning.rl.aggregation import Aggregation
from cv_lightning.rl.groups import MaskConfig
from cv_lightning.rl.kl import KLConfig
from cv_lightning.rl.losses import PolicyLoss, PPOClip

KEY = "model.init_args.algorithm"
"""Place of this config in a run's, for messages."""


@dataclass(frozen=True, kw_only=True)
class DynamicSamplingConfig:
    """Rolling out more tasks when groups have equal rewards (DAPO, 2503.14476)."""

    max_oversample: Annotated[float, Range(at_least=1)] = 1.0
    """Largest number of tasks of an iteration, as a multiple of `data.tasks_per_iteration`. Above 1, tasks are rolled
    out in order until that many groups have rewards that differ. 1: off."""

    def __post_init__(self) -> None:
        check_ranges(self, f"{KEY}.dynamic_sampling")


@dataclass(frozen=True, kw_only=True)
class AlgorithmConfig:
    """Everything between the rewards of an iteration and its optimizer steps."""

    advantage: AdvantageEstimator | None = None
    """Advantage estimator, by `class_path`: `GRPO` (null), `DrGRPO`, `RLOO`, `ReinforcePlusPlusBaseline`, or a class
    of your own."""
    mask: MaskConfig = field(default_factory=MaskConfig)
    """Selects trajectories that have a reward but are not learned from."""
    loss: PolicyLoss | None = None
    """The policy loss, by `class_path`: `PPOClip` (null), `GSPO`, `CISPO`, `DPPO`, or a class of your own."""
    aggregation: Aggregation = "token_mean"
    """How token losses become one number; every count spans micro-batches and ranks. `token_mean`: all tokens of the
    mini-batch have the same weight (what the released recipe names). `seq_mean_token_mean`: all trajectories have (what
    the released recipe optimises, because its micro-batches hold one sequence each). `seq_mean_token_sum`: weights are
    proportional to length. `constant_length`: the same, divided by a constant (Dr.GRPO, 2503.20783)."""
    constant_length: PositiveInt | None = None
    """Tokens; the divisor of `constant_length`, usually the longest response allowed. Null with any other."""
    kl: KLConfig = field(default_factory=KLConfig)
    """Penalty on the divergence from a reference policy, in the loss or in the reward."""
    entropy_weight: NonNegativeFloat = 0.0
    """Weight of the entropy bonus; the recipe: 0."""
    old_logprobs: Literal["engine", "trainer"] = "engine"
    """Log-probabilities that the ratio is taken against: the engine's, or those of a trainer's pass before the first
    step, with an importance weight that corrects for the engine."""
    tis_clip: Limit | None = 2.0
    """Upper bound of the importance weight exp(old - engine), by which each token's loss is multiplied if
    `old_logprobs` is `trainer` (token-level truncated importance sampling). Null: no weight."""
    sequence_mask: tuple[float, float] | None = None
    """Allowed range of the geometric-mean importance ratio, e.g. [0.99, 1.01], if `old_logprobs` is `trainer`.
    Trajectories outside are masked, but their tokens still count in the normalisers. Null: none is masked."""
    num_minibatches: PositiveInt = 2
    """Optimizer steps per iteration."""
    dynamic_sampling: DynamicSamplingConfig = field(default_factory=DynamicSamplingConfig)
    """Whether an iteration may roll out more tasks than it trains on."""

    def __post_init__(self) -> None:
        key = KEY
        check_ranges(self, key)
        if self.old_logprobs not in ("engine", "trainer"):
            raise ValueError(f"{key}.old_logprobs is engine or trainer, not {self.old_logprobs!r}")
        if self.sequence_mask is not None and not 0 <= self.sequence_mask[0] < self.sequence_mask[1]:
            raise ValueError(f"{key}.sequence_mask must be [low, high], 0 <= low < high: {self.sequence_mask}")
        if self.sequence_mask is not None and self.old_logprobs == "engine":
            raise ValueError(f"{key}.sequence_mask masks by the engine's ratio: set {key}.old_logprobs to trainer")
        if self.aggregation not in (known := get_args(Aggregation)):
            raise ValueError(f"{key}.aggregation is one of {', '.join(known)}, not {self.aggregation!r}")
        if self.aggregation == "constant_length" and not (self.constant_length and self.constant_length > 0):
            raise ValueError(
                f"{key}.aggregation constant_length needs {key}.constant_length, at least 1 token (usually the longest "
                f"response allowed), not {self.constant_length}"
            )
        if self.aggregation != "constant_length" and self.constant_length is not None:
            raise ValueError(
                f"{key}.constant_length is not read with {key}.aggregation {self.aggregation}: leave it out, or set "
                "the aggregation to constant_length"
            )

    def resolved(self) -> AlgorithmConfig:
        """The config with the default classes in place of null."""
        return replace(self, advantage=self.advantage or GRPO(), loss=self.loss or PPOClip())
