"""DataModules under a real Trainer: exact resume, batches passed through unchanged, ranks, invalid configs."""

from __future__ import annotations

import json
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image

from cv_lightning.data.corruptions import CorruptionConfig
from cv_lightning.data.modules import DemonstrationBatch, SFTDataModule, StepLoader, TaskDataModule
from cv_lightning.data.rows import ReaderConfig
from cv_lightning.digits.demonstrations import DemonstrationConfig
from cv_lightning.digits.export import write_digits_parquet, write_digits_sft_json
from cv_lightning.digits.modules import CurriculumPoint, DigitSFTDataModule, DigitTaskDataModule
from cv_lightning.digits.scenes import DigitsConfig
from cv_lightning.digits.sources import DigitDemonstrations
from cv_lightning.modules.base import OptimizerConfig, PolicyModule
from cv_lightning.sandbox import Sandbox
from cv_lightning.types import CVLightningError, Group, Iteration


class Recorder(pl.LightningModule):
    """Records the ids of its batches; its steps change nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.automatic_optimization = False
        self.seen: list[list[str]] = []

    def training_step(self, batch: Any, batch_idx: int) -> None:
        if isinstance(batch, Iteration):
            self.seen.append([task.id for task in batch.tasks])
            assert batch.groups, "the groups that the callback added are missing"
        else:
            self.seen.append([conversation.task.id for conversation in batch.conversations])
        self.optimizers().step()

    def validation_step(self, batch: Iteration, batch_idx: int) -> None:
        self.seen.append([task.id for task in batch.tasks])

    def test_step(self, batch: Iteration, batch_idx: int) -> None:
        self.seen.append([task.id for task in batch.tasks])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


class HangGroups(pl.Callback):
    """Adds groups to a batch, like a rollout."""

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        if isinstance(batch, Iteration):
            batch.groups = [Group(task=task, trajectories=[]) for task in batch.tasks]


def trainer(folder: Path, *callbacks: pl.Callback) -> pl.Trainer:
    return pl.Trainer(
        accelerator="cpu",
        default_root_dir=folder,
        callbacks=[HangGroups(), *callbacks],
        max_epochs=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
    )


def fit(folder: Path, data: pl.LightningDataModule, resume: Path | None = None) -> list[list[str]]:
    """Ids of the batches of a run, which writes a checkpoint into `folder` after every step."""
    module = Recorder()
    keep_all = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    trainer(folder, keep_all).fit(module, data, ckpt_path=resume, weights_only=False)
    return module.seen


def task_data(**changes: Any) -> DigitTaskDataModule:
    return DigitTaskDataModule(**{"num_iterations": 6, "tasks_per_iteration": 8, **changes})


def test_overfitting_repeats_the_same_tasks() -> None:
    usual, data = task_data(), task_data(overfit_tasks=2)
    first = [[task.id for task in usual.train_dataloader().build(step).tasks] for step in range(2)]
    again = [[task.id for task in data.train_dataloader().build(step).tasks] for step in range(4)]
    assert again == [again[0]] * 4 and len(again[0]) == 2
    assert set(first[0]).isdisjoint(first[1])
    curriculum = [CurriculumPoint(at=0, kind_shares={"small": 1.0})]
    for changes in ({"overfit_tasks": -1}, {"overfit_tasks": 2, "curriculum": curriculum}):
        with pytest.raises(ValueError, match=r"--data\.init_args\.overfit_tasks"):
            task_data(**changes)


def sft_data(**changes: Any) -> DigitSFTDataModule:
    sizes = {"num_steps": 6, "conversations_per_step": 4, "warm_up_conversations_per_step": 6, "warm_up_share": 0.34}
    return DigitSFTDataModule(**{**sizes, **changes})


@pytest.mark.parametrize("make", [task_data, sft_data])
def test_a_resumed_run_gets_the_batches_of_an_uninterrupted_one(tmp_path: Path, make: Any) -> None:
    whole = fit(tmp_path / "whole", make())
    assert len(whole) == 6
    assert fit(tmp_path / "rest", make(), tmp_path / "whole" / "step=2.ckpt") == whole[2:]
    assert fit(tmp_path / "last", make(), tmp_path / "rest" / "step=5.ckpt") == whole[5:]


def test_resume_within_an_epoch_of_a_file(tmp_path: Path) -> None:
    write_digits_parquet(tmp_path / "digits.parquet", DigitsConfig(), "train", 10)
    files = {"train_files": [str(tmp_path / "digits.parquet")], "tasks_per_iteration": 4, "seed": 3}
    whole = fit(tmp_path / "whole", task_data(**files))
    assert fit(tmp_path / "rest", task_data(**files), tmp_path / "whole" / "step=3.ckpt") == whole[3:]
    first_epoch = [name for step in whole for name in step][:10]
    assert sorted(first_epoch) == sorted(f"digits:{at}" for at in range(10))


def test_an_iteration_balances_kinds() -> None:
    data = task_data()
    batch = next(iter(data.train_dataloader()))
    assert isinstance(batch, Iteration)
    assert sorted(Counter(task.metadata["kind"] for task in batch.tasks).values()) == [2, 2, 2, 2]


def test_sft_begins_with_a_warm_up_and_runs_its_calls() -> None:
    data = sft_data(demonstrations=DemonstrationConfig(tool_share=1.0), conversations_per_step=8)
    batches = list(data.train_dataloader())
    data.teardown("fit")
    assert all(isinstance(batch, DemonstrationBatch) for batch in batches)
    assert [len(batch.conversations) for batch in batches] == [6, 6, 8, 8, 8, 8]
    assert all(len(c.turns) == 1 for batch in batches[:2] for c in batch.conversations)
    turns = [turn for batch in batches[2:] for c in batch.conversations for turn in c.turns]
    shown = [turn.result_image for turn in turns if turn.call is not None]
    assert len(shown) > 20
    assert all(image is not None for image in shown)


def test_sft_from_a_file(tmp_path: Path) -> None:
    with Sandbox() as sandbox:
        source = DigitDemonstrations(DigitsConfig(), DemonstrationConfig(), sandbox.run_sync)
        write_digits_sft_json(tmp_path / "sft.json", source, 5)
    data = sft_data(train_files=[str(tmp_path / "sft.json")], reader=ReaderConfig(prompt="own"))
    seen = [c.task.id for batch in data.train_dataloader() for c in batch.conversations]
    assert Counter(seen).keys() == {f"sft:{at}" for at in range(5)}


def test_evaluations_have_the_configured_tasks_in_batches(tmp_path: Path) -> None:
    module = Recorder()
    data = task_data(val_tasks={"turned": 3}, test_tasks={"upright": 5, "small": 2}, tasks_per_eval_batch=4)
    trainer(tmp_path).validate(module, data, verbose=False)
    trainer(tmp_path).test(module, data, verbose=False)
    assert [len(batch) for batch in module.seen] == [3, 4, 3]
    assert sum("small" in name for batch in module.seen for name in batch) == 2
    assert all("held_out" in name for batch in module.seen for name in batch)


@pytest.mark.parametrize("loader", ["train_dataloader", "test_dataloader"])
def test_ranks_share_every_batch_without_gap_or_overlap(loader: str) -> None:
    def batches(rank: int, world_size: int) -> list[list[str]]:
        data = task_data(test_tasks={"upright": 5, "small": 4}, tasks_per_eval_batch=4)
        data.trainer = SimpleNamespace(global_rank=rank, world_size=world_size, lightning_module=None)
        return [[task.id for task in batch.tasks] for batch in getattr(data, loader)()]

    whole, ranks = batches(0, 1), [batches(rank, 2) for rank in range(2)]
    assert [sorted(a + b) for a, b in zip(*ranks, strict=True)] == [sorted(batch) for batch in whole]


def test_tasks_that_ranks_cannot_divide_name_the_flag() -> None:
    data = task_data(tasks_per_iteration=5)
    data.trainer = SimpleNamespace(global_rank=0, world_size=2)
    with pytest.raises(CVLightningError, match=r"--data\.init_args\.tasks_per_iteration 5"):
        data.train_dataloader()


def test_without_tasks_there_is_no_validation_and_a_test_names_the_key() -> None:
    assert task_data().val_dataloader() == []
    with pytest.raises(CVLightningError, match="test_tasks"):
        task_data(test_tasks={"upright": 0}).test_dataloader()


@pytest.mark.parametrize("kind", [TaskDataModule, SFTDataModule])
def test_without_files_the_data_module_of_the_digits_is_named(kind: Any) -> None:
    with pytest.raises(CVLightningError, match=rf"train_files.*cv_lightning\.digits\.modules\.Digit{kind.__name__}"):
        kind().train_dataloader()


@pytest.mark.parametrize("tools", [None, ["hammer"], {"saw": 1}, 3])
def test_conversations_are_read_for_a_module_whose_tools_are_something_else(tmp_path: Path, tools: Any) -> None:
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    turns = [{"from": "human", "value": "<image>Which?"}, {"from": "gpt", "value": "<answer>3</answer>"}]
    (tmp_path / "sft.json").write_text(json.dumps([{"conversations": turns, "images": ["a.png"]}]))
    data = SFTDataModule([str(tmp_path / "sft.json")])
    trainer: Any = SimpleNamespace(lightning_module=SimpleNamespace(tools=tools))
    data.trainer = trainer
    assert data.training_conversations().batch(0, 1)


def test_a_loader_restarts_after_its_end() -> None:
    loader = StepLoader(lambda step: step, 3)
    assert list(loader) == list(loader) == [0, 1, 2]
    loader.load_state_dict({"next": 3})
    assert list(loader) == [0, 1, 2]
    loader.load_state_dict({"next": 1})
    assert list(loader) == [1, 2]
    assert list(loader) == [0, 1, 2]


@pytest.mark.parametrize(
    ("make", "arguments", "flag"),
    [
        (task_data, {"num_iterations": 0}, "--data.init_args.num_iterations"),
        (task_data, {"val_tasks": {"tilted": 2}}, "val_tasks"),
        (task_data, {"tasks_per_eval_batch": -1}, "--data.init_args.tasks_per_eval_batch"),
        (sft_data, {"warm_up_share": 2.0}, "--data.init_args.warm_up_share"),
        (sft_data, {"num_steps": 0}, "--data.init_args.num_steps"),
    ],
)
def test_invalid_arguments_name_their_flag(make: Any, arguments: dict[str, Any], flag: str) -> None:
    with pytest.raises(ValueError, match=flag):
        make(**arguments)


@pytest.mark.parametrize(("mode", "rows"), [("grid", 8), ("one", 2)])
def test_evaluation_tasks_turned_and_corrupted_on_the_fly(mode: Literal["grid", "one"], rows: int) -> None:
    config = CorruptionConfig(
        orientations=("identity", "rotate_90"), corruptions=("none", "gaussian_noise"), severities=(3,), mode=mode
    )
    data = task_data(test_tasks={"upright": 2}, tasks_per_eval_batch=3, corruptions=config)
    batches = list(data.test_dataloader())
    tasks = [task for batch in batches for task in batch.tasks]
    assert [len(batch.tasks) for batch in batches] == [3] * (rows // 3) + [rows % 3]
    assert len({task.id for task in tasks}) == rows
    clean = task_data(test_tasks={"upright": 2}).test_dataloader().build(0).tasks
    for task in tasks:
        base = next(c for c in clean if task.id.startswith(c.id))
        turned = "rotate_90" in task.required_transforms
        shown = base.images[0].transpose(Image.Transpose.ROTATE_90) if turned else base.images[0]
        assert (task.images[0].tobytes() == shown.tobytes()) != ("noise" in task.id)


def test_without_files_a_users_subclass_is_told_a_class_that_exists() -> None:
    class Own(TaskDataModule):
        """A user's."""

    with pytest.raises(CVLightningError, match=r"train_files.*cv_lightning\.digits\.modules\.DigitTaskDataModule$"):
        Own().check_training(1)


@pytest.mark.parametrize(("epochs", "steps"), [(2, 12), (None, 6), (-1, 0)])
def test_a_run_without_a_last_epoch_has_no_planned_steps(epochs: int | None, steps: int) -> None:
    run = SimpleNamespace(max_steps=-1, max_epochs=epochs, datamodule=SimpleNamespace(num_train_batches=3))
    module: Any = SimpleNamespace(trainer=run, steps_per_batch=2, optimizer_config=OptimizerConfig(schedule="constant"))
    assert PolicyModule._planned_steps(module) == steps
    module.optimizer_config = OptimizerConfig(schedule="cosine")
    with nullcontext() if steps else pytest.raises(ValueError, match=r"model\.optimizer\.total_steps"):
        assert PolicyModule._planned_steps(module) == steps
