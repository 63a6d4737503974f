"""Rows of a file that cannot be used: counted by kind, listed by index, skipped, unless all are bad."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from cv_lightning.types import DataError

logger = logging.getLogger(__name__)

LISTED_ROWS = 20
"""Rows of a kind of problem that a message lists; `RowProblems` knows them all."""


class RowError(DataError):
    """A row cannot be used; `kind` groups equal problems.

    Args:
        kind: short name, the same for every row with this problem.
        message: what is wrong in this row, at which key, and what to do.
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


@dataclass(frozen=True, slots=True)
class RowProblem:
    """Why one row was skipped."""

    file: Path
    row: int
    """Index in the file, from 0."""
    kind: str
    message: str


@dataclass
class RowProblems:
    """The rows that were skipped so far."""

    problems: list[RowProblem] = field(default_factory=list)

    def add(self, file: Path, row: int, error: RowError) -> None:
        """Keep a skipped row; the first of each kind is logged in full."""
        if all(problem.kind != error.kind for problem in self.problems):
            logger.warning("%s, row %d skipped (%s): %s", file, row, error.kind, error)
        self.problems.append(RowProblem(file, row, error.kind, str(error)))

    def summary(self) -> str:
        """One line a kind: how many, which rows, and what the first one's problem is."""
        lines = []
        for kind in dict.fromkeys(problem.kind for problem in self.problems):
            same = [problem for problem in self.problems if problem.kind == kind]
            listed = ", ".join(str(problem.row) for problem in same[:LISTED_ROWS])
            more = ", ..." if len(same) > LISTED_ROWS else ""
            lines.append(f"{len(same)} x {kind}, rows {listed}{more} (first, in {same[0].file}: {same[0].message})")
        return "\n".join(lines)

    def report(self, num_usable: int) -> None:
        """Log what was skipped.

        Raises:
            DataError: nothing is left.
        """
        if num_usable == 0:
            raise DataError(f"no usable row:\n{self.summary()}" if self.problems else "no rows at all")
        if self.problems:
            skipped = len(self.problems)
            logger.warning("%d of %d rows skipped:\n%s", skipped, skipped + num_usable, self.summary())


@dataclass(frozen=True, kw_only=True)
class ReaderConfig:
    """How files of tasks and conversations are read."""

    bbox_frame: Literal["given", "upright"] = "given"
    """Whether boxes are in pixels of the image as given, or of the upright image before its transform."""
    prompt: Literal["given", "own"] = "given"
    """given: messages of the file as they stand; own: the agent's prompt around the bare question."""
    image_folder: str = ""
    """Folder that relative image paths start from; empty: the folder of the file."""


def expand_files(files: Sequence[str], flag: str) -> list[Path]:
    """The files that exist.

    Raises:
        DataError: no file named, or one that does not exist; names the flag.
    """
    paths = [Path(file).expanduser() for file in files]
    missing = [str(path) for path in paths if not path.is_file()]
    if missing or not paths:
        raise DataError(f"{flag}: {'no such file: ' + ', '.join(missing) if missing else 'no file given'}")
    return paths
