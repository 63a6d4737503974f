"""GRPO on trajectories that the rollout callback attached to the batch."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from cv_lightning.models.loading import PolicyConfig, load_policy
from cv_lightning.models.logprobs import Entropy, LogProbs
from cv_lightning.models.lora import adapters_off
from cv_lightning.models.packing import PackedBatch, pack_sequences
from cv_lightning.modules.base import OptimizerConfig, PolicyModule
from cv_lightning.ranges import PositiveInt
from cv_lightning.rl.algorithm import AlgorithmConfig
from cv_lightning.rl.groups import assign_advantages, has_advantage, is_trainable
from cv_lightning.rl.kl import rewards_with_kl
from cv_lightning.rl.losses import TokenBatch
from cv_lightning.rl.objective import total_loss
from cv_lightning.types import Group, Iteration, Trajectory

REFERENCE = "reference."
"""Prefix of the reference policy's parameters, which checkpoints leave out."""

TOKENS, PACKED_TOKENS = "trained_tokens", "packed_tokens"
LOSSES = ("loss", "pg_loss")
PER_STEP = (*LOSSES, "grad_norm", "skipped_steps", "trajectories", "unpackable")
"""Metrics that are sums or means over steps; all others are means over trained tokens."""

NOT_COMPARED = -1.0
"""Train-inference mismatch if no token was compared."""
NOT_FINITE = 1e9
"""Stands for a mismatch that is not finite, so that curves and tables show it."""
PROBED = 8
"""Number of trajectories that are compared if none has a gradient."""


class GRPOModule(PolicyModule):
    """Group-relative policy optimisation over packed trajectories.

    One batch is one RL iteration. It always takes `algorithm.num_minibatches` optimizer steps, each on an equal number
    of groups and normalised by the counts of their scored trajectories over all ranks.

    Args:
        policy: The policy model and how it is loaded.
        optimizer: AdamW and schedule.
        max_tokens_per_row: Token budget of one packed micro-batch.
        algorithm: Advantages, masks, policy loss, KL, entropy, mini-batches and dynamic sampling.
        temperature: Sampling temperature of the rollouts, the same as `rollout.sampling.temperature`.
    """

    trains_on_rollouts = True

    def __init__(
        self,
        policy: PolicyConfig,
        optimizer: OptimizerConfig | None = None,
        max_tokens_per_row: PositiveInt = 16384,
        algorithm: AlgorithmConfig = AlgorithmConfig(),  # noqa: B008 (frozen)
        temperature: float = 1.0,
    ) -> None:
        if not temperature > 0:
            raise ValueError(
                f"rollout.sampling.temperature is {temperature}; it must be above 0, because training learns from "
                "the differences of sampled answers. Set --rollout.sampling.temperature 1.0"
            )
        super().__init__(policy, optimizer, max_tokens_per_row)
        self.algorithm = algorithm.resolved()
        self.steps_per_batch = self.algorithm.num_minibatches
        self.temperature = temperature
        self.reference_path = self.algorithm.kl.reference_path or policy.path
        self._kl_penalties: list[float] = []
        """KL penalties that were subtracted from the rewards of this iteration's trajectories."""

    def configure_model(self) -> None:
        """Load the policy and, for training with a KL penalty, the frozen reference."""
        super().configure_model()
        needed = self.algorithm.kl.weight > 0 and self.trainer.training and not self.is_own_reference
        if needed and self.reference is None:
            self.reference = load_policy(replace(self.policy_config, path=self.reference_path, lora=None))
            self.reference.requires_grad_(False)

    @property
    def is_own_reference(self) -> bool:
        """True if the reference is the policy without its adapters."""
        return self.policy_config.lora is not None and self.reference_path == self.policy_config.path

    def training_step(self, batch: Iteration, batch_idx: int) -> None:
        """Take all optimizer steps of one iteration."""
        start, learning_rate = time.perf_counter(), self.learning_rate
        totals: defaultdict[str, float] = defaultdict(float)
        scored = self._split_groups(batch.groups, totals)
        contributing = [self._contributing(trajectories) for trajectories in scored]
        minibatches = [self.pack_micro_batches(self.train_sequences(trajectories)) for trajectories in contributing]
        self._attach_fixed([micro_batch for micro_batches in minibatches for micro_batch in micro_batches])
        mismatch = NOT_COMPARED if self.reduce_max(len(contributing[0])) else self._probe_mismatch(scored[0])
        for number, micro_batches in enumerate(minibatches):
            gap = self._optimize(micro_batches, scored[number], totals)
            if number == 0:  # the engine does not have the weights of later ones
                mismatch = max(mismatch, gap)
        self.iteration += 1
        self._log_update(totals, mismatch, learning_rate, time.perf_counter() - start)
        self.vision_cache.clear()

    def _split_groups(self, groups: Sequence[Group], totals: defaultdict[str, float]) -> list[list[Trajectory]]:
        """Scored trajectories of each mini-batch: equally many groups, those with an advantage distributed first."""
        ordered = sorted(groups, key=has_advantage, reverse=True)
        count = self.algorithm.num_minibatches
        parts = [ordered[first::count] for first in range(count)]
        scored = [[t for group in part for t in group.trajectories if is_trainable(t)] for part in parts]
        usable = [[t for t in part if self.can_pack(t)] for part in scored]
        totals["unpackable"] += sum(map(len, scored)) - sum(map(len, usable))
        return usable

    def _contributing(self, scored: Sequence[Trajectory]) -> list[Trajectory]:
        """Trajectories with a gradient: their advantage is not 0, or a KL penalty or entropy bonus applies.

        The others are not computed but count in the normalisers, so that the result is the same.
        """
        regularised = self.kl_weight > 0 or self.algorithm.entropy_weight > 0
        return [t for t in scored if t.advantage or regularised]

    @property
    def kl_weight(self) -> float:
        """Weight of the KL penalty in the loss of the current iteration."""
        return self.algorithm.kl.weight_at(self.iteration)

    # ------------------------------------------------------------------ advantages
    def set_advantages(self, groups: Sequence[Group]) -> None:
        """Set the advantages of an iteration's scored groups of this rank. Call it once, on every rank."""
        estimator, mask = self.algorithm.advantage, self.algorithm.mask
        assert estimator is not None, "AlgorithmConfig.resolved sets it"
        assign_advantages(groups, estimator, mask, self.reduce_sum, self.advantage_rewards)

    @torch.no_grad()
    def advantage_rewards(self, trajectories: Sequence[Trajectory]) -> list[float]:
        """Rewards that advantages are computed from, minus the KL penalty if it belongs in the reward.

        Args:
            trajectories: Scored trajectories of this rank.
        """
        totals = [t.reward.total for t in trajectories if t.reward is not None]
        kl = self.algorithm.kl
        if not kl.in_reward:
            return totals
        assert self.policy is not None
        rewards = list(totals)
        # The update leaves the others out, too: no token was sampled (over-long prompt), or images are missing.
        counted = [n for n, t in enumerate(trajectories) if any(t.loss_mask) and self.can_pack(t)]
        sequences = self.train_sequences([trajectories[number] for number in counted])
        for chunk in self.split_sequences(sequences):
            packed = pack_sequences(chunk, self.policy.config, self.adapter)
            reference = self._reference_logprobs(packed).cpu()
            places = [None if member.number is None else counted[member.number] for member in chunk]
            own = [0.0 if place is None else rewards[place] for place in places]
            penalised = rewards_with_kl(own, packed.rollout_logprobs, reference, packed.sequence_index, kl)
            for place, reward in zip(places, penalised, strict=True):
                if place is not None:  # a dummy sequence has none
                    rewards[place] = float(reward)
        self._kl_penalties += [totals[number] - rewards[number] for number in counted]
        return rewards

    # ------------------------------------------------------------------ log-probabilities that stay fixed
    @torch.no_grad()
    def _attach_fixed(self, micro_batches: Sequence[PackedBatch]) -> None:
        """Set the log-probabilities of the reference and of the policy before its first step, where they are read."""
        algorithm = self.algorithm
        for micro_batch in micro_batches:
            if self.kl_weight > 0:
                micro_batch.reference_logprobs = self._reference_logprobs(micro_batch)
            if algorithm.old_logprobs == "trainer" and algorithm.num_minibatches > 1:
                micro_batch.old_logprobs = self.logprobs(micro_batch).logprobs

    def _reference_logprobs(self, micro_batch: PackedBatch) -> torch.Tensor:
        assert self.policy is not None
        if self.is_own_reference:
            with adapters_off(self.policy):
                return self.logprobs(micro_batch).logprobs
        assert self.reference is not None
        return self.logprobs(micro_batch, model=self.reference).logprobs

    @torch.no_grad()
    def _probe_mismatch(self, scored: Sequence[Trajectory]) -> float:
        """Train-inference mismatch if no trajectory of the first step has a gradient on any rank."""
        micro_batches = self.pack_micro_batches(self.train_sequences(scored[:PROBED]))
        return max(_largest_gap(self.logprobs(m).logprobs, m) for m in micro_batches)

    # ------------------------------------------------------------------ one mini-batch
    def _optimize(
        self, micro_batches: list[PackedBatch], scored: Sequence[Trajectory], totals: defaultdict[str, float]
    ) -> float:
        """Take one optimizer step and add its metrics to `totals`: losses as means over steps, others as token sums.

        Returns:
            Largest difference between log-probabilities of engine and trainer on this rank, or NOT_COMPARED.
        """
        counts = [float(sum(sum(t.loss_mask) for t in scored)), float(len(scored))]
        num_tokens, num_sequences = self.reduce_sum(counts)
        entropy: Entropy = "gradient" if self.algorithm.entropy_weight > 0 else "value"
        kl_weight = self.kl_weight
        gaps, shares = [NOT_COMPARED], []

        def loss(micro_batch: PackedBatch) -> torch.Tensor:
            computed = self.logprobs(micro_batch, entropy=entropy)
            micro_batch = micro_batch.to(self.device)
            tokens = self._tokens(micro_batch, computed, max(num_tokens, 1.0), max(num_sequences, 1.0))
            value, metrics = total_loss(tokens, self.algorithm, kl_weight)
            shares.append(metrics)
            gaps.append(_largest_gap(computed.logprobs.detach(), micro_batch))
            return value

        step = self.accumulate_and_step(micro_batches, loss)
        for metrics in shares:
            for name, share in metrics.items():
                totals[name] += float(share) * (1 / self.steps_per_batch if name in LOSSES else num_tokens)
        totals["grad_norm"] += step.grad_norm / self.steps_per_batch / self.trainer.world_size
        totals["skipped_steps"] += step.skipped / self.trainer.world_size
        totals["trajectories"] += sum(m.num_trained for m in micro_batches)
        totals[TOKENS] += sum(m.num_loss_tokens for m in micro_batches)
        totals[PACKED_TOKENS] += sum(m.input_ids.numel() for m in micro_batches)
        return max(gaps)

    def _tokens(
        self, micro_batch: PackedBatch, computed: LogProbs, num_tokens: float, num_sequences: float
    ) -> TokenBatch:
        old, rollout = micro_batch.rollout_logprobs, None
        if self.algorithm.old_logprobs == "trainer":
            before, rollout = micro_batch.old_logprobs, micro_batch.rollout_logprobs
            old = computed.logprobs.detach() if before is None else before
        return TokenBatch(
            logprobs=computed.logprobs,
            old_logprobs=old,
            advantages=micro_batch.advantages,
            sequence_index=micro_batch.sequence_index,
            num_tokens=num_tokens,
            num_sequences=num_sequences,
            rollout_logprobs=rollout,
            reference_logprobs=micro_batch.reference_logprobs,
            entropy=computed.entropy,
        )

    def _log_update(self, totals: dict[str, float], mismatch: float, learning_rate: float, seconds: float) -> None:
        """Log the metrics of one iteration over all ranks. The learning rate is that of its first step."""
        names = sorted(totals)
        sums = dict(zip(names, self.reduce_sum([totals[name] for name in names]), strict=True))
        tokens, packed_tokens = sums.pop(TOKENS), sums.pop(PACKED_TOKENS)
        metrics = {
            f"policy/{name}": value if name in PER_STEP else value / max(tokens, 1.0) for name, value in sums.items()
        }
        if self.algorithm.kl.in_reward:
            penalty, count = self.reduce_sum([sum(self._kl_penalties), float(len(self._kl_penalties))])
            metrics["policy/kl_penalty"] = penalty / max(count, 1.0)
            self._kl_penalties.clear()
        metrics |= {
            "policy/lr": learning_rate,
            "policy/tokens_per_s": packed_tokens / seconds,
            "time/update_s": seconds,
            "iteration": float(self.iteration),
        }
        passes, images = self.reduce_sum([self.vision_cache.num_passes, self.vision_cache.num_images])
        if images:
            metrics["policy/image_passes"] = passes / images
        mismatch = self.reduce_max(mismatch)
        if mismatch != NOT_COMPARED:
            metrics["policy/mismatch_max"] = mismatch
        self.log_dict(metrics)

    # ------------------------------------------------------------------ checkpoints
    @contextmanager
    def checkpoint_view(self) -> Iterator[None]:
        """Context manager that hides the reference, which is loaded from its own folder."""
        reference, self.reference = self.reference, None
        try:
            yield
        finally:
            self.reference = reference

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave the reference out of checkpoints that Lightning writes."""
        super().on_save_checkpoint(checkpoint)
        state = checkpoint.get("state_dict", {})
        checkpoint["state_dict"] = {name: value for name, value in state.items() if not name.startswith(REFERENCE)}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the loaded reference; DeepSpeed's checkpoints have no state here."""
        super().on_load_checkpoint(checkpoint)
        if "state_dict" in checkpoint:
            own = self.state_dict()
            checkpoint["state_dict"] |= {name: value for name, value in own.items() if name.startswith(REFERENCE)}


def _largest_gap(logprobs: torch.Tensor, micro_batch: PackedBatch) -> float:
    """Largest difference from the engine's log-probabilities; NOT_FINITE if it is not finite."""
    if not micro_batch.num_loss_tokens:
        return NOT_COMPARED
    gap = (logprobs - micro_batch.rollout_logprobs.to(logprobs.device)).abs()
    return float(gap.nan_to_num(nan=NOT_FINITE, posinf=NOT_FINITE).max())
