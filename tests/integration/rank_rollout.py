"""Run by `test_sync.py`: two RL iterations and a validation, with everything real, on some ranks.

    rank_rollout.py CHECKPOINT FOLDER RANKS TENSOR_PARALLEL

Each rank writes what it saw to `FOLDER/rank<r>.json`. Ranks are as unequal as they can be: rank 0 has turns of more
tokens, in the validation it calls the tool and rank 1 has no task at all.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import lightning.pytorch as pl
from forked import fork_ranks, wait

from cv_lightning.agent.config import AgentConfig
from cv_lightning.agent.prompt import PromptConfig
from cv_lightning.callbacks.rollout import EvaluationConfig, RolloutCallback
from cv_lightning.callbacks.watchdog import Watchdog
from cv_lightning.digits.modules import DigitTaskDataModule
from cv_lightning.engines import Completion, Engine, EngineConfig
from cv_lightning.environment import prepare_environment
from cv_lightning.models.loading import PolicyConfig
from cv_lightning.modules.base import OptimizerConfig
from cv_lightning.modules.grpo import GRPOModule
from cv_lightning.rewards import RewardModule
from cv_lightning.strategies import CPUDeepSpeedStrategy
from cv_lightning.types import Group, Iteration, RewardBreakdown, Trajectory

CALL = '<tool_call>\n{"name": "code_image_tool", "arguments": {"code": "result = image.rotate(90)"}}\n</tool_call>'
AGENT = AgentConfig(max_turns=3, max_turn_tokens=12, max_images=3, prompt=PromptConfig(system="none"))


class CallingFirst:
    """A real engine whose first turns end with a tool call, independent of the policy."""

    def __init__(self, engine: Engine, call_ids: tuple[int, ...]) -> None:
        self.engine, self.call_ids = engine, call_ids

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)

    def step(self) -> list[Completion]:
        """One step."""
        return [self._with_call(done) for done in self.engine.step()]

    def _with_call(self, done: Completion) -> Completion:
        assert done.prompt_ids is not None
        if self.call_ids[-2] in done.prompt_ids:
            return done
        ids = list(self.call_ids)
        return replace(done, token_ids=ids, logprobs=[-1.0] * len(ids), stopped=True)


class Watching(pl.Callback):
    """Keeps the rolled out groups, and makes rank 0's engine call the tool in validations."""

    def __init__(self, rollout: RolloutCallback) -> None:
        self.rollout = rollout
        self.seen: list[dict[str, Any]] = []

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: object, batch: Iteration, batch_idx: int
    ) -> None:
        """Keep the iteration."""
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        groups = [[_summary(t) for t in group.trajectories] for group in batch.groups]
        self.seen.append({"metrics": metrics, "groups": groups})

    def on_validation_epoch_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Make rank 0 call the tool."""
        assert isinstance(module, GRPOModule) and self.rollout.parts is not None
        if trainer.global_rank == 0:
            ids = module.encoder.assistant_ids(CALL)
            self.rollout.parts.engine = CallingFirst(self.rollout.parts.engine, tuple(ids))


def _summary(trajectory: Trajectory) -> dict[str, Any]:
    return {
        "task": trajectory.task.id,
        "tokens": trajectory.token_ids,
        "version": trajectory.policy_version,
        "advantage": trajectory.advantage,
    }


def score(self: RewardModule, group: Group) -> None:
    """A reward that differs within every group, unlike that of a random policy."""
    for trajectory in group.trajectories:
        trajectory.reward = RewardBreakdown(components={}, total=float(trajectory.sample))


def run(checkpoint: Path, folder: Path, ranks: int, tensor_parallel: int, rank: int) -> None:
    """Train, validate and write the results of one rank."""
    RewardModule.score_group = score  # type: ignore[method-assign]
    agent = AGENT if rank or ranks == 1 or tensor_parallel > 1 else replace(AGENT, max_turn_tokens=40)
    sizes = EngineConfig(
        kind="vllm", max_model_len=256, max_num_seqs=16, max_images=3, tensor_parallel_size=tensor_parallel
    )
    evaluations = [EvaluationConfig(name="greedy", num_samples=2)]
    rollout = RolloutCallback(agent=agent, engine=sizes, num_samples=3, evaluations=evaluations)
    watching = Watching(rollout)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=ranks,
        strategy=CPUDeepSpeedStrategy(stage=3) if ranks > 1 else "auto",
        max_epochs=1,
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        callbacks=[Watchdog(), watching, rollout],
    )
    module = GRPOModule(
        PolicyConfig(path=str(checkpoint), dtype="float32"),
        OptimizerConfig(lr=1e-3),
    )
    data = DigitTaskDataModule(num_iterations=2, tasks_per_iteration=4, val_tasks={"upright": 1})
    trainer.fit(module, datamodule=data)
    (folder / f"rank{rank}.json").write_text(json.dumps(watching.seen))


def main(checkpoint: Path, folder: Path, ranks: int, tensor_parallel: int) -> int:
    """Run every rank; 0 if all ended well."""
    prepare_environment()
    importlib.import_module("deepspeed")
    importlib.import_module("cv_lightning.engines.vllm")
    processes = fork_ranks(
        ranks, partial(run, checkpoint, folder, ranks, tensor_parallel), lambda rank: folder / f"rank{rank}.txt"
    )
    return max(code != 0 for code, _ in map(wait, processes))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])))
