"""LightningDataModules of the embedded digits; files that are named take the place of the scenes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from PIL import Image

from cv_lightning.data.conversations import Conversation
from cv_lightning.data.modules import KEY, EvaluationDataModule, SFTDataModule, Stage, TaskDataModule
from cv_lightning.data.sources import Rows, Source
from cv_lightning.digits.demonstrations import DemonstrationConfig
from cv_lightning.digits.scenes import DigitsConfig, check_kind_shares
from cv_lightning.digits.sources import DigitDemonstrations, DigitTasks, HeldOutScenes
from cv_lightning.ranges import Fraction, PositiveInt, check_ranges
from cv_lightning.sandbox import Sandbox, SandboxConfig
from cv_lightning.types import SandboxResult, Task


class DigitEvaluationDataModule(EvaluationDataModule):
    """Held-out scenes for `validate` and `test`, unless `eval_files` names files.

    Args:
        digits: The embedded scenes.
        val_tasks: Held-out scenes of each kind in a validation; none: no validation.
        test_tasks: Held-out scenes of each kind in a test.
        arguments: Arguments of the next class.
    """

    needs_files = False

    def __init__(
        self,
        digits: DigitsConfig | None = None,
        val_tasks: dict[str, int] | None = None,
        test_tasks: dict[str, int] | None = None,
        **arguments: Any,
    ) -> None:
        super().__init__(**arguments)
        self._refuse_unread("eval_files", "EvaluationDataModule", val_tasks=val_tasks, test_tasks=test_tasks)
        self.digits = digits or DigitsConfig()
        self.val_tasks = val_tasks or {}
        self.test_tasks = test_tasks or {"upright": 200, "turned": 134, "small": 134, "turned_and_small": 134}
        for counts in (self.val_tasks, self.test_tasks):
            HeldOutScenes(self.digits, counts)

    def _refuse_unread(self, files: str, plain: str, **given: Any) -> None:
        """Refuse settings of the scenes that files take the place of.

        Args:
            files: Argument that names the files.
            plain: DataModule that reads files only.
            given: Values of the settings; None for one that is not set.

        Raises:
            ValueError: Files are named and a setting is, too.
        """
        unread = [name for name, value in given.items() if value is not None]
        if getattr(self, files) and unread:
            raise ValueError(
                f"{KEY}.{' and '.join(unread)}: settings of the embedded digits, which {KEY}.{files} take the place "
                f"of. Leave them out (--{KEY}.{unread[0]} null), or set --data.class_path {plain}"
            )

    def has_tasks(self, stage: Stage) -> bool:
        """True if there are tasks to validate or test on."""
        return super().has_tasks(stage) or any(self._counts(stage).values())

    def evaluation_tasks(self, stage: Stage) -> Rows[Task]:
        """The tasks of a stage: of files if they are named, else held-out scenes."""
        return super().evaluation_tasks(stage) if self.eval_files else HeldOutScenes(self.digits, self._counts(stage))

    def describe_questions(self) -> dict[str, Any]:
        """JSON values that identify the questions of a test."""
        scenes = {} if self.eval_files else {"digits": asdict(self.digits), "test_tasks": self.test_tasks}
        return super().describe_questions() | scenes

    def _counts(self, stage: Stage) -> dict[str, int]:
        return self.val_tasks if stage == "validate" else self.test_tasks


@dataclass(frozen=True, kw_only=True)
class CurriculumPoint:
    """The mix of kinds at one point of the run; between two points it changes linearly."""

    at: Fraction
    """Fraction of the run's iterations that have passed, 0 to 1."""
    kind_shares: dict[str, float]
    """Relative frequency of each kind, as in `digits.kind_shares`."""

    def __post_init__(self) -> None:
        check_ranges(self, "data.init_args.curriculum")
        check_kind_shares("data.curriculum", self.kind_shares)


def curriculum_shares(points: Sequence[CurriculumPoint], progress: float) -> dict[str, float]:
    """The mix of kinds at a point of the run; constant before the first and after the last point.

    Args:
        points: At least one, in order.
        progress: Fraction of the run's iterations that have passed.
    """
    at = [point.at for point in points]
    kinds = dict.fromkeys(kind for point in points for kind in point.kind_shares)

    def fractions(kind: str) -> list[float]:
        return [point.kind_shares.get(kind, 0.0) / sum(point.kind_shares.values()) for point in points]

    return {kind: float(np.interp(progress, at, fractions(kind))) for kind in kinds}


class DigitTaskDataModule(DigitEvaluationDataModule, TaskDataModule):
    """Scenes for RL, one `Iteration` per batch, and for evaluation; files instead where they are named.

    Args:
        curriculum: Mix of the kinds of scenes over the run (from easy to hard: Kimi k1.5, arXiv 2501.12599), instead
            of `digits.kind_shares`; empty: that mix throughout.
        arguments: Arguments of `DigitEvaluationDataModule` and `TaskDataModule`.
    """

    def __init__(self, curriculum: list[CurriculumPoint] | None = None, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.curriculum = sorted(curriculum or [], key=lambda point: point.at)
        if self.curriculum and (self.train_files or self.overfit_tasks):
            raise ValueError(
                "--data.init_args.curriculum mixes kinds of scenes over the run: leave out "
                f"--data.init_args.train_files and --data.init_args.overfit_tasks ({self.overfit_tasks})"
            )

    def training_tasks(self) -> Source[Task]:
        """The stream of tasks to train on: rows of files if they are named, else scenes."""
        return super().training_tasks() if self.train_files else DigitTasks(self.digits, self._kind_shares)

    def _kind_shares(self, step: int) -> dict[str, float]:
        """The mix of kinds in an iteration."""
        if not self.curriculum:
            return self.digits.kind_shares
        return curriculum_shares(self.curriculum, step / self.num_iterations)


class DigitSFTDataModule(DigitEvaluationDataModule, SFTDataModule):
    """Demonstrations on scenes for SFT, and the tasks of an evaluation; files instead where they are named.

    Args:
        demonstrations: In which scenes the tool is used.
        sandbox: Runs the snippets of the demonstrations.
        warm_up_share: Fraction of the steps, at the start, that show single turns only; files have no warm-up.
        warm_up_conversations_per_step: Conversations of all ranks in a step of the warm-up.
        arguments: Arguments of `DigitEvaluationDataModule` and `SFTDataModule`.
    """

    def __init__(
        self,
        demonstrations: DemonstrationConfig | None = None,
        sandbox: SandboxConfig | None = None,
        warm_up_share: Fraction = 0.35,
        warm_up_conversations_per_step: PositiveInt = 64,
        **arguments: Any,
    ) -> None:
        super().__init__(**arguments)
        check_ranges(DigitSFTDataModule.__init__, KEY, locals())
        self._refuse_unread("train_files", "SFTDataModule", demonstrations=demonstrations, sandbox=sandbox)
        self.demonstrations = demonstrations or DemonstrationConfig()
        self.sandbox_config = sandbox or SandboxConfig()
        self.warm_up_conversations_per_step = warm_up_conversations_per_step
        self.warm_up_steps = 0 if self.train_files else round(self.num_steps * warm_up_share)
        self._sandbox: Sandbox | None = None

    def teardown(self, stage: str) -> None:
        """Stop the sandbox, if demonstrations have started one."""
        if self._sandbox is not None:
            self._sandbox.close()
            self._sandbox = None

    def batch_sizes(self) -> dict[str, int]:
        """Conversations of a step, in the warm-up and after it."""
        warm_up = {} if self.train_files else {"warm_up_conversations_per_step": self.warm_up_conversations_per_step}
        return super().batch_sizes() | warm_up

    def training_conversations(self) -> Source[Conversation]:
        """The stream of conversations to train on: of files if they are named, else demonstrations."""
        if self.train_files:
            return super().training_conversations()
        return DigitDemonstrations(self.digits, self.demonstrations, self._execute, self.warm_up_steps)

    def num_conversations(self, step: int) -> int:
        """Conversations of all ranks in a step."""
        return self.warm_up_conversations_per_step if step < self.warm_up_steps else self.conversations_per_step

    def _execute(self, image: Image.Image, code: str, max_shown: int = 0) -> SandboxResult:
        """Run a snippet; the sandbox starts with the first one."""
        if self._sandbox is None:
            self._sandbox = Sandbox(self.sandbox_config)
            self._sandbox.start()
        return self._sandbox.run_sync(image, code, max_shown=max_shown)
