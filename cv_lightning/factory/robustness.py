"""`data corrupt`: a benchmark in turned and corrupted forms, written as an RL file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from cv_lightning.data.benchmarks import task_files
from cv_lightning.data.corruptions import CorruptionConfig, CorruptionSuite
from cv_lightning.data.rows import ReaderConfig, RowError
from cv_lightning.data.writers import write_task_parquet
from cv_lightning.types import Task


@dataclass(frozen=True, kw_only=True)
class Corrupt:
    """A benchmark to turn and corrupt."""

    files: list[str]
    """RL files, or those of a public benchmark (`reader.format`)."""
    out: Path
    """Parquet file to write; boxes are in pixels of the pictures that it holds (`bbox_frame: given`)."""
    suite: CorruptionConfig = field(default_factory=CorruptionConfig)
    """Which orientations, corruptions and severities."""
    reader: ReaderConfig = field(default_factory=ReaderConfig)
    """How the files are read: their format, frame of their boxes, folder of images."""
    limit: int = 0
    """Tasks of the files that are taken, the first ones; 0: all."""
    split: str = "test"
    """What the rows' `split` says."""

    def __post_init__(self) -> None:
        if self.out.suffix != ".parquet":
            raise ValueError(f"--out {self.out}: an RL file ends in .parquet")
        if self.limit < 0:
            raise ValueError(f"--limit {self.limit} must not be negative")


def write_corrupted(config: Corrupt, show: Callable[[int, int], None] | None = None) -> dict[str, int]:
    """Write the forms of all tasks.

    Args:
        config: what is written.
        show: called with the number of tasks that are done, and of all.

    Returns:
        How many there are of each form, by its name.

    Raises:
        DataError: a file cannot be read, or no row of it used.
    """
    tasks = task_files(config.files, config.reader)
    count = min(len(tasks), config.limit or len(tasks))
    suite = CorruptionSuite(config.suite)
    counts: Counter[str] = Counter()

    def forms() -> Iterator[Task]:
        for position in range(count):
            try:
                task = tasks.row(position)
            except RowError:
                continue  # counted among the problems of `tasks`
            for form in suite.tasks_of(task, position):
                shown = form.metadata
                level = f"_{shown['severity']}" if shown["severity"] else ""
                counts[f"{shown['orientation']}/{shown['corruption']}{level}"] += 1
                yield form
            if show is not None:
                show(position + 1, count)

    config.out.parent.mkdir(parents=True, exist_ok=True)
    write_task_parquet(config.out, forms(), config.split)
    return dict(counts)
