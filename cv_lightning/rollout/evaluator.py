"""Evaluation by rollouts: every configured setting over the same tasks, all trajectories written, all ranks counted.

Every question is on disk as soon as its trajectories are judged. An interrupted `test` goes on with the questions that
are missing, if model, settings and questions are the same; see `resume`.
"""

from __future__ import annotations

import logging
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.trainer.states import TrainerFn

from cv_lightning.agent.driver import RolloutProgress
from cv_lightning.data.rows import RowProblem
from cv_lightning.distributed import gather_lists
from cv_lightning.engines import SamplingConfig
from cv_lightning.evaluation.outcome import Outcome, outcomes
from cv_lightning.evaluation.results import evaluated, fingerprint, tool_pairs, write_results
from cv_lightning.evaluation.tables import Evaluated, print_grids
from cv_lightning.files import write_json
from cv_lightning.modules.base import PolicyModule
from cv_lightning.rollout.collector import Collector
from cv_lightning.rollout.evaluation_state import (
    RETRIED,
    Answered,
    differences,
    holds,
    keep_good,
    keep_only,
    read_answered,
    sizes_of,
    write_state,
)
from cv_lightning.rollout.fingerprint import describe_questions
from cv_lightning.trajectory.store import StoreConfig, TrajectoryWriter
from cv_lightning.types import CVLightningError, Group, Iteration
from cv_lightning.versions import describe_run

logger = logging.getLogger(__name__)
SHOWN_DIFFERENCES = 5
"""Settings that a message names in which two evaluations differ."""


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
    """Trajectories per task; with several, pass@k is reported."""

    def __post_init__(self) -> None:
        if not self.name or "/" in self.name or self.name.startswith("."):
            raise ValueError(f"evaluations.name {self.name!r} becomes a folder: letters, digits and _")
        if self.temperature < 0 or self.num_samples < 1:
            raise ValueError(
                f"evaluations.temperature {self.temperature} must not be negative and evaluations.num_samples "
                f"{self.num_samples} at least 1 ({self.name})"
            )


ShowProgress = Callable[[str], AbstractContextManager[Callable[[RolloutProgress], None] | None]]
"""Context manager around one rollout, made from its title; gives what the agent loop reports to."""


class Evaluator:
    """Runs the settings of an evaluation and sums them up.

    Args:
        settings: what is run over each task.
        prefix: put before the names of the folders.
        store: how trajectories are kept on disk; all of them, whatever its share in training.
        seed: of sampling.
        about: what else the numbers depend on, as JSON values: limits of the agent, reward.

    Raises:
        ValueError: two settings of one name.
    """

    def __init__(
        self,
        settings: Sequence[EvaluationConfig],
        prefix: str,
        store: StoreConfig,
        seed: int,
        about: Mapping[str, Any] | None = None,
    ) -> None:
        self.settings = list(settings)
        names = [setting.name for setting in self.settings]
        if len(set(names)) < len(names):
            raise ValueError(f"evaluations: the names {names} must differ, each is a folder")
        self.prefix = prefix
        self.store = replace(store, share=1.0)
        self.seed = seed
        self.about = dict(about or {})
        self.outcomes: dict[str, list[Outcome]] = {}
        self._answered: dict[str, dict[str, Answered]] = {}
        self._kept: dict[str, list[str]] = {}
        """Ids of the questions of this rank whose earlier answer stands, by setting."""
        self._sizes: dict[str, dict[str, int]] = {}
        """Bytes of the files that an earlier test left, by setting and name; on the first rank."""
        self._identity: dict[str, Any] = {}
        self._is_look = False
        """Only some of the questions are asked this time: what was answered of the others stays."""
        self._finished: set[str] = set()
        """Settings whose whole test had been finished before such a look."""

    # ------------------------------------------------------------------ start
    def start(self, trainer: pl.Trainer, module: PolicyModule) -> None:
        """Clear the folders, but for what an interrupted test of the same left in them.

        Raises:
            CVLightningError: a test would take the place of another one's results.
        """
        self.outcomes = {setting.name: [] for setting in self.settings}
        self._kept = {setting.name: [] for setting in self.settings}
        self._identity = self._describe(trainer, module)
        limit = trainer.limit_test_batches  # 1 is one batch, 1.0 all of them
        self._is_look = isinstance(limit, int) or limit < 1 or bool(trainer.fast_dev_run)  # type: ignore[attr-defined]
        refused = ""
        if trainer.is_global_zero:
            refused = self._prepare({s.name: self._folder(trainer, module, s) for s in self.settings}, trainer.state.fn)
        if refused := trainer.strategy.broadcast(refused):  # on all ranks alike
            raise CVLightningError(refused)
        self._answered = {
            setting.name: read_answered(self._folder(trainer, module, setting)) for setting in self.settings
        }

    def _prepare(self, folders: Mapping[str, Path], doing: TrainerFn | None) -> str:
        """Make the folders ready, by name of the setting; nothing is touched where one of them holds something else.

        Returns:
            Why the evaluation must not be; empty: it may.
        """
        identities = {setting.name: self._identity_of(setting) for setting in self.settings}
        testing = doing is TrainerFn.TESTING
        found = {name: holds(folder, identities[name]) if testing else "new" for name, folder in folders.items()}
        self._finished = {name for name, what in found.items() if what == "finished"} if self._is_look else set()
        if name := next((name for name, what in found.items() if what == "another"), None):
            changed = differences(folders[name], identities[name])
            listed = ", ".join(changed[:SHOWN_DIFFERENCES]) + (", ..." if len(changed) > SHOWN_DIFFERENCES else "")
            return (
                f"{folders[name]} holds another evaluation (it differs in {listed}); give this one its own place by "
                "--rollout.eval_prefix NAME_ or --trainer.default_root_dir, or remove that folder"
            )
        for name, folder in folders.items():
            if found[name] == "goes on" or name in self._finished:
                keep_good(folder)
            else:
                shutil.rmtree(folder, ignore_errors=True)
            write_state(folder, identities[name], finished=False)
            self._sizes[name] = sizes_of(folder)
        return ""

    def _identity_of(self, setting: EvaluationConfig) -> dict[str, Any]:
        return self._identity | {"setting": asdict(setting)}

    def _describe(self, trainer: pl.Trainer, module: PolicyModule) -> dict[str, Any]:
        """Model, seed and what else makes the numbers."""
        checkpoint = trainer.ckpt_path
        model = Path(module.policy_config.path)
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
            "questions": describe_questions(trainer.datamodule),  # type: ignore[attr-defined]
        } | self.about

    # ------------------------------------------------------------------ run
    def run(
        self,
        trainer: pl.Trainer,
        module: PolicyModule,
        batch: Iteration,
        collector_of: Callable[[EvaluationConfig], Collector],
        show_progress: ShowProgress,
    ) -> None:
        """Run every setting over the batch's tasks, but for those that are answered already.

        Args:
            trainer: The trainer.
            module: The policy's module.
            batch: The tasks.
            collector_of: Gives what rolls tasks out under a setting.
            show_progress: Shows one rollout, by its title, while it runs.
        """
        for setting in self.settings:
            answered, found = self._answered[setting.name], self.outcomes[setting.name]
            tasks = []
            for task in batch.tasks:
                known = answered.get(task.id)
                if known is not None and known.is_answer_to(task, setting.num_samples):
                    found += known.outcomes
                    self._kept[setting.name].append(task.id)
                else:
                    tasks.append(task)
            if len(tasks) < len(batch.tasks):
                logger.info("%s: %d questions were answered before", setting.name, len(batch.tasks) - len(tasks))
            folder = self._folder(trainer, module, setting)
            with TrajectoryWriter(folder, self.store, rank=trainer.global_rank, background=True) as writer:
                written: set[int] = set()

                def keep(
                    group: Group,
                    writer: TrajectoryWriter = writer,
                    written: set[int] = written,
                    found: list[Outcome] = found,
                ) -> None:
                    written.add(id(group))
                    writer.write_group(group, module.iteration)
                    found += outcomes([group])

                collector = collector_of(setting)
                collector.on_group = keep
                sampling = SamplingConfig(temperature=setting.temperature, seed=self.seed)
                with show_progress(f"evaluate {setting.name}") as show:
                    groups = collector.roll_out(tasks, setting.num_samples, sampling, 0, show)
                for group in groups:  # an engine that ranks share hands them over at the end
                    if id(group) not in written:
                        keep(group)

    # ------------------------------------------------------------------ finish
    def finish(self, trainer: pl.Trainer, module: PolicyModule) -> None:
        """Summarise, log and write `metrics.json` per setting; a test also writes and prints its results."""
        everything = {setting.name: gather_lists(self.outcomes[setting.name]) for setting in self.settings}
        kept = {setting.name: gather_lists(self._kept[setting.name]) for setting in self.settings}
        skipped = gather_skipped(trainer)
        figures = {name: evaluated(found) for name, found in everything.items()}
        unfinished = set()
        for setting in self.settings:
            entry = figures[setting.name]
            values = entry.summary.scalars() | {"score": entry.breakdown.score.value}
            # the same on all ranks
            module.log_dict({f"{setting.name}/{key}": value for key, value in values.items()}, sync_dist=True)
            if trainer.is_global_zero:
                folder = self._folder(trainer, module, setting)
                write_json(folder / "metrics.json", entry.summary.to_json() | {"breakdown": entry.breakdown.to_json()})
                if self._sizes.get(setting.name) and not self._is_look:
                    keep_only(folder, self._sizes[setting.name], set(kept[setting.name]))
                failed = sum(outcome.end_state.value in RETRIED for outcome in everything[setting.name])
                if failed:
                    unfinished.add(setting.name)
                    logger.warning(
                        "%s: %d of %d trajectories failed around the model or were not judged; the same command again "
                        "asks their questions anew",
                        setting.name, failed, len(everything[setting.name]),
                    )  # fmt: skip
        if trainer.is_global_zero and trainer.state.fn is TrainerFn.TESTING:
            self._write_results(trainer, everything, figures, skipped)
        for setting in self.settings if trainer.is_global_zero else ():  # last: until then it can go on
            folder = self._folder(trainer, module, setting)
            done = setting.name not in unfinished and (not self._is_look or setting.name in self._finished)
            write_state(folder, self._identity_of(setting), finished=done)

    def _write_results(
        self,
        trainer: pl.Trainer,
        everything: Mapping[str, Sequence[Outcome]],
        figures: Mapping[str, Evaluated],
        skipped: Sequence[RowProblem],
    ) -> None:
        root = Path(trainer.default_root_dir)
        config = root / "test_config.yaml"
        about = self._identity | {
            "settings": [asdict(setting) for setting in self.settings],
            "data": _describe_data(trainer, skipped),
            "run": describe_run(),
            "config": config.read_text() if config.is_file() else None,
        }
        pairs = tool_pairs(everything, self._without_tool())
        grids = write_results(root / "eval", self.prefix, figures, pairs, about, skipped_note(skipped))
        print_grids(grids, after=f"written to {root / 'eval'}/{self.prefix}results.json, .md and .png")

    def _without_tool(self) -> dict[str, str]:
        """By the name of a setting with the tool, that of the same without it."""
        bare = {replace(setting, name="setting"): setting.name for setting in self.settings}
        return {
            name: bare[replace(setting, tool=False)]
            for setting, name in bare.items()
            if setting.tool and replace(setting, tool=False) in bare
        }

    def _folder(self, trainer: pl.Trainer, module: PolicyModule, setting: EvaluationConfig) -> Path:
        """`eval/<prefix><name>`; a validation says so, in the midst of training by its iteration."""
        when = {
            TrainerFn.FITTING: f"iteration{module.iteration:06d}_",
            TrainerFn.VALIDATING: "validation_",
        }.get(trainer.state.fn, "")  # type: ignore[arg-type]
        return Path(trainer.default_root_dir) / "eval" / f"{self.prefix}{when}{setting.name}"


def _describe_data(trainer: pl.Trainer, skipped: Sequence[RowProblem]) -> dict[str, Any]:
    """The files that the questions came from, by path, and what of them could not be used."""
    files = getattr(trainer.datamodule, "eval_files", [])  # type: ignore[attr-defined]
    rows = [{"file": str(row.file), "row": row.row, "kind": row.kind, "message": row.message} for row in skipped]
    return {"files": {str(path): fingerprint(Path(path)) for path in files}, "skipped": rows}


def gather_skipped(trainer: pl.Trainer) -> list[RowProblem]:
    """Rows of the evaluation's files that some rank could not use, each once, in order."""
    problems = getattr(getattr(trainer, "datamodule", None), "skipped", None)
    found = gather_lists(list(problems.problems) if problems is not None else [])
    return sorted({(row.file, row.row): row for row in found}.values(), key=lambda row: (row.file, row.row))


def skipped_note(skipped: Sequence[RowProblem]) -> str:
    """What a table says of them; empty where there are none."""
    kinds = Counter(row.kind for row in skipped)
    listed = ", ".join(f"{count} x {kind}" for kind, count in kinds.most_common())
    return f"{len(skipped)} rows of the files could not be used and count nowhere: {listed}." if skipped else ""
