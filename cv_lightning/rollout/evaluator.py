"""Evaluation by rollouts: every setting over the same tasks, with all trajectories stored.

Every question is on disk as soon as its trajectories are judged. An interrupted `test` continues with the missing
questions if model, settings and questions are the same; see `evaluation_state`.
"""

from __future__ import annotations

import logging
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.trainer.states import TrainerFn

from cv_lightning.agent.driver import RolloutProgress
from cv_lightning.data.modules import EvaluationDataModule
from cv_lightning.data.rows import RowProblem
from cv_lightning.distributed import gather_lists
from cv_lightning.engines import SamplingConfig
from cv_lightning.evaluation.outcome import Outcome, outcomes
from cv_lightning.evaluation.results import evaluated, fingerprint, tool_pairs, write_results
from cv_lightning.evaluation.tables import Evaluated, print_grids
from cv_lightning.files import write_json
from cv_lightning.modules.base import PolicyModule
from cv_lightning.ranges import NonNegativeFloat, PositiveInt, check_ranges
from cv_lightning.rollout.collector import Collector
from cv_lightning.rollout.evaluation_state import (
    Answered,
    differences,
    holds,
    keep_good,
    keep_only,
    read_answered,
    sizes_of,
    write_state,
)
from cv_lightning.trajectory.store import StoreConfig, TrajectoryWriter
from cv_lightning.types import CVLightningError, EndState, Group, Iteration, Task
from cv_lightning.versions import describe_run

logger = logging.getLogger(__name__)
SHOWN_DIFFERENCES = 5
"""Differing settings that a message names."""


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """One setting of an evaluation; `test` runs each over the same tasks."""

    name: str = "greedy"
    """Folder under `<run>/eval/` (after `eval_prefix`) and prefix of its metrics."""
    temperature: NonNegativeFloat = 0.0
    """0 for greedy decoding."""
    tool: bool = True
    """False if the tool is neither offered nor callable."""
    num_samples: PositiveInt = 1
    """Trajectories per task; with several, pass@k is reported."""

    def __post_init__(self) -> None:
        if not self.name or "/" in self.name or self.name.startswith("."):
            raise ValueError(f"evaluations.name {self.name!r} becomes a folder: letters, digits and _")
        check_ranges(self, "rollout.evaluations")


ShowProgress = Callable[[str], AbstractContextManager[Callable[[RolloutProgress], None] | None]]
"""Makes a context manager around one rollout from its title; it yields the agent loop's progress function."""


class Evaluator:
    """Runs the settings of an evaluation and summarises them.

    All trajectories are stored, also if training stores a fraction. `prefix` precedes the folders' names.

    Raises:
        ValueError: Two settings have one name.
    """

    def __init__(
        self,
        settings: Sequence[EvaluationConfig],
        prefix: str,
        store: StoreConfig,
        seed: int,
        fingerprint: Mapping[str, Any] | None = None,
    ) -> None:
        self.settings = list(settings)
        names = [setting.name for setting in self.settings]
        if len(set(names)) < len(names):
            raise ValueError(f"evaluations: the names {names} must differ, each is a folder")
        self.prefix = prefix
        self.store = replace(store, share=1.0)
        self.seed = seed
        self.rollout_fingerprint = dict(fingerprint or {})
        self.outcomes: dict[str, list[Outcome]] = {}
        self._answered: dict[str, dict[str, Answered]] = {}
        self._kept: dict[str, list[str]] = {}
        """Ids of this rank's questions whose earlier answer is kept, by setting."""
        self._sizes: dict[str, dict[str, int]] = {}
        """Bytes of an earlier test's files, by setting and name; on the first rank."""
        self._fingerprint: dict[str, Any] = {}
        self._is_partial = False
        """Partial run (`limit_test_batches`): stored answers to the remaining questions are kept."""
        self._finished: set[str] = set()
        """Settings that a whole test had finished before this partial run."""

    # ------------------------------------------------------------------ start
    def start(self, trainer: pl.Trainer, module: PolicyModule) -> None:
        """Clear the folders, except for the answers of an interrupted test with the same fingerprint.

        Raises:
            CVLightningError: A test would replace the results of another one.
        """
        self.outcomes = {setting.name: [] for setting in self.settings}
        self._kept = {setting.name: [] for setting in self.settings}
        self._fingerprint = self._describe(trainer, module)
        limit = trainer.limit_test_batches  # 1 is one batch, 1.0 all of them
        self._is_partial = isinstance(limit, int) or limit < 1 or bool(trainer.fast_dev_run)  # type: ignore[attr-defined]
        folders = {setting.name: self._folder(trainer, module, setting) for setting in self.settings}
        refused = self._prepare(folders, trainer.state.fn) if trainer.is_global_zero else ""
        if refused := trainer.strategy.broadcast(refused):  # all ranks raise
            raise CVLightningError(refused)
        self._answered = {name: read_answered(folder) for name, folder in folders.items()}

    def _prepare(self, folders: Mapping[str, Path], doing: TrainerFn | None) -> str:
        """Prepare the settings' folders, by name; returns a reason to refuse the evaluation, or empty.

        No folder is changed if one of them holds another evaluation.
        """
        fingerprints = {setting.name: self._fingerprint_of(setting) for setting in self.settings}
        testing = doing is TrainerFn.TESTING
        found = {name: holds(folder, fingerprints[name]) if testing else "new" for name, folder in folders.items()}
        self._finished = {name for name, what in found.items() if what == "finished"} if self._is_partial else set()
        if name := next((name for name, what in found.items() if what == "another"), None):
            changed = differences(folders[name], fingerprints[name])
            listed = ", ".join(changed[:SHOWN_DIFFERENCES]) + (", ..." if len(changed) > SHOWN_DIFFERENCES else "")
            return (
                f"{folders[name]} holds another evaluation (it differs in {listed}); give this one its own place by "
                "--rollout.eval_prefix NAME_ or --trainer.default_root_dir, or remove that folder"
            )
        for name, folder in folders.items():
            if found[name] == "interrupted" or name in self._finished:
                keep_good(folder)
            else:
                shutil.rmtree(folder, ignore_errors=True)
            write_state(folder, fingerprints[name], finished=False)
            self._sizes[name] = sizes_of(folder)
        return ""

    def _fingerprint_of(self, setting: EvaluationConfig) -> dict[str, Any]:
        return self._fingerprint | {"setting": asdict(setting)}

    def _describe(self, trainer: pl.Trainer, module: PolicyModule) -> dict[str, Any]:
        """Fingerprint of everything but the setting."""
        checkpoint = trainer.ckpt_path
        model, data = Path(module.policy_config.path), trainer.datamodule  # type: ignore[attr-defined]
        named = {"module": type(data).__name__}
        questions = data.describe_questions() if isinstance(data, EvaluationDataModule) else named
        return {
            "model": str(model),
            "dtype": module.policy_config.dtype,
            "min_pixels": module.policy_config.min_pixels,
            "max_pixels": module.policy_config.max_pixels,
            "weights": fingerprint(model) if model.exists() else {},
            "checkpoint": str(checkpoint) if checkpoint else None,
            "checkpoint_weights": fingerprint(Path(checkpoint)) if checkpoint and Path(checkpoint).exists() else {},
            "iteration": module.iteration,
            "seed": self.seed,
            "questions": questions,
        } | self.rollout_fingerprint

    # ------------------------------------------------------------------ run
    def run(
        self,
        trainer: pl.Trainer,
        module: PolicyModule,
        batch: Iteration,
        collector_of: Callable[[EvaluationConfig], Collector],
        show_progress: ShowProgress,
    ) -> None:
        """Run every setting over the tasks of a batch that are not answered yet."""
        for setting in self.settings:
            folder = self._folder(trainer, module, setting)
            tasks = self._unanswered(setting, batch.tasks)
            with TrajectoryWriter(folder, self.store, rank=trainer.global_rank, background=True) as writer:
                collector = collector_of(setting)
                collector.on_group = partial(self._keep, writer, module.iteration, self.outcomes[setting.name])
                sampling = SamplingConfig(temperature=setting.temperature, seed=self.seed)
                with show_progress(f"evaluate {setting.name}") as show:
                    collector.roll_out(tasks, setting.num_samples, sampling, 0, show)

    def _unanswered(self, setting: EvaluationConfig, tasks: Sequence[Task]) -> list[Task]:
        """The tasks without a stored answer; the stored answers to the others are counted."""
        left = []
        for task in tasks:
            known = self._answered[setting.name].get(task.id)
            if known is not None and known.is_answer_to(task, setting.num_samples):
                self.outcomes[setting.name] += known.outcomes
                self._kept[setting.name].append(task.id)
            else:
                left.append(task)
        if len(left) < len(tasks):
            logger.info("%s: %d questions were answered before", setting.name, len(tasks) - len(left))
        return left

    @staticmethod
    def _keep(writer: TrajectoryWriter, iteration: int, found: list[Outcome], group: Group) -> None:
        writer.write_group(group, iteration)
        found += outcomes([group])

    # ------------------------------------------------------------------ finish
    def finish(self, trainer: pl.Trainer, module: PolicyModule) -> None:
        """Summarise, log and write `metrics.json` per setting; a test also writes and prints its results."""
        everything = {setting.name: gather_lists(self.outcomes[setting.name]) for setting in self.settings}
        kept = {setting.name: gather_lists(self._kept[setting.name]) for setting in self.settings}
        skipped = gather_skipped(trainer)
        figures = {name: evaluated(found) for name, found in everything.items()}
        for name, entry in figures.items():
            values = entry.summary.scalars() | {"score": entry.breakdown.score.value}
            module.log_dict({f"{name}/{key}": value for key, value in values.items()}, sync_dist=True)
        if not trainer.is_global_zero:
            return
        done = {}
        for setting in self.settings:
            name, entry, folder = setting.name, figures[setting.name], self._folder(trainer, module, setting)
            write_json(folder / "metrics.json", entry.summary.to_json() | {"breakdown": entry.breakdown.to_json()})
            if self._sizes.get(name) and not self._is_partial:
                keep_only(folder, self._sizes[name], set(kept[name]))
            failed = sum(o.correct is None and o.end_state is not EndState.ERROR_TASK for o in everything[name])
            if failed:
                logger.warning(
                    "%s: %d of %d trajectories failed around the model or were not judged; repeat the command to ask "
                    "their questions again", name, failed, len(everything[name]),
                )  # fmt: skip
            done[name] = not failed and (not self._is_partial or name in self._finished)
        if trainer.state.fn is TrainerFn.TESTING:
            self._write_results(trainer, everything, figures, skipped)
        for setting in self.settings:  # last, so that an evaluation that is killed before can be continued
            folder = self._folder(trainer, module, setting)
            write_state(folder, self._fingerprint_of(setting), finished=done[setting.name])

    def _write_results(
        self,
        trainer: pl.Trainer,
        everything: Mapping[str, Sequence[Outcome]],
        figures: Mapping[str, Evaluated],
        skipped: Sequence[RowProblem],
    ) -> None:
        root = Path(trainer.default_root_dir)
        config = root / "test_config.yaml"
        about = self._fingerprint | {
            "settings": [asdict(setting) for setting in self.settings],
            "data": _describe_data(trainer, skipped),
            "run": describe_run(),
            "config": config.read_text() if config.is_file() else None,
        }
        pairs = tool_pairs(everything, self._without_tool())
        grids = write_results(root / "eval", self.prefix, figures, pairs, about, skipped_note(skipped))
        after = f"written to {root / 'eval'}/{self.prefix}results.json, .md and .png; beside them every trajectory\n"
        print_grids(grids, after=f"{after}next: `cv-lightning report {root}` writes {root / 'report.html'}")

    def _without_tool(self) -> dict[str, str]:
        """Names of the settings without the tool, by the name of the same setting with it."""
        names = {replace(setting, name="setting"): setting.name for setting in self.settings}
        pairs = {name: names.get(replace(setting, tool=False)) for setting, name in names.items() if setting.tool}
        return {name: other for name, other in pairs.items() if other is not None}

    def _folder(self, trainer: pl.Trainer, module: PolicyModule, setting: EvaluationConfig) -> Path:
        """`eval/<prefix><name>`; a validation's name contains `validation_` or, in training, the iteration."""
        when = {
            TrainerFn.FITTING: f"iteration{module.iteration:06d}_",
            TrainerFn.VALIDATING: "validation_",
        }.get(trainer.state.fn, "")  # type: ignore[arg-type]
        return Path(trainer.default_root_dir) / "eval" / f"{self.prefix}{when}{setting.name}"


def _describe_data(trainer: pl.Trainer, skipped: Sequence[RowProblem]) -> dict[str, Any]:
    """The questions' files by path, and the rows that could not be used."""
    files = getattr(trainer.datamodule, "eval_files", [])  # type: ignore[attr-defined]
    rows = [{"file": str(row.file), "row": row.row, "kind": row.kind, "message": row.message} for row in skipped]
    return {"files": {str(path): fingerprint(Path(path)) for path in files}, "skipped": rows}


def gather_skipped(trainer: pl.Trainer) -> list[RowProblem]:
    """Rows of the evaluation's files that some rank could not use, sorted and without repetition."""
    problems = getattr(getattr(trainer, "datamodule", None), "skipped", None)
    found = gather_lists(list(problems.problems) if problems is not None else [])
    return sorted({(row.file, row.row): row for row in found}.values(), key=lambda row: (row.file, row.row))


def skipped_note(skipped: Sequence[RowProblem]) -> str:
    """Note of a table about unusable rows; empty without any."""
    kinds = Counter(row.kind for row in skipped)
    listed = ", ".join(f"{count} x {kind}" for kind, count in kinds.most_common())
    return f"{len(skipped)} rows of the files could not be used and count nowhere: {listed}." if skipped else ""
