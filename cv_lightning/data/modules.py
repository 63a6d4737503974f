"""LightningDataModules: tasks for RL and evaluation, conversations for SFT.

Batches are objects of plain classes, which Lightning hands on untouched, and come from sized loaders,
which it does not prefetch from. A batch is a pure function of its number, so a loader's whole state is that number.
Ranks take their shares here: the loaders are no `DataLoader`s, and no `DistributedSampler` is put around them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

import lightning.pytorch as pl
from PIL import Image

from cv_lightning.data.benchmarks import task_files
from cv_lightning.data.conversations import Conversation
from cv_lightning.data.corruptions import CorruptedRows, CorruptionConfig
from cv_lightning.data.probe import ProbeConfig, ProbeRows
from cv_lightning.data.rows import ReaderConfig, RowError, RowProblems
from cv_lightning.data.sft_json import ConversationFiles
from cv_lightning.data.sources import Rows, RowStream, Source, share_of_rank
from cv_lightning.digits.demonstrations import DemonstrationConfig
from cv_lightning.digits.scenes import DigitsConfig, check_kind_shares
from cv_lightning.digits.sources import DigitDemonstrations, DigitTasks, HeldOutScenes
from cv_lightning.rl.algorithm import AlgorithmConfig
from cv_lightning.sandbox import Sandbox, SandboxConfig
from cv_lightning.types import CVLightningError, Iteration, SandboxResult, Task

Batch = TypeVar("Batch")


class DemonstrationBatch:
    """One Lightning batch of SFT: the conversations of one optimizer step on this rank.

    Args:
        index: number of the step, from 0.
        conversations: this rank's.
    """

    def __init__(self, index: int, conversations: list[Conversation]) -> None:
        self.index = index
        self.conversations = conversations


class StepLoader(Generic[Batch]):
    """A sized loader whose n-th batch is `build(n)`; a checkpoint keeps the number of the next one.

    Args:
        build: makes the batch of a step, the same for the same number.
        num_steps: batches in an epoch.
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
    """Held-out tasks for `validate` and `test`: of files where they are given, else digits.

    Args:
        digits: the embedded scenes.
        reader: how files are read.
        eval_files: files that `validate` and `test` go through instead of digits, in the format that `reader` names.
        val_tasks: held-out scenes of each kind in a validation; none: no validation.
        test_tasks: held-out scenes of each kind in a test.
        tasks_per_eval_batch: tasks of all ranks that are in memory and rolled out at once; 0: all.
        corruptions: show the tasks of `validate` and `test` turned and corrupted, a row for every combination.
        probe: ask of the images of `validate` and `test` only which way they were turned.
    """

    def __init__(
        self,
        digits: DigitsConfig | None = None,
        reader: ReaderConfig | None = None,
        eval_files: list[str] | None = None,
        val_tasks: dict[str, int] | None = None,
        test_tasks: dict[str, int] | None = None,
        tasks_per_eval_batch: int = 1024,
        corruptions: CorruptionConfig | None = None,
        probe: ProbeConfig | None = None,
    ) -> None:
        super().__init__()
        if tasks_per_eval_batch < 0:
            raise ValueError(f"--data.tasks_per_eval_batch {tasks_per_eval_batch}: a number of tasks, or 0 for all")
        self.digits = digits or DigitsConfig()
        self.reader = reader or ReaderConfig()
        self.eval_files = eval_files or []
        self.val_tasks = val_tasks or {}
        self.test_tasks = test_tasks or {"upright": 200, "turned": 134, "small": 134, "turned_and_small": 134}
        self.tasks_per_eval_batch = tasks_per_eval_batch
        if corruptions is not None and probe is not None:
            raise ValueError("--data.probe turns the pictures itself: it cannot be had with --data.corruptions")
        self.corruptions = corruptions
        self.probe = probe
        self.train_files: list[str] = []
        self.skipped: RowProblems | None = None
        """Rows of `eval_files` that could not be used so far; None before there is a loader, and for digits."""
        self.num_train_batches = 0
        for counts in (self.val_tasks, self.test_tasks):
            HeldOutScenes(self.digits, counts)

    def val_dataloader(self) -> StepLoader[Iteration] | list[object]:
        """Tasks of a validation; an empty list, which skips it, where none are asked for."""
        return self._evaluation_loader(self.val_tasks) if self.has_validation else []

    @property
    def has_validation(self) -> bool:
        """True if there are tasks to validate on."""
        return bool(self.eval_files) or any(self.val_tasks.values())

    def test_dataloader(self) -> StepLoader[Iteration]:
        """Tasks of a test."""
        return self._evaluation_loader(self.test_tasks)

    def _evaluation_loader(self, counts: dict[str, int]) -> StepLoader[Iteration]:
        rank, world_size = self._rank_and_world()
        rows: Rows[Task] = HeldOutScenes(self.digits, counts)
        if self.eval_files:
            rows = files = task_files(self.eval_files, self.reader)
            self.skipped = files.problems
        if self.probe is not None:
            rows = ProbeRows(rows, self.probe)
        if self.corruptions is not None:
            rows = CorruptedRows(rows, self.corruptions)
        size = len(rows)
        if size == 0:
            raise ValueError("--data.test_tasks asks for no scene of any kind; name at least one, or --data.eval_files")
        at_once = self.tasks_per_eval_batch or size

        def build(step: int) -> Iteration:
            tasks = []
            for position in share_of_rank(range(step * at_once, min(size, (step + 1) * at_once)), rank, world_size):
                with suppress(RowError):  # broken behind a good header: one of `skipped`, counted nowhere else
                    tasks.append(rows.row(position))
            return Iteration(step, tasks)

        return StepLoader(build, math.ceil(size / at_once))

    def check_ranks(self, world_size: int) -> None:
        """See that the ranks can share every training batch.

        Raises:
            CVLightningError: names the flag.
        """

    def _rank_and_world(self) -> tuple[int, int]:
        return (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)


@dataclass(frozen=True, kw_only=True)
class CurriculumPoint:
    """What the mix of kinds is at a point of the run; between two points it changes linearly."""

    at: float
    """Share of the run's iterations that have passed, 0 to 1."""
    kind_shares: dict[str, float]
    """Relative frequency of each kind, as in `digits.kind_shares`."""

    def __post_init__(self) -> None:
        if not 0 <= self.at <= 1:
            raise ValueError(f"--data.curriculum: at {self.at} must be between 0 and 1, a share of the iterations")
        check_kind_shares("data.curriculum", self.kind_shares)


def curriculum_shares(points: Sequence[CurriculumPoint], progress: float) -> dict[str, float]:
    """The mix of kinds at a point of the run; before the first and after the last point it stands still.

    Args:
        points: at least one, in order.
        progress: share of the run's iterations that have passed.
    """
    after = next((i for i, point in enumerate(points) if point.at > progress), len(points))
    first, last = points[max(after - 1, 0)], points[min(after, len(points) - 1)]
    weight = (progress - first.at) / (last.at - first.at) if last.at > first.at else 0.0
    weight = min(1.0, max(0.0, weight))

    def share(point: CurriculumPoint, kind: str) -> float:
        return point.kind_shares.get(kind, 0.0) / sum(point.kind_shares.values())

    kinds = dict.fromkeys([*first.kind_shares, *last.kind_shares])
    return {kind: (1 - weight) * share(first, kind) + weight * share(last, kind) for kind in kinds}


class TaskDataModule(EvaluationDataModule):
    """Tasks for RL, an `Iteration` a batch, and for evaluation.

    Args:
        digits: the embedded scenes.
        train_files: Parquet files to train on instead of digits.
        num_iterations: RL iterations of the whole run; set `trainer.max_epochs: 1`.
        tasks_per_iteration: tasks of all ranks that an iteration needs; a multiple of their number. With
            `model.algorithm.dynamic_sampling` it brings more, and this is the number of groups to train on.
        overfit_tasks: above 0: every iteration brings the same so many tasks, the first of the run, instead of
            `tasks_per_iteration`. For debugging: a policy that cannot learn one group learns nothing.
        curriculum: mix of the kinds of digit scenes over the run (from easy to hard: Kimi k1.5, 2501.12599), instead
            of `digits.kind_shares`; empty: that mix throughout.
        seed: order of the rows of files (scenes have their own seed).
        evaluation: arguments of `EvaluationDataModule`.
    """

    def __init__(
        self,
        digits: DigitsConfig | None = None,
        train_files: list[str] | None = None,
        num_iterations: int = 100,
        tasks_per_iteration: int = 16,
        overfit_tasks: int = 0,
        curriculum: list[CurriculumPoint] | None = None,
        seed: int = 0,
        **evaluation: Any,
    ) -> None:
        super().__init__(digits, **evaluation)
        if num_iterations < 1 or tasks_per_iteration < 1:
            raise ValueError(
                f"--data.num_iterations {num_iterations} and --data.tasks_per_iteration {tasks_per_iteration} "
                "must be at least 1"
            )
        self.overfit_tasks = overfit_tasks
        self.curriculum = sorted(curriculum or [], key=lambda point: point.at)
        if self.curriculum and train_files:
            raise ValueError("--data.curriculum mixes kinds of digit scenes: it cannot be had with --data.train_files")
        if overfit_tasks < 0 or (overfit_tasks and curriculum):
            raise ValueError(
                f"--data.overfit_tasks {overfit_tasks} must be at least 0, and stands alone: no --data.curriculum "
                "with it"
            )
        self.train_files = train_files or []
        self.num_iterations = self.num_train_batches = num_iterations
        self.tasks_per_iteration = tasks_per_iteration
        self.seed = seed

    def check_ranks(self, world_size: int) -> None:
        """See that the ranks can share every iteration.

        Raises:
            CVLightningError: names the flag.
        """
        name = "overfit_tasks" if self.overfit_tasks else "tasks_per_iteration"
        _check_divisible(name, getattr(self, name), world_size)

    def train_dataloader(self) -> StepLoader[Iteration]:
        """One batch an RL iteration: this rank's share of its tasks."""
        rank, world_size = self._rank_and_world()
        self.check_ranks(world_size)
        count, num_groups = self.overfit_tasks or self.tasks_per_iteration, None
        files = RowStream(task_files(self.train_files, self.reader), self.seed) if self.train_files else None
        if (oversample := self._max_oversample()) > 1:
            count = math.ceil(oversample * count / world_size) * world_size
            num_groups = self.tasks_per_iteration // world_size

        def build(step: int) -> Iteration:
            source: Source[Task] = files or DigitTasks(self._digits_at(step))
            return Iteration(step, source.batch(0 if self.overfit_tasks else step, count, rank, world_size), num_groups)

        return StepLoader(build, self.num_iterations)

    def _max_oversample(self) -> float:
        """How many times its tasks an iteration may try, as the module in training says; 1: no dynamic sampling."""
        algorithm = getattr(self.trainer and self.trainer.lightning_module, "algorithm", None)
        return algorithm.dynamic_sampling.max_oversample if isinstance(algorithm, AlgorithmConfig) else 1.0

    def _digits_at(self, step: int) -> DigitsConfig:
        if not self.curriculum:
            return self.digits
        return replace(self.digits, kind_shares=curriculum_shares(self.curriculum, step / self.num_iterations))


class SFTDataModule(EvaluationDataModule):
    """Conversations for SFT, and the tasks of an evaluation.

    Args:
        digits: the embedded scenes.
        demonstrations: in which scenes the tool is used.
        sandbox: runs the snippets of the demonstrations.
        train_files: JSON files of conversations to train on instead of digits; they have no warm-up.
        num_steps: optimizer steps of the whole run; set `trainer.max_epochs: 1`.
        conversations_per_step: of all ranks; a multiple of their number.
        warm_up_share: share of the steps, at the start, that show single turns only.
        warm_up_conversations_per_step: of all ranks, in the warm-up.
        seed: order of the rows of files (scenes have their own seed).
        evaluation: arguments of `EvaluationDataModule`.
    """

    def __init__(
        self,
        digits: DigitsConfig | None = None,
        demonstrations: DemonstrationConfig | None = None,
        sandbox: SandboxConfig | None = None,
        train_files: list[str] | None = None,
        num_steps: int = 400,
        conversations_per_step: int = 32,
        warm_up_share: float = 0.35,
        warm_up_conversations_per_step: int = 64,
        seed: int = 0,
        **evaluation: Any,
    ) -> None:
        super().__init__(digits, **evaluation)
        if min(num_steps, conversations_per_step, warm_up_conversations_per_step) < 1 or not 0 <= warm_up_share <= 1:
            raise ValueError(
                f"--data.num_steps {num_steps}, --data.conversations_per_step {conversations_per_step} and "
                f"--data.warm_up_conversations_per_step {warm_up_conversations_per_step} must be at least 1, "
                f"--data.warm_up_share {warm_up_share} between 0 and 1"
            )
        self.demonstrations = demonstrations or DemonstrationConfig()
        self.sandbox_config = sandbox or SandboxConfig()
        self.train_files = train_files or []
        self.num_steps = self.num_train_batches = num_steps
        self.conversations_per_step = conversations_per_step
        self.warm_up_share = warm_up_share
        self.warm_up_conversations_per_step = warm_up_conversations_per_step
        self.seed = seed
        self._sandbox: Sandbox | None = None

    def teardown(self, stage: str) -> None:
        """Stop the sandbox, if demonstrations have started one."""
        if self._sandbox is not None:
            self._sandbox.close()
            self._sandbox = None

    def check_ranks(self, world_size: int) -> None:
        """See that the ranks can share every step.

        Raises:
            CVLightningError: names the flag.
        """
        _check_divisible("conversations_per_step", self.conversations_per_step, world_size)
        if not self.train_files:
            _check_divisible("warm_up_conversations_per_step", self.warm_up_conversations_per_step, world_size)

    def train_dataloader(self) -> StepLoader[DemonstrationBatch]:
        """One batch an optimizer step: this rank's share of its conversations."""
        rank, world_size = self._rank_and_world()
        self.check_ranks(world_size)
        source: Source[Conversation]
        if self.train_files:
            source = RowStream(ConversationFiles(self.train_files, self.reader), self.seed)
        else:
            source = DigitDemonstrations(self.digits, self.demonstrations, self._execute)
        warm_up_steps = 0 if self.train_files else round(self.num_steps * self.warm_up_share)

        def build(step: int) -> DemonstrationBatch:
            warm_up = step < warm_up_steps
            count = self.warm_up_conversations_per_step if warm_up else self.conversations_per_step
            return DemonstrationBatch(step, source.batch(step, count, rank, world_size, warm_up=warm_up))

        return StepLoader(build, self.num_steps)

    def _execute(self, image: Image.Image, code: str) -> SandboxResult:
        """Run a snippet; the sandbox starts with the first one."""
        if self._sandbox is None:
            self._sandbox = Sandbox(self.sandbox_config)
            self._sandbox.start()
        return self._sandbox.run_sync(image, code)


def _check_divisible(name: str, count: int, world_size: int) -> None:
    if count % world_size:
        raise CVLightningError(
            f"--data.init_args.{name} {count} cannot be shared by {world_size} ranks; make it a multiple of that"
        )
