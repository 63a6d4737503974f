"""Input and contract of a policy loss, in pure torch.

Normalisers are global counts over micro-batches and ranks, fixed before the first micro-batch, so that k micro-batches
give the gradient of one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Annotated

import torch
from torch import Tensor

from cv_lightning.ranges import Range
from cv_lightning.rl.aggregation import aggregation_weights

KEY = "model.init_args.algorithm.loss.init_args"
"""Place of a loss's arguments in a config, for messages."""
ClipHigh = Annotated[float, Range(at_least=0, infinite=True)]
"""How far a ratio may rise above 1; infinity: without bound."""
Cap = Annotated[float, Range(above=1, infinite=True)]
"""An upper bound that may be switched off."""
MAX_LOG_RATIO = 20.0
"""Log-ratios are clamped to plus and minus this before the exponential, as in the released code."""


@dataclass(slots=True, kw_only=True)
class TokenBatch:
    """The sampled tokens of one micro-batch, flat; N is 0 in a micro-batch that only fills up a rank.

    Log-probabilities are converted to at least float32. A token whose old or rollout log-probability is not finite is
    masked: its old log-probability becomes the policy's, and its weight in `pg_loss` and `mean` is 0. The global counts
    include it.
    """

    logprobs: Tensor
    """[N] Log-probabilities of the policy, with gradient."""
    old_logprobs: Tensor
    """[N] Log-probabilities that the ratio is taken against: the engine's, or the trainer's before the first step."""
    advantages: Tensor
    """[N]"""
    sequence_index: Tensor
    """[N] Index of the sequence that each token belongs to. Sequences are never split over micro-batches."""
    num_tokens: float
    """Number of sampled tokens of the whole mini-batch, over micro-batches and ranks."""
    num_sequences: float
    """Number of sequences with a sampled token, with the same scope."""
    rollout_logprobs: Tensor | None = None
    """[N] The engine's log-probabilities if `old_logprobs` are the trainer's. None if `old_logprobs` are the engine's:
    the mismatch between the two would be corrected twice."""
    reference_logprobs: Tensor | None = None
    """[N] Log-probabilities of the reference policy."""
    entropy: Tensor | None = None
    """[N] Entropy of the policy's distributions, in nats; with gradient if the entropy bonus is on."""
    mask: Tensor = field(init=False)
    """[N] bool; False if a log-probability of the token is not finite."""
    weights: Tensor = field(init=False)
    """[N] Weight of each token in the global loss, 0 if masked; a mean over tokens until `set_weights` is called."""
    importance_weights: Tensor | None = field(init=False, default=None)
    """[N] Correction for the mismatch between engine and trainer; None: no correction."""

    def __post_init__(self) -> None:
        self._check()
        dtype = torch.promote_types(self.logprobs.dtype, torch.float32)
        self.logprobs, self.advantages = self.logprobs.to(dtype), self.advantages.to(dtype)
        self.sequence_index = self.sequence_index.long()
        self.mask = self.old_logprobs.isfinite()
        if self.rollout_logprobs is not None:
            self.mask = self.mask & self.rollout_logprobs.isfinite()
        self.old_logprobs = torch.where(self.mask, self.old_logprobs.to(dtype), self.logprobs.detach())
        if self.rollout_logprobs is not None:
            self.rollout_logprobs = torch.where(self.mask, self.rollout_logprobs.to(dtype), self.old_logprobs)
        self.set_weights(aggregation_weights(self.sequence_index, self.num_tokens, self.num_sequences, "token_mean"))

    def _check(self) -> None:
        size = self.logprobs.shape
        for name in self.__dataclass_fields__:
            value = getattr(self, name, None)
            if isinstance(value, Tensor) and (value.dim() != 1 or value.shape != size):
                raise ValueError(f"{name} has shape {list(value.shape)}; one entry per sampled token: {list(size)}")
        if len(self.logprobs) and not (self.num_tokens > 0 and self.num_sequences > 0):
            raise ValueError(
                f"num_tokens ({self.num_tokens}) and num_sequences ({self.num_sequences}) count the whole mini-batch, "
                f"which has at least the {len(self.logprobs)} tokens here"
            )

    def set_weights(self, weights: Tensor) -> None:
        """Set the weights of the tokens in the global loss, [N]; those of masked tokens become 0."""
        self.weights = weights.to(self.logprobs.dtype) * self.mask

    def log_ratio(self) -> Tensor:
        """Log-ratio of policy to old, [N], clamped to +-20, with gradient."""
        return (self.logprobs - self.old_logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)

    def score(self) -> Tensor:
        """1, [N], with the gradient of the log-probabilities: turns a constant weight into a REINFORCE loss."""
        return 1.0 + (self.logprobs - self.logprobs.detach())

    def sequence_means(self, values: Tensor) -> Tensor:
        """Mean of `values` over the unmasked tokens of each token's sequence, [N]; 0 if all of them are masked.

        Args:
            values: [N], floating point; any value where masked, also NaN.
        """
        if not len(values):
            return values
        size = int(self.sequence_index.max()) + 1
        kept = torch.where(self.mask, values, torch.zeros_like(values))
        sums = values.new_zeros(size).index_add(0, self.sequence_index, kept)
        counts = values.new_zeros(size).index_add(0, self.sequence_index, self.mask.to(values.dtype))
        return (sums / counts.clamp(min=1.0))[self.sequence_index]

    def pg_loss(self, per_token: Tensor) -> Tensor:
        """This micro-batch's share of the global loss, corrected for the engine and aggregated.

        Args:
            per_token: [N] Losses of the tokens, with gradient.

        Returns:
            A scalar; with N = 0 it is 0 and still has a graph.
        """
        if self.importance_weights is not None:
            per_token = per_token * self.importance_weights
        return (per_token * self.weights).sum() if len(self.weights) else self.logprobs.sum() * 0.0

    def mean(self, values: Tensor) -> Tensor:
        """This micro-batch's share of a mean of numbers or bools, [N], over all sampled tokens: a detached scalar."""
        count = max(self.num_tokens, 1e-9)  # 0 only if no rank has a token
        return (values.detach().to(self.weights.dtype) * self.mask).sum() / count


class PolicyLoss(ABC):
    """A policy-gradient loss. The constructor's arguments are its config, checked there.

    KL, entropy bonus, aggregation and the correction for the engine are the same for every loss.
    """

    def __repr__(self) -> str:
        """The class and its attributes, for the record of a run."""
        return f"{type(self).__name__}({', '.join(f'{name}={value}' for name, value in vars(self).items())})"

    @abstractmethod
    def __call__(self, tokens: TokenBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and metrics of one micro-batch.

        Args:
            tokens: Tokens of the micro-batch.

        Returns:
            This micro-batch's share of the global loss to minimise, `tokens.pg_loss(per_token)`; and metrics by name,
            each a share of a mean over tokens, `tokens.mean(values)`, logged as `policy/NAME`. Shares add up over
            micro-batches and ranks; the names must not depend on the tokens.
        """
