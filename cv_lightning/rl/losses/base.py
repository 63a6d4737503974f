"""What a policy loss reads and returns. Pure torch: nothing here knows of models, configs or ranks.

Normalisers are global counts over micro-batches and ranks, fixed before the first micro-batch, so that k micro-batches
give the gradient of one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import torch
from torch import Tensor

from cv_lightning.rl.aggregation import aggregation_weights, sequence_means

MAX_LOG_RATIO = 20.0
"""Log-ratios are clamped to this, either way, before the exponential, as in the released code."""

TENSORS = ("logprobs", "old_logprobs", "advantages", "sequence_index", "rollout_logprobs", "reference_logprobs")


@dataclass(slots=True, kw_only=True)
class TokenBatch:
    """The sampled tokens of one micro-batch, flat; N may be 0, where a rank has fewer micro-batches than another.

    Log-probabilities are brought to at least float32. A token whose old or rollout log-probability is NaN or infinite
    is masked: its old log-probability becomes the policy's, and it weighs nothing in `pg_loss` and `mean`. The global
    counts include it.
    """

    logprobs: Tensor
    """[N] Of the policy, with gradient."""
    old_logprobs: Tensor
    """[N] What the ratio is taken against: the engine's, or the trainer's before the first step."""
    advantages: Tensor
    """[N]"""
    sequence_index: Tensor
    """[N] integers: which sequence each token belongs to. Sequences are never split over micro-batches."""
    num_tokens: float
    """Sampled tokens of the whole mini-batch, over micro-batches and ranks."""
    num_sequences: float
    """Sequences with a sampled token, same scope."""
    rollout_logprobs: Tensor | None = None
    """[N] The engine's, where `old_logprobs` are the trainer's. None where they are the engine's own: the mismatch
    between the two would be corrected twice."""
    reference_logprobs: Tensor | None = None
    """[N] Of the reference policy."""
    entropy: Tensor | None = None
    """[N] Nats, of the policy's distributions; with gradient where the entropy bonus is on."""
    mask: Tensor = field(init=False)
    """[N] bool; False: a log-probability of the token is not usable."""
    weights: Tensor = field(init=False)
    """[N] Weight of each token in the global loss, 0 where masked; a mean over tokens unless the algorithm asks for
    another aggregation."""
    importance_weights: Tensor | None = field(init=False, default=None)
    """[N] Correction for the mismatch between engine and trainer; None: none."""

    def __post_init__(self) -> None:
        self._check()
        dtype = torch.promote_types(self.logprobs.dtype, torch.float32)
        self.logprobs = self.logprobs.to(dtype)
        self.mask = self.old_logprobs.isfinite()
        if self.rollout_logprobs is not None:
            self.mask = self.mask & self.rollout_logprobs.isfinite()
        self.old_logprobs = torch.where(self.mask, self.old_logprobs.to(dtype), self.logprobs.detach())
        if self.rollout_logprobs is not None:
            self.rollout_logprobs = torch.where(self.mask, self.rollout_logprobs.to(dtype), self.old_logprobs)
        self.advantages = self.advantages.to(dtype)
        self.sequence_index = self.sequence_index.long()
        self.set_weights(aggregation_weights(self.sequence_index, self.num_tokens, self.num_sequences, "token_mean"))

    def _check(self) -> None:
        size = self.logprobs.shape
        for name in (*TENSORS, "entropy"):
            value = getattr(self, name)
            if value is not None and (value.dim() != 1 or value.shape != size):
                raise ValueError(f"{name} has shape {list(value.shape)}; one entry per sampled token: {list(size)}")
        if len(self.logprobs) and not (self.num_tokens > 0 and self.num_sequences > 0):
            raise ValueError(
                f"num_tokens ({self.num_tokens}) and num_sequences ({self.num_sequences}) count the whole mini-batch, "
                f"which has at least the {len(self.logprobs)} tokens here"
            )

    def set_weights(self, weights: Tensor) -> None:
        """Weigh the tokens in the global loss; masked ones get 0.

        Args:
            weights: [N], any floating-point type.
        """
        self.weights = weights.to(self.logprobs.dtype) * self.mask

    def log_ratio(self) -> Tensor:
        """Policy minus old per token, [N], clamped to +-20, with gradient."""
        return (self.logprobs - self.old_logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)

    def score(self) -> Tensor:
        """1, [N], with the gradient of the log-probabilities: turns a constant weight into a REINFORCE loss."""
        return 1.0 + (self.logprobs - self.logprobs.detach())

    def sequence_means(self, values: Tensor) -> Tensor:
        """For every token, [N], the mean of `values` over the unmasked tokens of its sequence."""
        return sequence_means(values, self.sequence_index, self.mask)

    def pg_loss(self, per_token: Tensor) -> Tensor:
        """This micro-batch's share of the global loss: corrected for the engine, aggregated.

        Args:
            per_token: [N] Losses with gradient.

        Returns:
            A scalar; with N = 0 it is 0 and still has a graph.
        """
        if self.importance_weights is not None:
            per_token = per_token * self.importance_weights
        return (per_token * self.weights).sum() if len(self.weights) else self.logprobs.sum() * 0.0

    def mean(self, values: Tensor) -> Tensor:
        """This micro-batch's share of a mean over all sampled tokens, a scalar, detached.

        Args:
            values: [N], numbers or bools.
        """
        count = max(self.num_tokens, 1e-9)  # 0 only where no rank has a token
        return (values.detach().to(self.weights.dtype) * self.mask).sum() / count


class PolicyLoss(ABC):
    """A policy-gradient loss. The constructor's arguments are its config, checked there.

    KL, entropy bonus, aggregation and the correction for the engine are the algorithm's, the same for every loss.
    """

    def __repr__(self) -> str:
        """The class and its attributes, for the record of a run."""
        return f"{type(self).__name__}({', '.join(f'{name}={value}' for name, value in vars(self).items())})"

    @abstractmethod
    def __call__(self, tokens: TokenBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and metrics of one micro-batch.

        Args:
            tokens: Flat tokens of the micro-batch.

        Returns:
            This micro-batch's share of the global loss to minimise, `tokens.pg_loss(per_token)`; and metrics by name,
            each a share of a mean over tokens, `tokens.mean(values)`. Shares add up over micro-batches and ranks; the
            names must not depend on the tokens. They are logged as `policy/NAME`.
        """


def check_range(name: str, value: float, low: float, high: float) -> None:
    """Refuse an argument of a loss that is outside [low, high].

    Raises:
        ValueError: It is, or it is NaN; names the key.
    """
    if not low <= value <= high:
        bounds = f"at least {low:g}" if high == float("inf") else f"between {low:g} and {high:g}"
        raise ValueError(f"model.algorithm.loss.{name} must be {bounds}, not {value}")
