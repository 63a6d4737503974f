"""The W&B logger: metrics over iterations, tables of trajectories with their images, artifacts on request.

Everything is logged over one x axis, `iteration`, and an iteration is logged once: a run that was killed after its last
checkpoint repeats iterations when it is resumed, and W&B has those already.
"""

from __future__ import annotations

import hashlib
import json
from argparse import Namespace
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_only
from PIL import Image

from cv_lightning.files import write_text
from cv_lightning.ranges import NonNegativeInt, PositiveInt, Range, check_ranges
from cv_lightning.trajectory import pixels_of
from cv_lightning.trajectory.reader import flat_row
from cv_lightning.types import DataError, Group, Trajectory

X_AXIS = "iteration"
PROGRESS_FILE = "wandb_logged.json"
"""File in the run's folder with the id of the W&B run and the last iteration whose metrics it has."""
COLUMNS = (
    "iteration", "task_id", "kind", "required_transforms", "question", "ground_truth", "answer", "correct", "end_state",
    "turns", "tool_calls", "operations", "code", "text", "reward", "advantage",
)  # fmt: skip
"""Columns of `to_dataframe` in a table; reward components and images follow."""


class WandbRun(WandbLogger):
    """Lightning's W&B logger with one x axis, in the run's folder.

    Args:
        project: Name of the W&B project.
        name: Name of the run; W&B chooses one by default.
        entity: Team or user.
        group: Group of the run.
        tags: Tags of the run.
        id: Id of the run to log to; by default a new one, or the one that a resumed run had.
        mode: `offline` writes to the run's folder, for `wandb sync`; by default the value of WANDB_MODE.
        table_every: Iterations from one table of training trajectories to the next; 0 for no tables.
        table_rows: Trajectories in a table, of training or of an evaluation.
        table_images: Images of a trajectory in a table, always with the last one.
        table_image_px: Longest side of an image in a table.
        log_checkpoints: Upload the last checkpoint and the exported model as artifacts at the end of training.
        log_evaluations: Upload every evaluation's folder, trajectories and images included, as an artifact.

    Raises:
        ValueError: A table setting is out of range.
    """

    def __init__(
        self,
        project: str = "cv_lightning",
        name: str | None = None,
        entity: str | None = None,
        group: str | None = None,
        tags: list[str] | None = None,
        id: str | None = None,
        mode: Literal["online", "offline", "disabled"] | None = None,
        table_every: NonNegativeInt = 10,
        table_rows: PositiveInt = 32,
        table_images: PositiveInt = 4,
        table_image_px: Annotated[int, Range(at_least=16)] = 512,
        log_checkpoints: bool = False,
        log_evaluations: bool = False,
    ) -> None:
        check_ranges(WandbRun.__init__, "trainer.logger.init_args", locals())
        super().__init__(name=name, project=project, id=id, entity=entity, group=group, tags=tags, mode=mode)
        del self._wandb_init["anonymous"]  # W&B warns about it, even unset
        self.table_every = table_every
        self.table_rows = table_rows
        self.table_images = table_images
        self.table_image_px = table_image_px
        self.log_checkpoints = log_checkpoints
        self.log_evaluations = log_evaluations
        self.iteration = 0
        """Iteration of the last metrics."""
        self._logged = 0
        """Last iteration that an earlier start of the same run has logged."""

    def write_to(self, folder: str | Path) -> None:
        """Keep W&B's files in the run's folder; call it before the run starts."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        self._save_dir = self._wandb_init["dir"] = str(folder)

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The W&B run, started on first use."""
        is_new = self._experiment is None
        run = super().experiment
        if is_new:
            run.define_metric(X_AXIS)
            run.define_metric("*", step_metric=X_AXIS, step_sync=True, overwrite=True)
            with suppress(OSError, ValueError):
                self._logged = json.loads(self._progress_path.read_text()).get(run.id, 0)
        return run

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log a row under its iteration, or under the last one if it names none; `step` is not logged."""
        run = self.experiment
        is_training = X_AXIS in metrics
        if is_training:
            self.iteration = int(metrics[X_AXIS])
            if self.has(self.iteration):
                return
        row = {name: value for name, value in metrics.items() if name != "epoch"}
        run.log(row | {X_AXIS: self.iteration})
        if is_training:
            write_text(self._progress_path, json.dumps({run.id: self.iteration}))

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace | None = None) -> None:
        """Log nothing: `RunRecord` hands over the whole config."""

    def table(self, rows: Sequence[TableRow]) -> Any:
        """A W&B table of trajectories."""
        import wandb

        components = sorted(
            {name for row in rows if row.trajectory.reward for name in row.trajectory.reward.components}
        )
        names = [*COLUMNS, *(f"reward/{name}" for name in components)]
        table = wandb.Table(columns=[*names, *(f"image {number}" for number in range(self.table_images))])
        for row in rows:
            flat = flat_row(row.group, row.trajectory)
            images = [wandb.Image(image) for image in row.load(self.table_images, self.table_image_px)]
            table.add_data(*map(flat.get, names), *images, *[None] * (self.table_images - len(images)))
        return table

    @rank_zero_only
    def log_rows(self, key: str, rows: Sequence[TableRow]) -> None:
        """Log a table."""
        if rows:
            self.experiment.log({key: self.table(rows), X_AXIS: self.iteration})

    def has(self, iteration: int) -> bool:
        """True if an earlier start of the same run has logged the iteration."""
        return iteration <= self._logged

    @rank_zero_only
    def log_folder(self, path: Path, name: str, kind: str) -> None:
        """Upload a file or a folder as an artifact of a W&B type, named after the run's id and `name`."""
        import wandb

        artifact = wandb.Artifact(f"{self.experiment.id}-{name}", kind, metadata={X_AXIS: self.iteration})
        if path.is_dir():
            artifact.add_dir(str(path))
        else:
            artifact.add_file(str(path))
        self.experiment.log_artifact(artifact)

    @property
    def _progress_path(self) -> Path:
        return Path(self._save_dir or ".", PROGRESS_FILE)


class TableRow(NamedTuple):
    """One trajectory in a table."""

    group: Group
    trajectory: Trajectory

    def load(self, most: int, longest_px: int) -> list[Image.Image]:
        """The first images and always the last, scaled down; a missing one is left out."""
        images = self.trajectory.images
        found = []
        for image in [*images[: most - 1], images[-1]] if len(images) > most else images:
            with suppress(DataError):
                pixels = pixels_of(image.original)
                pixels.thumbnail((longest_px, longest_px))
                found.append(pixels)
        return found


def rows_of(groups: Iterable[Group]) -> list[TableRow]:
    """One row per trajectory of groups in memory or in a store."""
    return [TableRow(group, trajectory) for group in groups for trajectory in group.trajectories]


def stratified(rows: Iterable[TableRow], most: int) -> list[TableRow]:
    """At most `most` rows, taken in turn from each combination of outcome and transforms; repeatable."""
    taken: Counter[str] = Counter()
    ranked: list[tuple[int, str, TableRow]] = []
    for row in sorted(rows, key=_draw):
        correct = row.trajectory.reward.correct if row.trajectory.reward else None
        stratum = repr((correct, row.group.task.required_transforms))
        ranked.append((taken[stratum], stratum, row))
        taken[stratum] += 1
    return [row for *_, row in sorted(ranked, key=lambda entry: entry[:2])[:most]]


def _draw(row: TableRow) -> bytes:
    key = f"{row.group.iteration}/{row.group.task.id}/{row.trajectory.sample}"
    return hashlib.blake2b(key.encode("utf-8", "backslashreplace"), digest_size=8).digest()
