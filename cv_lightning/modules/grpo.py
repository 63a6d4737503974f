"""GRPO on trajectories that the rollout callback hung on the batch."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import torch

from cv_lightning.model.loading import PolicyConfig, load_policy
from cv_lightning.model.packing import PackedBatch
from cv_lightning.modules.base import OptimizerConfig, PolicyModule
from cv_lightning.rl.collector import is_trainable
from cv_lightning.rl.losses import PolicyLossConfig, policy_loss
from cv_lightning.types import Group, Iteration, Trajectory

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class GRPOModule(PolicyModule):
    """Group-relative policy optimisation over packed trajectories.

    One batch is one RL iteration. It takes `num_minibatches` optimizer steps, always (trap T51): each on an equal
    share of the groups, normalised by the token count of all ranks.
    """

    def __init__(
        self,
        policy: PolicyConfig,
        optimizer: OptimizerConfig | None = None,
        max_tokens_per_row: int = 16384,
        loss: PolicyLossConfig | None = None,
        num_minibatches: int = 2,
        temperature: float = 1.0,
        old_logprobs: Literal["engine", "trainer"] = "engine",
        reference_path: str | None = None,
    ) -> None:
        """
        Args:
            policy: which model, and how it is loaded.
            optimizer: AdamW and schedule.
            max_tokens_per_row: token budget of one packed row, which is one micro-batch.
            loss: clipping, aggregation, KL and entropy.
            num_minibatches: optimizer steps per iteration.
            temperature: of the rollouts, for the log-probabilities; the same as `sampling.temperature`.
            old_logprobs: what the ratio is taken against: the engine's log-probabilities, or one pass of the
                trainer's before the first step, times a truncated importance weight to the engine (T53).
            reference_path: Hugging Face folder of the reference policy; by default `policy.path`. Loaded only
                where the KL weight is above 0.
        """
        super().__init__(policy, optimizer, max_tokens_per_row)
        if num_minibatches < 1 or temperature <= 0:
            raise ValueError("model.num_minibatches must be at least 1 and model.temperature above 0")
        self.loss = loss or PolicyLossConfig()
        self.num_minibatches = num_minibatches
        self.temperature = temperature
        self.old_logprobs = old_logprobs
        self.reference_path = reference_path or policy.path
        self.reference: PreTrainedModel | None = None

    def configure_model(self) -> None:
        """Load the policy and, for training with a KL penalty, the frozen reference (design decision 15)."""
        super().configure_model()
        if self.loss.kl_weight > 0 and self.reference is None and self.trainer.training:
            from dataclasses import replace

            self.reference = load_policy(replace(self.policy_config, path=self.reference_path))
            self.reference.requires_grad_(False).eval()

    def training_step(self, batch: Iteration, batch_idx: int) -> None:
        """All optimizer steps of one iteration."""
        start = time.perf_counter()
        minibatches = [
            [t for group in batch.groups[i :: self.num_minibatches] for t in group.trajectories if is_trainable(t)]
            for i in range(self.num_minibatches)
        ]
        packed = [self.pack_micro_batches(self.train_rows(trajectories)) for trajectories in minibatches]
        self._attach_reference([p for micro_batches in packed for p in micro_batches])
        if self.old_logprobs == "trainer" and self.num_minibatches > 1:
            self._attach_old([p for micro_batches in packed for p in micro_batches])
        totals: dict[str, float] = {}
        for index, micro_batches in enumerate(packed):
            self._step(micro_batches, totals, first=index == 0)
        self.iteration += 1
        self._log_update(totals, batch.groups, time.perf_counter() - start)

    # ------------------------------------------------------------------ one mini-batch
    def _step(self, micro_batches: list[PackedBatch], totals: dict[str, float], first: bool) -> None:
        """One optimizer step; adds its metric sums to `totals`."""
        counts = [float(sum(p.num_loss_tokens for p in micro_batches)), float(sum(p.num_rows for p in micro_batches))]
        num_tokens, num_rows = self.reduce_sum(counts)

        def loss(batch: PackedBatch) -> torch.Tensor:
            computed = self.logprobs(batch, temperature=self.temperature, with_entropy=True)
            value, metrics = policy_loss(computed, batch, self.loss, num_tokens=max(num_tokens, 1.0), num_rows=max(num_rows, 1.0))
            if first and batch.num_loss_tokens:
                gap = (computed.logprobs.detach().float() - batch.engine_logprobs.to(self.device)).abs()
                totals["parity_max"] = max(totals.get("parity_max", 0.0), float(gap.max()))
            for name, number in metrics.items():
                totals[name] = totals.get(name, 0.0) + number / self.num_minibatches
            return value

        norm = self.accumulate_and_step(micro_batches, loss)
        totals["grad_norm"] = totals.get("grad_norm", 0.0) + norm / self.num_minibatches
