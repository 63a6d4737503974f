"""Rows of files: read one by one, in a shuffled order that is cheap to read, the unusable ones counted by kind.

Opening files reads no more than each one's first usable row, so that training starts at once whatever their size. A
row that cannot be used is met when its turn comes: it is counted, listed by number, and another takes its place.
"""

from __future__ import annotations

import logging
import math
import os
import random
import threading
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

from cv_lightning.data.benchmark import Benchmark, Metric
from cv_lightning.types import DataError

logger = logging.getLogger(__name__)

Row = TypeVar("Row")

LISTED_ROWS = 20
"""Rows of a kind of problem that a message lists; `RowProblems` knows them all."""
NEIGHBOURS = 32
"""Rows before and behind an unusable one, in the order of reading, that may take its place: they are in memory."""
MAX_THREADS = 8


class RowError(DataError):
    """A row cannot be used; `kind` groups equal problems.

    Args:
        kind: short name, the same for every row with this problem.
        message: what is wrong in this row, at which key, and what to do.
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


def check_text(text: str, key: str) -> str:
    """The text, which tokenizer, template and store can hold.

    Raises:
        RowError: it has NUL characters or halves of a surrogate pair.
    """
    if "\0" in text:
        raise RowError(
            "NUL character", f"{key} {text[:60]!r} has a NUL character; is it UTF-16 that was read as UTF-8?"
        )
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RowError("broken text", f"{key} {text[:60]!r} is not Unicode text ({error.reason})") from error
    return text


def is_missing(value: Any) -> bool:
    """True for None and for NaN, as pandas writes a value that is not there."""
    return value is None or (isinstance(value, float) and math.isnan(value))


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
    """The rows that were skipped so far, each once."""

    problems: list[RowProblem] = field(default_factory=list)
    _seen: set[tuple[Path, int]] = field(default_factory=set)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __contains__(self, place: tuple[Path, int]) -> bool:
        return place in self._seen

    def add(self, file: Path, row: int, error: RowError) -> None:
        """Keep a skipped row; the first of each kind is logged in full, and the counts at 10, 100, ... rows."""
        with self._lock:
            if (file, row) in self._seen:
                return
            self._seen.add((file, row))
            is_new = all(problem.kind != error.kind for problem in self.problems)
            self.problems.append(RowProblem(file, row, error.kind, str(error)))
            count = len(self.problems)
        if is_new:
            logger.warning("%s, row %d skipped (%s): %s", file, row, error.kind, error)
        if count >= 10 and str(count).strip("0") == "1":
            logger.warning("%d rows skipped so far:\n%s", count, self.summary())

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


MetricName = Literal["anls", "ocrbench", "chartqapro", "tirbench"]
FormatName = Literal[
    "codevision", "ocrbench", "chartqapro", "vstar", "hrbench", "tirbench", "vtcbench", "docvqa", "fields"
]


@dataclass(frozen=True, kw_only=True)
class FieldNames:
    """Columns of a benchmark of format `fields`."""

    question: str = "question"
    answer: str = "answer"
    """One answer, or a list of which any is right."""
    image: str = "image"
    """Bytes, a path, base64 text, or a list of these."""
    options: str = ""
    """A list of options, lettered in the prompt; the answer is then a letter. Empty: none."""
    category: str = ""
    """What results are split by; empty: nothing."""
    metric: MetricName | None = None
    """The benchmark's own metric; null: the project's rule, and the judge where there is one."""


@dataclass(frozen=True, kw_only=True)
class ReaderConfig:
    """How files of tasks and conversations are read."""

    format: FormatName | Benchmark = "codevision"
    """Of files of tasks: the RL and benchmark format of CodeVision, a public benchmark's own, plain columns under the
    names in `fields`, or a `Benchmark` of your own by `class_path`."""
    fields: FieldNames = field(default_factory=FieldNames)
    """For format `fields`."""
    metric: MetricName | Metric | None = None
    """What scores the answers instead of the format's own metric: a name, or a `Metric` of your own by `class_path`."""
    data_source: str = ""
    """What metrics and published results call the data set; empty: what the file says."""
    bbox_frame: Literal["given", "upright"] = "given"
    """Whether boxes are in pixels of the image as given, or of the upright image before its transform; `data check`
    says which fits."""
    prompt: Literal["given", "own"] = "given"
    """given: messages of the file as they stand; own: the agent's prompt around the bare question."""
    system: Literal["given", "own"] = "given"
    """given: a system message of the file stays, and the agent's is put in where there is none; own: the agent's
    replaces it."""
    image_folder: str = ""
    """Folder that relative image paths start from; empty: the folder of the file."""
    num_threads: int = 0
    """Threads that decode the images of a batch; 0: one a core, at most 8."""

    def __post_init__(self) -> None:
        if self.num_threads < 0:
            raise ValueError(f"--data.reader.num_threads {self.num_threads}: a number of threads, or 0 for one a core")


class RowFiles(ABC, Generic[Row]):
    """Rows of files by index; `problems` lists those that were skipped so far.

    Two views: `take` goes through all rows in an order and puts a neighbour in the place of an unusable one (training,
    which needs no look at the whole set first); `len` and `row` know the usable rows only (evaluation, where each row
    counts once), look at every row's texts and image headers when first asked, and never replace one.

    Args:
        paths: the files.
        config: how they are read.
    """

    def __init__(self, paths: Sequence[Path], config: ReaderConfig) -> None:
        self.paths = list(paths)
        self.config = config
        self.problems = RowProblems()

    @property
    @abstractmethod
    def num_rows(self) -> int:
        """Rows of all files, unusable ones too."""

    @abstractmethod
    def rows_of_file(self, file: int) -> range:
        """Indices of a file's rows."""

    @abstractmethod
    def place(self, index: int) -> tuple[Path, int]:
        """File of a row, and its number there, from 0."""

    @abstractmethod
    def read(self, index: int, *, decode: bool = True) -> Row:
        """One row; with `decode` False no more than the headers of its images.

        Raises:
            RowError: it cannot be used.
        """

    @abstractmethod
    def order(self, rng: random.Random) -> list[int]:
        """All rows in a shuffled order that is cheap to read."""

    # ---------------------------------------------------------------------------------------- all rows, in an order
    def take(self, order: Sequence[int], at: int) -> Row:
        """The row at a place of an order, or if it cannot be used one near it; the same for the same arguments.

        Raises:
            DataError: no row of the order can be used.
        """
        for index in _candidates(order, at):
            try:
                return self.read(index)
            except RowError as error:
                self.problems.add(*self.place(index), error)
        raise DataError(f"no usable row:\n{self.problems.summary()}")

    def take_many(self, places: Sequence[tuple[Sequence[int], int]]) -> list[Row]:
        """`take` for several (order, place), images decoded by a few threads."""
        if len(places) < 2 or self._num_threads < 2:
            return [self.take(order, at) for order, at in places]
        return list(self._pool.map(lambda place: self.take(*place), places))

    @property
    def _num_threads(self) -> int:
        return self.config.num_threads or min(MAX_THREADS, len(os.sched_getaffinity(0)))

    @cached_property
    def _pool(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(self._num_threads, thread_name_prefix="decode")

    def check_each_file(self) -> None:
        """Read each file's first usable row.

        Raises:
            DataError: a file has none; says why.
        """
        for file, path in enumerate(self.paths):
            rows = self.rows_of_file(file)
            if not rows:
                raise DataError(f"{path}: no rows at all")
            if not any(self._is_usable(index, decode=True) for index in rows):
                raise DataError(f"{path}: no usable row:\n{self.problems.summary()}")

    def _is_usable(self, index: int, *, decode: bool) -> bool:
        try:
            self.read(index, decode=decode)
        except RowError as error:
            self.problems.add(*self.place(index), error)
            return False
        return True

    # ---------------------------------------------------------------------------------------- the usable rows
    @cached_property
    def _usable(self) -> list[int]:
        rows = (index for index in range(self.num_rows) if self.place(index) not in self.problems)
        usable = [index for index in rows if self._is_usable(index, decode=False)]
        self.problems.report(len(usable))
        return usable

    def __len__(self) -> int:
        return len(self._usable)

    def row(self, position: int) -> Row:
        """The usable row at a position.

        Raises:
            RowError: its pixels are broken behind a good header; it is counted as a problem.
        """
        index = self._usable[position]
        try:
            return self.read(index)
        except RowError as error:
            self.problems.add(*self.place(index), error)
            raise


class ListedRowFiles(RowFiles[Row]):
    """Row files of which every one is opened at once and knows its length."""

    def _open(self, sizes: Sequence[int]) -> None:
        """Number the rows and read one of each file; the end of a subclass's constructor.

        Args:
            sizes: rows of each file.

        Raises:
            DataError: none of a file's rows can be used.
        """
        self._starts = [0, *accumulate(sizes)]
        self.check_each_file()

    @property
    def num_rows(self) -> int:
        """Rows of all files, unusable ones too."""
        return self._starts[-1]

    def rows_of_file(self, file: int) -> range:
        """Indices of a file's rows."""
        return range(self._starts[file], self._starts[file + 1])

    def locate(self, index: int) -> tuple[int, int]:
        """Number of a row's file, and its number there, both from 0."""
        file = bisect_right(self._starts, index) - 1
        return file, index - self._starts[file]

    def place(self, index: int) -> tuple[Path, int]:
        """File of a row, and its number there, from 0."""
        file, number = self.locate(index)
        return self.paths[file], number

    def order(self, rng: random.Random) -> list[int]:
        """All rows, shuffled."""
        return rng.sample(range(self.num_rows), self.num_rows)


def _candidates(order: Sequence[int], at: int) -> Iterator[int]:
    """The row itself, its neighbours in a drawn order (so that a run of bad rows is not all replaced by one), all."""
    yield order[at]
    near = range(max(0, at - NEIGHBOURS), min(len(order), at + NEIGHBOURS))
    yield from (order[place] for place in random.Random(f"{order[at]}/{at}").sample(near, len(near)))
    yield from (order[(at + offset) % len(order)] for offset in range(len(order)))


def expand_files(files: Sequence[str | Path], flag: str) -> list[Path]:
    """The files that exist.

    Raises:
        DataError: no file named, a folder, or one that does not exist; names the flag.
    """
    paths = [Path(file).expanduser() for file in files]
    if folders := [str(path) for path in paths if path.is_dir()]:
        raise DataError(f"{flag}: {', '.join(folders)} is a folder; name its files")
    missing = [str(path) for path in paths if not path.is_file()]
    if missing or not paths:
        raise DataError(f"{flag}: {'no such file: ' + ', '.join(missing) if missing else 'no file given'}")
    return paths


def unique_names(paths: Sequence[Path]) -> list[str]:
    """A short name for each file, the start of its rows' ids: its stem, with its folder's where stems are equal."""
    for depth in range(1, max((len(path.parts) for path in paths), default=1) + 1):
        names = [".".join([*path.parts[-depth:-1], path.stem]) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [f"{path.stem}.{number}" for number, path in enumerate(paths)]  # the same file given twice
