"""W&B: metrics over iterations, tables of trajectories with their pictures, artifacts on request.

Everything goes under one x axis, `iteration`. An iteration is logged once: what a resumed run does anew, because it was
killed after its last checkpoint, is there already.
"""

from __future__ import annotations

import hashlib
import json
from argparse import Namespace
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_only
from PIL import Image

from cv_lightning.files import write_text
from cv_lightning.trajectory import GroupRecord, TrajectoryRecord, read_groups, to_record
from cv_lightning.trajectory.reader import flat_row
from cv_lightning.types import DataError, Group

X_AXIS = "iteration"
PROGRESS_FILE = "wandb_logged.json"
"""In the run's folder: id of the W&B run and the last iteration whose metrics it has."""
COLUMNS = (
    "iteration", "task_id", "kind", "required_transforms", "question", "ground_truth", "answer", "correct", "end_state",
    "turns", "tool_calls", "operations", "code", "text", "reward", "advantage",
)  # fmt: skip
"""Of `to_dataframe`; reward components and pictures follow."""


class WandbRun(WandbLogger):
    """Lightning's W&B logger with one x axis, in the run's folder.

    Args:
        project: of the run.
        name: of the run; W&B makes one up by default.
        entity: team or user.
        group: what runs are grouped by.
        tags: of the run.
        id: of the run to log to; by default a new one, or the one that a resumed run had.
        mode: offline writes to the run's folder, for `wandb sync`; by default what WANDB_MODE says.
        table_every: iterations from one table of training trajectories to the next; 0: none.
        table_rows: trajectories in a table, of training or of an evaluation.
        table_images: pictures a trajectory, the last one always among them.
        table_image_px: longest side of a picture.
        log_checkpoints: upload the last checkpoint and the exported model as artifacts at the end of training.
        log_evaluations: upload every evaluation's folder, trajectories and pictures included, as an artifact.

    Raises:
        ValueError: a negative number.
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
        table_every: int = 10,
        table_rows: int = 32,
        table_images: int = 4,
        table_image_px: int = 512,
        log_checkpoints: bool = False,
        log_evaluations: bool = False,
    ) -> None:
        if table_every < 0 or table_rows < 1 or table_images < 1 or table_image_px < 16:
            raise ValueError(
                "trainer.logger.init_args: table_every must not be negative, table_rows and table_images at least 1, "
                f"table_image_px at least 16; got {table_every}, {table_rows}, {table_images}, {table_image_px}"
            )
        super().__init__(name=name, project=project, id=id, entity=entity, group=group, tags=tags, mode=mode)
        del self._wandb_init["anonymous"]  # W&B warns about it, even unset
        self.table_every = table_every
        self.table_rows = table_rows
        self.table_images = table_images
        self.table_image_px = table_image_px
        self.log_checkpoints = log_checkpoints
        self.log_evaluations = log_evaluations
        self.iteration = 0
        """Of the last metrics."""
        self._logged = 0
        """Iterations that an earlier start of the same run has logged."""

    def write_to(self, folder: str | Path) -> None:
        """Keep W&B's files in the run's folder; before the run starts."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        self._save_dir = self._wandb_init["dir"] = str(folder)

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The W&B run, begun when first asked for."""
        is_new = self._experiment is None
        run = super().experiment
        if is_new:
            run.define_metric(X_AXIS)
            run.define_metric("*", step_metric=X_AXIS, step_sync=True, overwrite=True)
            self._logged = self._read_progress().get(run.id, 0)
        return run

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log one row, under the iteration that it names or, like an evaluation's, under the last one.

        Args:
            metrics: name to number.
            step: Lightning's own count of batches; W&B does not get it.
        """
        run = self.experiment
        is_training = X_AXIS in metrics
        if is_training:
            self.iteration = int(metrics[X_AXIS])
            if self.has(self.iteration):
                return
        row = {name: value for name, value in metrics.items() if name != "epoch"}
        run.log(row | {X_AXIS: self.iteration})
        if is_training:
            self._write_progress(run.id)

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace | None = None) -> None:
        """The run record hands over the whole config."""

    def after_save_checkpoint(self, checkpoint_callback: ModelCheckpoint) -> None:
        """`WandbTrajectories` uploads the last one, if asked to."""

    def table(self, rows: Sequence[TableRow]) -> Any:
        """A W&B table of trajectories."""
        import wandb

        components = sorted(
            {name for row in rows if row.trajectory.reward for name in row.trajectory.reward.components}
        )
        pictures = [f"image {number}" for number in range(self.table_images)]
        table = wandb.Table(columns=[*COLUMNS, *(f"reward/{name}" for name in components), *pictures])
        for row in rows:
            flat = flat_row(row.group, row.trajectory)
            images = [wandb.Image(image) for image in row.load(self.table_images, self.table_image_px)]
            padded = [*images, *[None] * (self.table_images - len(images))]
            table.add_data(
                *(flat[name] for name in COLUMNS), *(flat.get(f"reward/{name}") for name in components), *padded
            )
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
        """Upload a file or a folder as an artifact.

        Args:
            path: of either.
            name: after the run's id; W&B versions artifacts by name.
            kind: W&B's type of the artifact.
        """
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

    def _read_progress(self) -> dict[str, int]:
        try:
            found: dict[str, int] = json.loads(self._progress_path.read_text())
        except (OSError, ValueError):
            return {}
        return found

    def _write_progress(self, run_id: str) -> None:
        write_text(self._progress_path, json.dumps({run_id: self.iteration}))


class TableRow(NamedTuple):
    """A trajectory for a table."""

    group: GroupRecord
    trajectory: TrajectoryRecord
    pixels: Sequence[Callable[[], Image.Image]]
    """Give the original of every image."""

    def load(self, most: int, longest_px: int) -> list[Image.Image]:
        """The first pictures and always the last, small; one that is missing is left out."""
        wanted = [*self.pixels[: most - 1], self.pixels[-1]] if len(self.pixels) > most else list(self.pixels)
        found = []
        for pixels in wanted:
            try:
                picture = pixels().copy()
            except DataError:
                continue
            picture.thumbnail((longest_px, longest_px))
            found.append(picture)
        return found


def live_rows(groups: Sequence[Group], iteration: int) -> list[TableRow]:
    """Rows of groups in memory."""
    rows = []
    for group in groups:
        record = to_record(group, iteration)
        for trajectory, live in zip(record.trajectories, group.trajectories, strict=True):
            rows.append(TableRow(record, trajectory, [image.original.copy for image in live.images]))
    return rows


def stored_rows(folder: Path) -> list[TableRow]:
    """Rows of a store."""
    return [
        TableRow(group, trajectory, [image.load for image in trajectory.images])
        for group in read_groups(folder)
        for trajectory in group.trajectories
    ]


def stratified(rows: Iterable[TableRow], most: int) -> list[TableRow]:
    """At most `most` rows, taken from every outcome and combination of transforms in turn; repeatable."""
    strata: dict[tuple[bool | None, tuple[str, ...]], list[TableRow]] = {}
    for row in sorted(rows, key=_draw):
        correct = row.trajectory.reward.correct if row.trajectory.reward else None
        strata.setdefault((correct, row.group.task.required_transforms), []).append(row)
    queues = [strata[key] for key in sorted(strata, key=repr)]
    ranked = sorted((place, number) for number, queue in enumerate(queues) for place in range(len(queue)))
    return [queues[number][place] for place, number in ranked[:most]]


def _draw(row: TableRow) -> bytes:
    key = f"{row.group.iteration}/{row.group.task.id}/{row.trajectory.sample}"
    return hashlib.blake2b(key.encode("utf-8", "backslashreplace"), digest_size=8).digest()
