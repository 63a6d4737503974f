"""`Benchmark` and `Metric`, the two base classes that a user extends and names by `class_path` in `data.reader`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cv_lightning.types import Box


class Metric(ABC):
    """Scores an answer as a benchmark's own code does.

    Its attributes are the arguments of its constructor, as JSON values. They are stored with every task, so that an
    evaluation can be scored again from its trajectories.
    """

    @abstractmethod
    def score(self, answer: str, metadata: Mapping[str, Any]) -> float:
        """Score in [0, 1].

        Args:
            answer: The answer extracted from the response.
            metadata: The task's metadata: `accepted_answers`, a list of texts, and what the benchmark added.
        """

    def spec(self) -> dict[str, Any]:
        """Class path and arguments, in the form of a config; stored with a task."""
        return {"class_path": f"{type(self).__module__}.{type(self).__qualname__}", "init_args": dict(vars(self))}

    def __repr__(self) -> str:
        """The same text in every process, because a resumed evaluation compares it with the stored one."""
        return str(self.spec())


def scored_by(metric: str | Metric, answers: Sequence[str]) -> dict[str, Any]:
    """The entries of a task's metadata that name its metric, for `evaluation.scoring`."""
    named = metric.spec() if isinstance(metric, Metric) else metric
    return {"metric": named, "accepted_answers": list(answers)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """The content of a row."""

    text: str
    images: Sequence[Any]
    """Image cells in the forms that `image_cells` reads."""
    answers: list[str]
    """Accepted answers; the first is the ground truth."""
    metric: str | Metric | None = None
    """Name in `evaluation.scoring`, or a metric; None: the project's rule, and the judge if there is one."""
    category: str = ""
    box: Box | None = None
    """Box of the evidence, in pixels of the first image."""
    metadata: dict[str, Any] = field(default_factory=dict)
    """JSON values that the metric reads, or that results are looked up by."""


class Benchmark(ABC):
    """Reads the files of one benchmark."""

    needed: tuple[str, ...] = ()
    """Columns that every row must have."""
    optional: tuple[str, ...] = ()
    """Columns that are read if they exist."""

    @abstractmethod
    def question(self, row: Mapping[str, Any], folder: Path) -> Question:
        """The question of a row. A KeyError, TypeError, ValueError, AttributeError or IndexError skips the row.

        Args:
            row: Column to value; a missing value is None.
            folder: Folder that the row's image paths start from.
        """

    def rows(self, path: Path) -> Sequence[Mapping[str, Any]] | None:
        """The rows of a file; None: it is a table (.parquet, .csv, .tsv, .json, .jsonl) with one question per row."""
        return None

    def __repr__(self) -> str:
        """The same text in every process, because a resumed evaluation compares it with the stored one."""
        settings = ", ".join(f"{name}={value!r}" for name, value in sorted(vars(self).items()))
        return f"{type(self).__module__}.{type(self).__qualname__}({settings})"
