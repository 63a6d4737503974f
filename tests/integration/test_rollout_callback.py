"""RL iterations with everything real but the reward: engine, agent, sandbox, packing, optimizer, store."""

from __future__ import annotations

import json
from pathlib import Path

import lightning.pytorch as pl
import psutil
import pytest
import torch

from cv_lightning.agent.config import AgentConfig
from cv_lightning.agent.prompt import PromptConfig
from cv_lightning.callbacks.rollout import RolloutCallback
from cv_lightning.digits.modules import DigitTaskDataModule
from cv_lightning.engines import EngineConfig, Request
from cv_lightning.engines.hf import TransformersEngine
from cv_lightning.models.loading import PolicyConfig
from cv_lightning.modules.base import OptimizerConfig
from cv_lightning.modules.grpo import GRPOModule
from cv_lightning.rewards import RewardModule
from cv_lightning.rl.algorithm import AlgorithmConfig, DynamicSamplingConfig
from cv_lightning.rl.groups import MaskConfig
from cv_lightning.rl.kl import KLConfig
from cv_lightning.types import CVLightningError, EngineError, Group, Iteration, RewardBreakdown, SandboxError

AGENT = AgentConfig(max_turns=2, max_turn_tokens=12, max_images=2, prompt=PromptConfig(system="none", state_size=False))
ENGINE = EngineConfig(kind="transformers", max_model_len=512, max_num_seqs=16, max_images=2)
KL_IN_REWARD = KLConfig(weight=0.1, estimator="k1", place="reward")


class Batches(pl.Callback):
    """Keeps what was trained on."""

    def __init__(self) -> None:
        self.seen: list[Iteration] = []
        self.metrics: list[dict[str, float]] = []

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: object, outputs: object, batch: Iteration, batch_idx: int
    ) -> None:
        self.seen.append(batch)
        self.metrics.append({name: float(value) for name, value in trainer.callback_metrics.items()})


@pytest.fixture
def odd_tasks_teach(monkeypatch: pytest.MonkeyPatch) -> None:
    """A random policy earns nothing; here every second task's rewards differ."""

    def score(self: RewardModule, group: Group) -> None:
        number = group.task.id.rsplit("-", 1)[-1]  # the start-up check makes tasks of its own
        odd = number.isdigit() and int(number) % 2
        for t in group.trajectories:
            t.reward = RewardBreakdown(components={}, total=float(t.sample * odd))

    monkeypatch.setattr(RewardModule, "score_group", score)


def run(
    checkpoint: Path, folder: Path, algorithm: AlgorithmConfig, data: DigitTaskDataModule, **rollout: object
) -> Batches:
    optimizer = OptimizerConfig(lr=1e-3, weight_decay=0.0)
    module = GRPOModule(PolicyConfig(path=str(checkpoint), dtype="float32"), optimizer, algorithm=algorithm)
    batches = Batches()
    callback = RolloutCallback(agent=AGENT, engine=ENGINE, num_samples=2, **rollout)  # type: ignore[arg-type]
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=1,
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[batches, callback],
    )
    trainer.fit(module, datamodule=data)
    return batches


def test_dynamic_sampling_rolls_out_more_and_keeps_the_rest(
    tiny_checkpoint: Path, tmp_path: Path, odd_tasks_teach: None
) -> None:
    data = DigitTaskDataModule(tasks_per_iteration=2, num_iterations=2)
    algorithm = AlgorithmConfig(kl=KL_IN_REWARD, dynamic_sampling=DynamicSamplingConfig(max_oversample=3.0))
    batches = run(tiny_checkpoint, tmp_path, algorithm, data)
    numbers = [[int(g.task.id.rsplit("-", 1)[-1]) for g in batch.groups] for batch in batches.seen]
    assert numbers == [[1, 3], [5, 7]], "only groups that teach, in the order of the tasks over both iterations"
    first, second = batches.metrics
    assert first["rollout/sampling_rounds"] == 3 and first["rollout/tasks_waiting"] == 2
    assert second["rollout/groups_found_frac"] == 1.0 and second["rollout/trajectories"] == 8
    stored = [json.loads(line) for path in (tmp_path / "trajectories").glob("*.jsonl") for line in path.open()]
    assert len(stored) == 8, "what did not teach is on record, too"
    for batch in batches.seen:
        for group in batch.groups:
            low, high = (t.advantage for t in group.trajectories)
            assert low is not None and high is not None and low < 0 < high
    assert abs(first["policy/kl_penalty"]) < 1e-3 < abs(second["policy/kl_penalty"]), "the policy has moved since"
    assert first["policy/trajectories"] == 4 and "policy/kl_to_reference" not in first


def test_images_of_a_validation_do_not_stay_for_the_next_iteration(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They would take memory during the update, and count in `policy/image_passes`."""
    left = []
    monkeypatch.setattr(
        Batches, "on_validation_end", lambda _, trainer, module: left.append(module.vision_cache.num_images)
    )
    data = DigitTaskDataModule(tasks_per_iteration=2, num_iterations=1, val_tasks={"upright": 1})
    run(tiny_checkpoint, tmp_path, AlgorithmConfig(), data)
    assert set(left) == {0}


def test_masked_end_states_have_no_loss(tiny_checkpoint: Path, tmp_path: Path, odd_tasks_teach: None) -> None:
    data = DigitTaskDataModule(tasks_per_iteration=2, num_iterations=1)
    batches = run(tiny_checkpoint, tmp_path, AlgorithmConfig(mask=MaskConfig(over_length=True, broken=True)), data)
    (metrics,) = batches.metrics
    assert metrics["rollout/masked_frac"] > 0.5, "a random policy answers nothing"
    left = [t for g in batches.seen[0].groups for t in g.trajectories if t.advantage is not None]
    assert len(left) == 4 - round(4 * metrics["rollout/masked_frac"])
    assert metrics["policy/trajectories"] == sum(bool(t.advantage) for t in left)


# ------------------------------------------------------------------------------------------------ failures
ONE = DigitTaskDataModule(tasks_per_iteration=2, num_iterations=1)


def children() -> set[int]:
    return {child.pid for child in psutil.Process().children(recursive=True)}


@pytest.mark.parametrize("error", [EngineError("the engine died"), torch.OutOfMemoryError("no memory left")])
def test_a_failing_engine_ends_the_run_and_its_processes(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def step(self: TransformersEngine) -> None:
        raise error

    monkeypatch.setattr(TransformersEngine, "step", step)
    before = children()
    with pytest.raises(type(error), match=str(error)):
        run(tiny_checkpoint, tmp_path, AlgorithmConfig(), ONE)
    assert children() <= before


def test_too_many_failed_trajectories_end_the_run(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def add_request(self: TransformersEngine, request: Request) -> None:
        if "/1/" in request.id:  # every second trajectory
            raise EngineError("refused")
        self.queue.append(request)

    monkeypatch.setattr(TransformersEngine, "add_request", add_request)
    with pytest.raises(
        CVLightningError, match=r"50% .* max_failed_frac 25%: rollout/end_error_engine_frac 0\.50; refused"
    ):
        run(tiny_checkpoint, tmp_path, AlgorithmConfig(), ONE, mismatch_tolerance=0.0)
    run(tiny_checkpoint, tmp_path, AlgorithmConfig(), ONE, mismatch_tolerance=0.0, max_failed_frac=0.5)


def test_a_full_disk_ends_the_run_with_its_path(tiny_checkpoint: Path, tmp_path: Path) -> None:
    lines = tmp_path / "trajectories" / "groups.rank0.jsonl"
    lines.parent.mkdir()
    lines.symlink_to("/dev/full")
    with pytest.raises(CVLightningError, match=rf"{tmp_path}: No space left on device.*store\.max_gb"):
        run(tiny_checkpoint, tmp_path, AlgorithmConfig(), ONE, mismatch_tolerance=0.0)


def test_a_sandbox_that_cannot_start_ends_the_run_before_it_begins(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = children()
    monkeypatch.setattr("sys.executable", "/bin/false")  # its fork servers end at once
    with pytest.raises(SandboxError):
        run(tiny_checkpoint, tmp_path, AlgorithmConfig(), ONE)
    assert children() <= before
