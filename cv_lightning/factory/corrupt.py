"""`data corrupt`: a benchmark in turned and corrupted versions, written as an RL file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from cv_lightning.data.benchmarks import task_files
from cv_lightning.data.corruptions import CorruptionConfig, apply_variant
from cv_lightning.data.rows import ReaderConfig, RowError
from cv_lightning.data.writers import write_task_parquet
from cv_lightning.factory.build_files import Show
from cv_lightning.ranges import NonNegativeInt, check_ranges
from cv_lightning.types import Task


@dataclass(frozen=True, kw_only=True)
class Corrupt:
    """A benchmark to turn and corrupt."""

    files: list[str]
    """RL files, or those of a public benchmark (`reader.format`)."""
    out: Path
    """Parquet file to write; boxes are in pixels of the images that it holds (`bbox_frame: given`)."""
    suite: CorruptionConfig = field(default_factory=CorruptionConfig)
    """Orientations, corruptions and severities."""
    reader: ReaderConfig = field(default_factory=ReaderConfig)
    """How the files are read: their format, frame of their boxes, folder of images."""
    limit: NonNegativeInt = 0
    """Number of tasks, the first ones of the files; 0: all."""
    split: str = "test"
    """Value of `extra_info.split` in every row."""

    def __post_init__(self) -> None:
        if self.out.suffix != ".parquet":
            raise ValueError(f"--out {self.out}: an RL file ends in .parquet")
        check_ranges(self)


def write_corrupted(config: Corrupt, show: Show | None = None) -> dict[str, int]:
    """Write all tasks in all their combinations.

    Args:
        config: Files and combinations.
        show: Called with the number of tasks done, and of all.

    Returns:
        Number of tasks by name of the combination.

    Raises:
        DataError: A file cannot be read, or has no usable row.
    """
    tasks = task_files(config.files, config.reader)
    count = min(len(tasks), config.limit or len(tasks))
    counts: Counter[str] = Counter()

    def corrupted() -> Iterator[Task]:
        for position in range(count):
            try:
                task = tasks.row(position)
            except RowError:
                continue  # `tasks.problems` lists it
            for variant in config.suite.variants_at(position):
                counts[variant.name] += 1
                yield apply_variant(task, variant, config.suite.seed)
            if show is not None:
                show(position + 1, count, "")

    write_task_parquet(config.out, corrupted(), config.split)
    return dict(counts)
