"""LightningDataModules over files: tasks for RL and evaluation, conversations for SFT.

A batch is a pure function of its number, so a loader's whole state is that number. Batches are objects of plain
classes, which Lightning passes through unchanged, from sized loaders, which it does not prefetch from. The ranks divide
each batch here: Lightning adds no `DistributedSampler` to a loader that is not a `DataLoader`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict
from typing import Any, ClassVar, Generic, Literal, TypeVar

import lightning.pytorch as pl

from cv_lightning.data.benchmarks import task_files
from cv_lightning.data.conversations import Conversation
from cv_lightning.data.corruptions import CorruptedRows, CorruptionConfig
from cv_lightning.data.probe import ProbeConfig, ProbeRows
from cv_lightning.data.rows import ReaderConfig, RowError, RowProblems
from cv_lightning.data.sft_json import ConversationFiles
from cv_lightning.data.sources import Rows, RowStream, Source, slice_of_rank
from cv_lightning.ranges import NonNegativeInt, PositiveInt, check_ranges
from cv_lightning.rl.algorithm import AlgorithmConfig
from cv_lightning.tools.base import Tool
from cv_lightning.types import CVLightningError, Iteration, Task

Batch = TypeVar("Batch")
Stage = Literal["validate", "test"]
KEY = "data.init_args"
"""Place of a DataModule's arguments in a config, for messages."""
DIGITS = "cv_lightning.digits.modules"
"""Where the DataModules with the embedded digits are, for messages."""


class DemonstrationBatch:
    """One Lightning batch of SFT: the conversations of one optimizer step on this rank.

    This is not a dataclass, because Lightning copies dataclasses field by field.

    Args:
        index: Number of the step, from 0.
        conversations: This rank's conversations.
    """

    def __init__(self, index: int, conversations: list[Conversation]) -> None:
        self.index = index
        self.conversations = conversations


class StepLoader(Generic[Batch]):
    """A sized loader whose n-th batch is `build(n)`; a checkpoint keeps the number of the next one.

    Args:
        build: Builds the batch of a step; equal numbers give equal batches.
        num_steps: Batches in an epoch.
    """

    def __init__(self, build: Callable[[int], Batch], num_steps: int) -> None:
        self.build = build
        self.num_steps = num_steps
        self._next = 0
        self._resumed = False

    def __len__(self) -> int:
        return self.num_steps

    def __iter__(self) -> Iterator[Batch]:
        if not self._resumed:
            self._next = 0
        self._resumed = False
        while self._next < self.num_steps:
            self._next += 1
            yield self.build(self._next - 1)

    def state_dict(self) -> dict[str, int]:
        """The number of the next batch."""
        return {"next": self._next}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue with the batch that the state names; after the last one, from the start."""
        self._next = state["next"]
        self._resumed = self._next < self.num_steps


class EvaluationDataModule(pl.LightningDataModule):
    """Held-out tasks of files for `validate` and `test`.

    Args:
        reader: How the files are read.
        eval_files: Files of questions, in the format that `reader` names.
        tasks_per_eval_batch: Tasks of all ranks that are in memory and rolled out together; 0: all.
        corruptions: Turn and corrupt the images of `validate` and `test`, one row for each combination.
        probe: Replace the questions of `validate` and `test` by the orientation of their images.
    """

    needs_files: ClassVar[bool] = True
    """Training needs `train_files`; a subclass may have tasks of its own."""

    def __init__(
        self,
        reader: ReaderConfig | None = None,
        eval_files: list[str] | None = None,
        tasks_per_eval_batch: NonNegativeInt = 1024,
        corruptions: CorruptionConfig | None = None,
        probe: ProbeConfig | None = None,
    ) -> None:
        super().__init__()
        check_ranges(EvaluationDataModule.__init__, KEY, locals())
        if corruptions is not None and probe is not None:
            raise ValueError("--data.probe turns the images already: it does not combine with --data.corruptions")
        self.reader = reader or ReaderConfig()
        self.eval_files = eval_files or []
        self.tasks_per_eval_batch = tasks_per_eval_batch
        self.corruptions = corruptions
        self.probe = probe
        self.train_files: list[str] = []
        self.skipped: RowProblems | None = None
        """Unusable rows of `eval_files` so far; None before there is a loader, and where no files are read."""
        self.num_train_batches = 0

    def has_tasks(self, stage: Stage) -> bool:
        """True if there are tasks to validate or test on."""
        return bool(self.eval_files)

    def evaluation_tasks(self, stage: Stage) -> Rows[Task]:
        """The tasks of a stage before they are corrupted or probed."""
        files = task_files(self.eval_files, self.reader)
        self.skipped = files.problems
        return files

    def describe_questions(self) -> dict[str, Any]:
        """JSON values that identify the questions of a test; a change in them restarts an interrupted evaluation.

        Files are named by path: what changed in a file is detected by question.
        """
        settings = {name: getattr(self, name) for name in ("reader", "corruptions", "probe")}
        described = {name: asdict(value) if value is not None else None for name, value in settings.items()}
        return described | ({"files": [str(path) for path in self.eval_files]} if self.eval_files else {})

    def val_dataloader(self) -> StepLoader[Iteration] | list[object]:
        """Tasks of a validation; an empty list, which skips it, if there are none."""
        return self._evaluation_loader("validate") if self.has_tasks("validate") else []

    def test_dataloader(self) -> StepLoader[Iteration]:
        """Tasks of a test."""
        return self._evaluation_loader("test")

    def _evaluation_loader(self, stage: Stage) -> StepLoader[Iteration]:
        if not self.has_tasks(stage):
            raise CVLightningError(f"{stage}: {missing_tasks(stage)}")
        rank, world_size = self._rank_and_world()
        rows = self.evaluation_tasks(stage)
        if self.probe is not None:
            rows = ProbeRows(rows, self.probe)
        if self.corruptions is not None:
            rows = CorruptedRows(rows, self.corruptions)
        size = len(rows)
        batch_size = self.tasks_per_eval_batch or size

        def build(step: int) -> Iteration:
            tasks = []
            for position in slice_of_rank(
                range(step * batch_size, min(size, (step + 1) * batch_size)), rank, world_size
            ):
                with suppress(RowError):  # an image that cannot be decoded; `skipped` has counted it
                    tasks.append(rows.row(position))
            return Iteration(step, tasks)

        return StepLoader(build, math.ceil(size / batch_size))

    def batch_sizes(self) -> dict[str, int]:
        """Sizes of the training batches over all ranks, by the argument that sets them."""
        return {}

    def check_training(self, world_size: int) -> None:
        """Check that there is something to train on and that the ranks can divide every batch of it.

        Raises:
            CVLightningError: There is not, or they cannot; the message names the flag.
        """
        for name, size in self.batch_sizes().items():
            if size % world_size:
                raise CVLightningError(
                    f"--data.init_args.{name} {size} cannot be divided by {world_size} ranks; make it a multiple"
                )
        if self.needs_files and not self.train_files:
            own = next(kind.__name__ for kind in type(self).__mro__ if kind.__module__ == __name__)
            raise CVLightningError(
                "--data.init_args.train_files names no file to train on. For the embedded digits, set data.class_path "
                f"to {DIGITS}.Digit{own}"
            )

    def _rank_and_world(self) -> tuple[int, int]:
        return (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)


class TaskDataModule(EvaluationDataModule):
    """Tasks of files for RL, one `Iteration` per batch, and for evaluation.

    Args:
        train_files: Parquet files.
        num_iterations: RL iterations of the whole run; set `trainer.max_epochs: 1`.
        tasks_per_iteration: Tasks of all ranks per iteration; a multiple of their number. With
            `model.algorithm.dynamic_sampling`, more tasks come, and this is the number of groups to train on.
        overfit_tasks: Above 0: every iteration brings the same tasks, so many of them, the first of the run, instead of
            `tasks_per_iteration`. For debugging: a policy that cannot learn one group learns nothing.
        seed: Seed of the order of the rows.
        evaluation: Arguments of `EvaluationDataModule`.
    """

    def __init__(
        self,
        train_files: list[str] | None = None,
        num_iterations: PositiveInt = 100,
        tasks_per_iteration: PositiveInt = 16,
        overfit_tasks: NonNegativeInt = 0,
        seed: int = 0,
        **evaluation: Any,
    ) -> None:
        super().__init__(**evaluation)
        check_ranges(TaskDataModule.__init__, KEY, locals())
        self.overfit_tasks = overfit_tasks
        self.train_files = train_files or []
        self.num_iterations = self.num_train_batches = num_iterations
        self.tasks_per_iteration = tasks_per_iteration
        self.seed = seed

    def batch_sizes(self) -> dict[str, int]:
        """Tasks of an iteration."""
        name = "overfit_tasks" if self.overfit_tasks else "tasks_per_iteration"
        return {name: getattr(self, name)}

    def training_tasks(self) -> Source[Task]:
        """The stream of tasks to train on."""
        return RowStream(task_files(self.train_files, self.reader), self.seed)

    def train_dataloader(self) -> StepLoader[Iteration]:
        """One batch per RL iteration: this rank's part of its tasks."""
        rank, world_size = self._rank_and_world()
        self.check_training(world_size)
        count, num_groups = self.overfit_tasks or self.tasks_per_iteration, None
        source = self.training_tasks()
        if (oversample := self._max_oversample()) > 1:
            num_groups = count // world_size
            count = math.ceil(oversample * count / world_size) * world_size

        def build(step: int) -> Iteration:
            return Iteration(step, source.batch(0 if self.overfit_tasks else step, count, rank, world_size), num_groups)

        return StepLoader(build, self.num_iterations)

    def _max_oversample(self) -> float:
        """How many times its tasks an iteration may try, read from the module in training; 1: no dynamic sampling."""
        algorithm = getattr(self.trainer and self.trainer.lightning_module, "algorithm", None)
        return algorithm.dynamic_sampling.max_oversample if isinstance(algorithm, AlgorithmConfig) else 1.0


class SFTDataModule(EvaluationDataModule):
    """Conversations of files for SFT, and the tasks of an evaluation.

    Args:
        train_files: JSON files of conversations.
        num_steps: Optimizer steps of the whole run; set `trainer.max_epochs: 1`.
        conversations_per_step: Conversations of all ranks per step; a multiple of their number.
        seed: Seed of the order of the rows.
        evaluation: Arguments of `EvaluationDataModule`.
    """

    def __init__(
        self,
        train_files: list[str] | None = None,
        num_steps: PositiveInt = 400,
        conversations_per_step: PositiveInt = 32,
        seed: int = 0,
        **evaluation: Any,
    ) -> None:
        super().__init__(**evaluation)
        check_ranges(SFTDataModule.__init__, KEY, locals())
        self.train_files = train_files or []
        self.num_steps = self.num_train_batches = num_steps
        self.conversations_per_step = conversations_per_step
        self.seed = seed

    def batch_sizes(self) -> dict[str, int]:
        """Conversations of a step."""
        return {"conversations_per_step": self.conversations_per_step}

    def training_conversations(self) -> Source[Conversation]:
        """The stream of conversations to train on."""
        module = self.trainer and self.trainer.lightning_module
        given = getattr(module, "tools", None)  # a user's module may have something else under that name
        tools = [tool for tool in given if isinstance(tool, Tool)] if isinstance(given, list | tuple) else []
        return RowStream(ConversationFiles(self.train_files, self.reader, tools), self.seed)

    def num_conversations(self, step: int) -> int:
        """Conversations of all ranks in a step."""
        return self.conversations_per_step

    def train_dataloader(self) -> StepLoader[DemonstrationBatch]:
        """One batch per optimizer step: this rank's part of its conversations."""
        rank, world_size = self._rank_and_world()
        self.check_training(world_size)
        source = self.training_conversations()

        def build(step: int) -> DemonstrationBatch:
            return DemonstrationBatch(step, source.batch(step, self.num_conversations(step), rank, world_size))

        return StepLoader(build, self.num_steps)


def missing_tasks(stage: Stage) -> str:
    """What to set where there are no tasks for a stage."""
    key = "val_tasks" if stage == "validate" else "test_tasks"
    return (
        f"the config asks for no tasks; set --data.init_args.eval_files, or with a DataModule of {DIGITS} "
        f"--data.init_args.{key} '{{upright: 20, turned: 20}}'"
    )
