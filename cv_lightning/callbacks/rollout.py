"""The rollout callback: before every training batch it syncs the engine, runs the agent and scores.

It owns the engine, the sandbox, the reward module and the background thread; the module only computes losses.
Evaluations are run by its `Evaluator`.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.seed import isolate_rng

from cv_lightning.agent.config import AgentConfig
from cv_lightning.agent.driver import Rollout, RolloutProgress
from cv_lightning.background import Background
from cv_lightning.callbacks.progress import RunProgress
from cv_lightning.callbacks.signals import StopOnSignal
from cv_lightning.callbacks.watchdog import Watchdog
from cv_lightning.data.modules import EvaluationDataModule
from cv_lightning.distributed import check_agreement, collective_timeout_s, gather_lists
from cv_lightning.engines import Engine, EngineConfig, SamplingConfig, build_engine, engine_kind
from cv_lightning.evaluation.metrics import summarise_outcomes
from cv_lightning.evaluation.outcome import outcomes
from cv_lightning.models.gather import gather_full_params
from cv_lightning.modules.base import PolicyModule
from cv_lightning.modules.grpo import GRPOModule
from cv_lightning.ranges import Fraction, NonNegativeFloat, PositiveInt, check_ranges
from cv_lightning.rewards import RewardConfig, RewardModule
from cv_lightning.rewards.judge.check import check_endpoint
from cv_lightning.rewards.judge.config import JudgeConfig
from cv_lightning.rewards.metrics import added, means, reward_sums
from cv_lightning.rl.groups import has_reward_variance
from cv_lightning.rollout.collector import Collector, end_state_metric, merge_metrics, rollout_metrics
from cv_lightning.rollout.dynamic_sampling import TaskQueue, sample_groups
from cv_lightning.rollout.engine_group import EngineGroup, check_engine_device
from cv_lightning.rollout.evaluation_state import rollout_fingerprint
from cv_lightning.rollout.evaluator import EvaluationConfig, Evaluator
from cv_lightning.rollout.self_test import SelfTest, with_other_weights
from cv_lightning.sandbox import Sandbox, SandboxConfig
from cv_lightning.trajectory.store import StoreConfig, TrajectoryWriter
from cv_lightning.types import CVLightningError, EndState, Group, Iteration, Task

__all__ = ["EvaluationConfig", "RolloutCallback"]

logger = logging.getLogger(__name__)
FAILURES = (EndState.ERROR_ENGINE, EndState.ERROR_SANDBOX, EndState.ERROR_JUDGE)
"""End states that neither policy nor data have caused."""
ShowProgress = Callable[[RolloutProgress], None] | None


@dataclass(slots=True)
class _Parts:
    """The parts that live from `setup` to `teardown`."""

    sandbox: Sandbox
    rewards: RewardModule
    background: Background = field(default_factory=Background)
    engine: Engine | None = None
    """None until it is built: the transformers engine needs the policy."""
    ranks: EngineGroup | None = None
    """The ranks that share a tensor-parallel engine."""
    writer: TrajectoryWriter | None = None
    """Writer of training trajectories, opened by the first rollout."""

    def close(self) -> None:
        """Close all parts, also if closing one of them fails; no child process outlives the run."""
        with ExitStack() as parts:
            for part in (self.writer, self.engine, self.sandbox, self.rewards, self.background):
                if part is not None:
                    parts.callback(part.close)


class RolloutCallback(pl.Callback):
    """Makes the trajectories that GRPO trains on, and those of evaluations.

    The command line configures it under `rollout`. It does nothing in a run without rollouts, such as SFT without
    validation.

    Args:
        agent: Limits and prompts of the agent.
        engine: The engine that samples.
        sampling: Temperature, top_p and run seed of training rollouts.
        reward: Reward terms and weights.
        sandbox: Limits of the sandbox that runs the model's code.
        store: Selection of the trajectories that are kept on disk.
        num_samples: Trajectories per task in training.
        evaluations: Settings that `validate` and `test` run; by default one greedy pass with the tool.
        mismatch_tolerance: Largest difference between engine and trainer log-probabilities that the start-up
            self-test accepts in float32; 0 turns the test off.
        max_failed_frac: Fraction of an iteration's trajectories, over all ranks, that engine, sandbox or judge may
            fail; the run stops above it.
        eval_prefix: Prefix of the names of the evaluations: `sft_` gives `<run>/eval/sft_greedy`.
    """

    def __init__(
        self,
        agent: AgentConfig = AgentConfig(),  # noqa: B008 (frozen)
        engine: EngineConfig = EngineConfig(),  # noqa: B008 (frozen)
        sampling: SamplingConfig = SamplingConfig(),  # noqa: B008 (frozen)
        reward: RewardConfig = RewardConfig(),  # noqa: B008 (frozen)
        sandbox: SandboxConfig = SandboxConfig(),  # noqa: B008 (frozen)
        store: StoreConfig = StoreConfig(),  # noqa: B008 (frozen)
        num_samples: PositiveInt = 8,
        evaluations: list[EvaluationConfig] | None = None,
        mismatch_tolerance: NonNegativeFloat = 1e-4,
        max_failed_frac: Fraction = 0.25,
        eval_prefix: str = "",
    ) -> None:
        check_ranges(RolloutCallback.__init__, "rollout", locals())
        self.agent = agent
        self.engine_config = _repeatable(engine, agent)
        self.sampling = sampling
        self.reward = reward
        self.sandbox_config = sandbox
        self.store = store
        self.num_samples = num_samples
        settings = evaluations or [EvaluationConfig()]
        fingerprint = rollout_fingerprint(self.agent, self.reward, self.engine_config, self.sandbox_config)
        self.evaluator = Evaluator(settings, eval_prefix, self.store, self.sampling.seed, fingerprint)
        self.mismatch_tolerance = mismatch_tolerance
        self.max_failed_frac = max_failed_frac
        self.parts: _Parts | None = None
        self.is_tested = False
        """True after the start-up self-test."""
        self.queue = TaskQueue()
        if self.engine_config.max_images < self.agent.max_images:
            raise ValueError(
                f"engine.max_images ({self.engine_config.max_images}) is below agent.max_images "
                f"({self.agent.max_images}): the engine would refuse what the agent allows"
            )

    # ------------------------------------------------------------------ life cycle
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Start the sandbox and check the judge; build vLLM before DeepSpeed initialises."""
        if self.parts is not None or not rolls_out(pl_module, getattr(trainer, "datamodule", None), stage):
            return
        module = _policy_module(pl_module)
        if self.engine_config.keeps_own_weights:
            if stage == "fit":
                raise CVLightningError(
                    "engine.kind server samples from a model that is not the policy: `test` and `validate` it, or "
                    "train with engine.kind vllm, transformers or sglang"
                )
            module.loads_policy = False
        self._check_deadline(trainer)
        sandbox = Sandbox(self.sandbox_config)
        sandbox.start()
        self.parts = _Parts(sandbox, RewardModule(self.reward))
        if stage == "fit" and self.reward.judge is not None and trainer.is_global_zero:
            threading.Thread(target=warn_of_judge, args=(self.reward.judge,), daemon=True).start()
        kind = engine_kind(self.engine_config)
        if kind == "vllm":
            check_engine_device(trainer)
        check_agreement({"engine.kind auto": kind})  # a rank that cannot import vLLM would join no weight sync
        size = self.engine_config.tensor_parallel_size
        if size > 1:
            self.parts.ranks = EngineGroup(size, trainer)
        if kind in ("vllm", "server"):  # vLLM's start measures memory with a collective of all ranks
            with Watchdog.at(trainer, "start of the engine", waits=kind == "vllm"):
                self._parts_and_engine(module)
        trainer.strategy.barrier("engine")  # vLLM's start desynchronises ranks

    def _check_deadline(self, trainer: pl.Trainer) -> None:
        """Warn if a rank that waits for the longest possible rollout of another would time out."""
        timeout_s = collective_timeout_s() if trainer.world_size > 1 else None
        if timeout_s is not None and timeout_s <= self.agent.longest_s:
            logger.warning(
                "twice agent.deadline_s (%g) is not below the strategy's time-out (%g s): a rank that waits for a long "
                "rollout and its scores would end the run; raise trainer.strategy's time-out or lower the deadline",
                self.agent.deadline_s,
                timeout_s,
            )

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Close all parts."""
        self._close()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Close all parts after an error or Ctrl-C."""
        self._close()

    def _close(self) -> None:
        if self.parts is not None:
            parts, self.parts = self.parts, None
            parts.close()

    def state_dict(self) -> dict[str, Any]:
        """The tasks that dynamic sampling has not rolled out yet."""
        return self.queue.state_dict()

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Wait until the trajectories are on disk: a resumed run relies on those before the checkpoint."""
        if self.parts is not None and self.parts.writer is not None:
            self.parts.writer.sync()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue with the tasks that were not rolled out yet."""
        self.queue.load_state_dict(state_dict)

    # ------------------------------------------------------------------ training
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Sync weights, roll out, score and store; put the groups on the batch."""
        if not isinstance(batch, Iteration):
            return
        module = _policy_module(pl_module)
        parts, engine = self._parts_and_engine(module)
        is_due = bool(self.mismatch_tolerance) and not self.is_tested
        test = SelfTest(self, engine, trainer, module, batch.tasks) if is_due else None
        if test is not None:
            with isolate_rng():  # a resumed run makes the test again, an uninterrupted one does not
                test.fill_caches()
        start = time.perf_counter()
        self.sync(module, version=module.iteration)
        synced = time.perf_counter()
        if test is not None:
            with isolate_rng():
                test.run()
            self.is_tested = True
        begun = time.perf_counter()
        number = module.iteration + 1  # metrics count from 1
        with RunProgress.rollout_of(trainer, f"rollout {number}") as show:
            groups, metrics = self._collect(trainer, module, batch, show)
        elapsed = time.perf_counter() - begun
        if parts.writer is None:
            folder, rank = trainer.default_root_dir, trainer.global_rank
            parts.writer = TrajectoryWriter(folder, self.store, rank, background=True)
        for group in groups:
            parts.writer.write_group(group, number)
        handed_over = time.perf_counter()
        engine.sleep()
        with Watchdog.at(trainer, f"end of rollout {number}", waits=True):
            trainer.strategy.barrier("rollout")
        metrics |= rollout_metrics(groups, elapsed) | parts.rewards.judge_metrics()
        metrics |= {
            "time/sync_s": synced - start,
            "time/rollout_s": elapsed,
            "time/wait_s": time.perf_counter() - handed_over,
        }
        # Reward sums are added over all ranks first: a mean of the ranks' means would weigh ranks equally.
        merged = merge_metrics(gather_lists([metrics])) | means(added(gather_lists([reward_sums(groups)])))
        summary = summarise_outcomes(gather_lists(outcomes(groups)))
        merged |= {f"rollout/{key}": value for key, value in summary.scalars().items()}
        module.log_dict(merged)
        self._check_failures(merged, groups)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Wait until the trajectories are on disk, which are written during the update."""
        if self.parts is not None and self.parts.writer is not None:
            begun = time.perf_counter()
            self.parts.writer.flush()
            pl_module.log("time/store_s", time.perf_counter() - begun)

    def _check_failures(self, metrics: Mapping[str, float], groups: Sequence[Group]) -> None:
        """Stop all ranks if too many trajectories failed; the error names this rank's first failure."""
        failed = failed_fractions(metrics)
        if sum(failed.values()) <= self.max_failed_frac:
            return
        errors = [t.error for group in groups for t in group.trajectories if t.end_state in FAILURES]
        raise CVLightningError(
            f"{sum(failed.values()):.0%} of the trajectories failed, more than max_failed_frac "
            f"{self.max_failed_frac:.0%}: {', '.join(f'{name} {value:.2f}' for name, value in failed.items())}; "
            f"{errors[0] if errors else 'none on this rank'}"
        )

    def _collect(
        self, trainer: pl.Trainer, module: PolicyModule, batch: Iteration, show: ShowProgress
    ) -> tuple[list[Group], dict[str, float]]:
        """Put the groups to train on on the batch; returns all groups and the metrics of dynamic sampling."""
        if not isinstance(module, GRPOModule):
            raise TypeError(f"RolloutCallback trains a GRPOModule, not {type(module).__name__}; change --model")
        collector = self.collector(trainer, module, self.agent, training=True)

        def roll_out(tasks: Sequence[Task]) -> list[Group]:
            return collector.roll_out(tasks, self.num_samples, self.sampling, module.iteration + 1, show)

        if batch.num_groups is None:
            batch.groups = roll_out(batch.tasks)
            module.set_advantages(batch.groups)
            return batch.groups, {}
        limit = len(batch.tasks)
        self.queue.add(batch, trainer)
        found = partial(has_reward_variance, mask=module.algorithm.mask)
        groups, rounds = sample_groups(self.queue, batch.num_groups, roll_out, found, module.reduce_max)
        module.set_advantages(groups)
        batch.groups = [group for group in groups if found(group)]
        dropped = self.queue.close_iteration(limit)
        return groups, {
            "rollout/sampling_rounds": float(rounds),
            "rollout/groups_found_frac": len(batch.groups) / batch.num_groups,
            "rollout/tasks_waiting": float(len(self.queue.waiting)),
            "rollout/tasks_dropped": float(dropped),
        }

    def sync(self, module: PolicyModule, version: int, spoiled: Collection[str] | None = None) -> None:
        """Give the policy's weights to the engine, if it samples from them; a collective under ZeRO-3.

        With `spoiled` the engine gets changed weights, of vision only these: see `with_other_weights`.
        """
        if self.engine_config.keeps_own_weights:
            return
        _, engine = self._parts_and_engine(module)
        assert module.policy is not None
        if engine_kind(self.engine_config) == "transformers":  # it generates with the policy itself
            return engine.update_weights(module.policy.named_parameters(), version)
        tensors = gather_full_params(module.policy, int(self.engine_config.sync_bucket_gb * 1e9))
        if spoiled is not None:
            tensors = with_other_weights(tensors, spoiled, module.adapter)
        tensors = module.adapter.engine_weights(tensors)
        with Watchdog.at(module.trainer, "weight sync", waits=True):
            engine.update_weights(tensors, version)

    # ------------------------------------------------------------------ evaluation
    def on_test_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Give the engine the weights under test."""
        if self.parts is not None:
            module = _policy_module(pl_module)
            self.evaluator.start(trainer, module)
            self.sync(module, version=module.iteration)

    def on_test_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Run every evaluation setting over the batch's tasks."""
        if self.parts is None:
            return
        module = _policy_module(pl_module)

        def collector_of(setting: EvaluationConfig) -> Collector:
            return self.collector(trainer, module, replace(self.agent, tool=setting.tool, early_stop_fraction=1.0))

        self.evaluator.run(trainer, module, batch, collector_of, partial(RunProgress.rollout_of, trainer))

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Summarise, log and write `metrics.json` per setting."""
        if self.parts is None:
            return
        module = _policy_module(pl_module)
        self.evaluator.finish(trainer, module)
        module.vision_cache.clear()  # else its images count in the next iteration, and stay during the update
        parts, engine = self._parts_and_engine(module)
        engine.sleep()
        if trainer.state.fn is not TrainerFn.FITTING:  # the results are written and name what is unjudged
            parts.rewards.check_verdicts(gather_lists(parts.rewards.verdicts))

    on_validation_epoch_start = on_test_epoch_start
    on_validation_batch_start = on_test_batch_start
    on_validation_epoch_end = on_test_epoch_end

    # ------------------------------------------------------------------ parts
    def _parts_and_engine(self, module: PolicyModule) -> tuple[_Parts, Engine]:
        """The parts and the engine, which is built on first use."""
        assert self.parts is not None, "setup has not run"
        if self.parts.engine is None:
            self.parts.engine = self._build_engine(module)
        return self.parts, self.parts.engine

    def _build_engine(self, module: PolicyModule) -> Engine:
        config, model = module.policy_config, module.policy
        options: dict[str, Any] = {"dtype": config.dtype, "seed": self.sampling.seed, "adapter": module.adapter}
        return build_engine(self.engine_config, config.path, model=model, images=module.vision_cache, **options)

    def collector(
        self, trainer: pl.Trainer, module: PolicyModule, agent: AgentConfig, training: bool = False
    ) -> Collector:
        """A collector that rolls tasks out with this agent on this rank."""
        parts, engine = self._parts_and_engine(module)
        encoder = module.encoder.speaking(agent.dialect)
        encoder.dialect.check_tools(agent.offered)
        rollout = Rollout(
            engine=engine,
            sandbox=parts.sandbox,
            encoder=encoder,
            background=parts.background,
            config=agent,
            banned_ids=encoder.banned_ids(agent.tool),
            score=parts.rewards.score_answer,
            window=2 * self.engine_config.max_num_seqs,
            new_samples=training,
        )
        signals = StopOnSignal.of(trainer)
        return Collector(
            rollout,
            parts.rewards,
            ranks=parts.ranks,
            watch=lambda name: Watchdog.at(trainer, name, waits=False),
            check_stop=signals.check if signals is not None else None,
        )


def failed_fractions(metrics: Mapping[str, float]) -> dict[str, float]:
    """Fractions of an iteration's trajectories that engine, sandbox or judge failed, by metric; zeros are left out.

    `rollout/unscored_frac` are those without an answer that the judge left unscored, which keep their end state.
    """
    failed = {name: metrics.get(name, 0.0) for name in sorted(map(end_state_metric, FAILURES))}
    errors = sum(metrics.get(end_state_metric(state), 0.0) for state in EndState if state.is_error)
    failed["rollout/unscored_frac"] = round(metrics.get("rollout/unscored_frac", 0.0) - errors, 9)
    return {name: value for name, value in failed.items() if value > 0}


def rolls_out(module: pl.LightningModule, data: object, stage: str) -> bool:
    """True if a run of a stage (`fit`, `validate`, `test`) trains on rollouts or evaluates by them."""
    if not isinstance(module, PolicyModule):
        return False
    validates = isinstance(data, EvaluationDataModule) and data.has_tasks("validate")
    return stage != "fit" or module.trains_on_rollouts or validates


def _repeatable(engine: EngineConfig, agent: AgentConfig) -> EngineConfig:
    """The engine's config; a deterministic run has no rendering thread, whose speed changes the batches.

    Raises:
        ValueError: The config asks for both.
    """
    if not agent.deterministic:
        return engine
    if engine.background_rendering == "always":
        raise ValueError(
            "agent.deterministic true and engine.background_rendering always contradict each other: the speed of the "
            "rendering thread would decide which requests share a batch. Set engine.background_rendering to auto"
        )
    return replace(engine, background_rendering="never")


def _policy_module(module: pl.LightningModule) -> PolicyModule:
    if not isinstance(module, PolicyModule):
        raise TypeError(f"RolloutCallback works with a PolicyModule, not with {type(module).__name__}; change --model")
    return module


def warn_of_judge(config: JudgeConfig) -> None:
    """Warn about a judge that does not answer at the start of the run; it may still be loading."""
    found = check_endpoint(config)
    if not found.ok:
        logger.warning("reward.judge: %s. Answers that it does not judge stay unscored", found.message)
