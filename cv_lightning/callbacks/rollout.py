"""The rollout callback: before every training batch it syncs the engine, runs the agent and scores.

It owns the engine, the sandbox, the reward module and the background thread; the module only computes losses.
In evaluations it runs every configured setting over the same tasks and writes all trajectories.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import lightning.pytorch as pl
import torch
from lightning.pytorch.trainer.states import TrainerFn

from cv_lightning.agent.background import Background
from cv_lightning.agent.config import AgentConfig
from cv_lightning.agent.loop import Rollout
from cv_lightning.callbacks.parity import check_parity
from cv_lightning.callbacks.progress import RunProgress
from cv_lightning.callbacks.weights import whole_tensors
from cv_lightning.engine import Engine, EngineConfig, SamplingConfig, build_engine, engine_kind
from cv_lightning.evaluation.metrics import Outcome, outcomes, summarise, summarise_outcomes
from cv_lightning.modules.base import PolicyModule
from cv_lightning.rewards import RewardConfig, RewardModule
from cv_lightning.rl.advantages import AdvantageConfig
from cv_lightning.rl.collector import Collector, rollout_metrics
from cv_lightning.sandbox import Sandbox, SandboxConfig
from cv_lightning.trajectory.store import StoreConfig, TrajectoryWriter
from cv_lightning.types import Group, Iteration

logger = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """One way to evaluate; `test` runs each over the same tasks."""

    name: str = "greedy"
    """Folder under `<run>/eval/` (after `eval_prefix`) and prefix of its metrics."""
    temperature: float = 0.0
    """0: greedy."""
    tool: bool = True
    """False: the tool is neither offered nor callable."""
    num_samples: int = 1
    """Trajectories per task."""


@dataclass(slots=True)
class _Parts:
    """What lives from `setup` to `teardown`."""

    engine: Engine
    sandbox: Sandbox
    rewards: RewardModule
    background: Background
    writer: TrajectoryWriter | None = None
    """Of training; opened by the first rollout."""


class RolloutCallback(pl.Callback):
    """Makes the trajectories that GRPO trains on, and those that evaluations count.

    Args:
        agent: limits and words of the agent.
        engine: the engine inside this process.
        sampling: temperature, top_p and run seed of training rollouts.
        reward: components and weights.
        advantage: how rewards of a group become advantages.
        sandbox: where model code runs.
        store: which trajectories are kept on disk.
        num_samples: trajectories per task in training.
        evaluations: what `validate` and `test` run; one greedy pass with the tool by default.
        parity_tolerance: largest difference between engine and trainer log-probabilities that the start-up
            self-test accepts in float32; 0 turns the test off.
        eval_prefix: put before the names of the evaluations: `sft_` gives `<run>/eval/sft_greedy`.
    """

    def __init__(
        self,
        agent: AgentConfig | None = None,
        engine: EngineConfig | None = None,
        sampling: SamplingConfig | None = None,
        reward: RewardConfig | None = None,
        advantage: AdvantageConfig | None = None,
        sandbox: SandboxConfig | None = None,
        store: StoreConfig | None = None,
        num_samples: int = 8,
        evaluations: list[EvaluationConfig] | None = None,
        parity_tolerance: float = 1e-4,
        eval_prefix: str = "",
    ) -> None:
        self.agent = agent or AgentConfig()
        self.engine_config = engine or EngineConfig()
        self.sampling = sampling or SamplingConfig()
        self.reward = reward or RewardConfig()
        self.advantage = advantage or AdvantageConfig()
        self.sandbox_config = sandbox or SandboxConfig()
        self.store = store or StoreConfig()
        self.num_samples = num_samples
        self.evaluations = evaluations or [EvaluationConfig()]
        self.parity_tolerance = parity_tolerance
        self.eval_prefix = eval_prefix
        self.parts: _Parts | None = None
        self.parity_checked = False
        self.outcomes: dict[str, list[Outcome]] = {}
        if self.engine_config.max_images < self.agent.max_images:
            raise ValueError(
                f"engine.max_images ({self.engine_config.max_images}) is below agent.max_images "
                f"({self.agent.max_images}): the engine would refuse what the agent allows"
            )

    # ------------------------------------------------------------------ life cycle
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Start sandbox and judge; build vLLM before DeepSpeed initialises (traps T39, T49)."""
        module = _policy_module(pl_module)
        if self.parts is not None:
            return
        sandbox = Sandbox(self.sandbox_config)
        sandbox.start()
        in_process = engine_kind(self.engine_config) == "vllm"
        engine: Any = self._build_engine(module) if in_process else None
        self.parts = _Parts(engine, sandbox, RewardModule(self.reward), Background())
        trainer.strategy.barrier("engine")  # vLLM's start desynchronises ranks (trap T41)

    def _build_engine(self, module: PolicyModule) -> Engine:
        config = module.policy_config
        return build_engine(
            self.engine_config,
            config.path,
            dtype=config.dtype,
            seed=self.sampling.seed,
            model=module.policy,
            processor=module.processor,
        )

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Close everything; no child outlives the run."""
        self._close()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Close everything on an error or Ctrl-C, too."""
        self._close()

    def _close(self) -> None:
        if self.parts is None:
            return
        parts, self.parts = self.parts, None
        if parts.writer is not None:
            parts.writer.close()
        parts.background.close()
        parts.rewards.close()
        parts.sandbox.close()
        if parts.engine is not None:
            parts.engine.close()

    # ------------------------------------------------------------------ training
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Sync weights, roll out, score, store; hang the groups on the batch."""
        if not isinstance(batch, Iteration):
            return
        module, parts = _policy_module(pl_module), self._ready(pl_module)
        start = time.perf_counter()
        self.sync(module, version=module.iteration)
        synced = time.perf_counter()
        if self.parity_tolerance and not self.parity_checked:
            self._parity(trainer, module, batch)
        begun = time.perf_counter()
        with RunProgress.rollout_of(trainer, f"rollout {module.iteration}") as show:
            collector = self._collector(module, self.agent)
            batch.groups = collector.collect(batch.tasks, self.num_samples, self.sampling, module.iteration, show)
        elapsed = time.perf_counter() - begun
        if parts.writer is None:
            parts.writer = TrajectoryWriter(trainer.default_root_dir, self.store, rank=trainer.global_rank)
        for group in batch.groups:
            parts.writer.write_group(group, module.iteration)
        metrics = rollout_metrics(batch.groups, elapsed) | parts.rewards.metrics(batch.groups) | _curves(batch.groups)
        metrics |= {
            "time/sync_s": synced - start,
            "time/rollout_s": elapsed,
            "time/store_s": time.perf_counter() - begun - elapsed,
        }
        module.log_dict({k: float(v) for k, v in metrics.items()}, sync_dist=trainer.world_size > 1)

    def sync(self, module: PolicyModule, version: int) -> None:
        """Hand the policy's weights to the engine; collective under ZeRO-3."""
        assert self.parts is not None and module.policy is not None
        self.parts.engine.update_weights(whole_tensors(module.policy), version)

    def _parity(self, trainer: pl.Trainer, module: PolicyModule, batch: Iteration) -> None:
        tasks = batch.tasks[:4]
        groups = self._collector(module, self.agent).collect(tasks, 2, self.sampling, module.iteration)
        report = check_parity(
            module, [t for g in groups for t in g.trajectories], self.sampling.temperature, self.parity_tolerance
        )
        self.parity_checked = True
        logger.info("engine and trainer agree: max |difference| of log-probabilities %.1e over %d tokens", *report)

    # ------------------------------------------------------------------ evaluation
    def on_test_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Give the engine the weights under test."""
        self._start_evaluation(trainer, pl_module)

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Give the engine the weights under test."""
        self._start_evaluation(trainer, pl_module)

    def on_test_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Run every evaluation setting over the batch's tasks."""
        self._evaluate_batch(trainer, pl_module, batch)

    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Run every evaluation setting over the batch's tasks."""
        self._evaluate_batch(trainer, pl_module, batch)

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Summarise, log and write `metrics.json` per setting."""
        self._finish_evaluation(trainer, pl_module)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Summarise, log and write `metrics.json` per setting."""
        self._finish_evaluation(trainer, pl_module)

    def _start_evaluation(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Sync weights, and clear what an earlier run of the same evaluation left in its folder."""
        module = _policy_module(pl_module)
        self._ready(module)
        self.outcomes = {evaluation.name: [] for evaluation in self.evaluations}
        for evaluation in self.evaluations:
            if trainer.is_global_zero:
                shutil.rmtree(self._eval_folder(trainer, module, evaluation), ignore_errors=True)
        trainer.strategy.barrier("evaluation")
        self.sync(module, version=module.iteration)

    def _evaluate_batch(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any) -> None:
        module = _policy_module(pl_module)
        for evaluation in self.evaluations:
            sampling = SamplingConfig(temperature=evaluation.temperature, seed=self.sampling.seed)
            collector = self._collector(module, replace(self.agent, tool=evaluation.tool))
            with RunProgress.rollout_of(trainer, f"evaluate {evaluation.name}") as show:
                groups = collector.collect(batch.tasks, evaluation.num_samples, sampling, 0, show)
            folder = self._eval_folder(trainer, module, evaluation)
            # Whatever the store's sampling in training: from an evaluation anybody must be able to recount its table.
            with TrajectoryWriter(folder, replace(self.store, share=1.0), rank=trainer.global_rank) as writer:
                for group in groups:
                    writer.write_group(group, module.iteration)
            self.outcomes[evaluation.name] += outcomes(groups)

    def _finish_evaluation(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        module = _policy_module(pl_module)
        for evaluation in self.evaluations:
            summary = summarise_outcomes(gather_lists(self.outcomes[evaluation.name]))
            values = {f"{evaluation.name}/{key}": value for key, value in summary.scalars().items()}
            module.log_dict(values, sync_dist=True)  # the same on all ranks
            if trainer.is_global_zero:
                write_json(self._eval_folder(trainer, module, evaluation) / "metrics.json", summary.to_json())

    def _eval_folder(self, trainer: pl.Trainer, module: PolicyModule, evaluation: EvaluationConfig) -> Path:
        """`eval/<prefix><name>`; a validation in the midst of training names its iteration, too."""
        when = f"iteration{module.iteration:06d}_" if trainer.state.fn is TrainerFn.FITTING else ""
        return Path(trainer.default_root_dir) / "eval" / f"{self.eval_prefix}{when}{evaluation.name}"

    # ------------------------------------------------------------------ parts
    def _ready(self, pl_module: pl.LightningModule) -> _Parts:
        """The parts, with the transformers engine built once the policy exists."""
        assert self.parts is not None, "setup has not run"
        if self.parts.engine is None:
            self.parts.engine = self._build_engine(_policy_module(pl_module))
        return self.parts

    def _collector(self, module: PolicyModule, agent: AgentConfig) -> Collector:
        parts = self._ready(module)
        banned = list(module.vision_ids)
        if not agent.tool:
            tool_call = module.processor.tokenizer.convert_tokens_to_ids("<tool_call>")
            banned += [tool_call] if tool_call is not None else []
        rollout = Rollout(
            engine=parts.engine,
            sandbox=parts.sandbox,
            encoder=module.encoder,
            background=parts.background,
            config=agent,
            banned_ids=tuple(banned),
            score=parts.rewards.score_answer if self.reward.judge is not None else None,
            window=2 * self.engine_config.max_num_seqs,
        )
        return Collector(rollout, parts.rewards, self.advantage, module.reduce_sum)


def _policy_module(module: pl.LightningModule) -> PolicyModule:
    if not isinstance(module, PolicyModule):
        raise TypeError(f"RolloutCallback works with a PolicyModule, not with {type(module).__name__}; change --model")
    return module


def _curves(groups: Sequence[Group]) -> dict[str, float]:
    """Tool use while training, in the words of the evaluation."""
    return {f"rollout/{key}": value for key, value in summarise(list(groups)).scalars().items()}


def gather_lists(items: list[T]) -> list[T]:
    """The lists of all ranks, one after another."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return items
    everything: list[list[T]] = [[] for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather_object(everything, items)
    return [item for part in everything for item in part]


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(value, indent=1))
    os.replace(temporary, path)
