"""What a benchmark and a metric are: the two classes that a user brings by `class_path` in `data.reader`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cv_lightning.types import Box


class Metric(ABC):
    """Scores an answer as a benchmark's own code does.

    Its attributes are the arguments of its constructor, as JSON values: they are stored with every task, so that an
    evaluation can be recounted from its trajectories.
    """

    @abstractmethod
    def score(self, answer: str, metadata: Mapping[str, Any]) -> float:
        """Score in [0, 1].

        Args:
            answer: What was extracted from the response.
            metadata: Of the task: `accepted_answers`, a list of texts, and what the benchmark added.
        """

    def spec(self) -> dict[str, Any]:
        """Class path and arguments, as a config names them and a task stores them."""
        return {"class_path": f"{type(self).__module__}.{type(self).__qualname__}", "init_args": dict(vars(self))}

    def __repr__(self) -> str:
        """The same in every process: what an evaluation stores, and compares when it is resumed."""
        return str(self.spec())


def scored_by(metric: str | Metric, answers: Sequence[str]) -> dict[str, Any]:
    """What a task's metadata says of its metric, for `evaluation.scoring`."""
    named = metric.spec() if isinstance(metric, Metric) else metric
    return {"metric": named, "accepted_answers": list(answers)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What a row says."""

    text: str
    images: Sequence[Any]
    """Image cells, as `image_cells` reads them."""
    answers: list[str]
    """Any of them is right; the first is the ground truth."""
    metric: str | Metric | None = None
    """Name in `evaluation.scoring`, or a metric; None: the project's rule, and the judge where there is one."""
    category: str = ""
    box: Box | None = None
    """Where the evidence is, in pixels of the first image."""
    metadata: dict[str, Any] = field(default_factory=dict)
    """JSON values that the metric reads, or that results are looked up by."""


class Benchmark(ABC):
    """The files of one benchmark: what their rows hold, and what a row asks."""

    needed: tuple[str, ...] = ()
    """Columns that every row has."""
    optional: tuple[str, ...] = ()
    """Columns that are read where they are there."""

    @abstractmethod
    def question(self, row: Mapping[str, Any], folder: Path) -> Question:
        """What a row asks. A KeyError, TypeError, ValueError, AttributeError or IndexError skips the row.

        Args:
            row: Column to value; what is missing is None.
            folder: Folder that the row's image paths start from.
        """

    def rows(self, path: Path) -> Sequence[Mapping[str, Any]] | None:
        """The rows of a file; None: it is a table (.parquet, .csv, .tsv, .json, .jsonl) with a row a question."""
        return None

    def __repr__(self) -> str:
        """The same in every process: what an evaluation stores, and compares when it is resumed."""
        settings = ", ".join(f"{name}={value!r}" for name, value in sorted(vars(self).items()))
        return f"{type(self).__module__}.{type(self).__qualname__}({settings})"
