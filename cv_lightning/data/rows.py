"""Rows of files: read one by one, in a shuffled order that is cheap to read; unusable rows are counted by kind.

Opening files reads only the first usable row of each, so that training starts at once whatever their size. An unusable
row is detected when it is read: it is counted and listed by number, and another row takes its place.
"""

from __future__ import annotations

import logging
import math
import os
import random
import threading
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

from cv_lightning import hub
from cv_lightning.data.benchmark import Benchmark, Metric
from cv_lightning.ranges import NonNegativeInt, check_ranges
from cv_lightning.types import DataError

logger = logging.getLogger(__name__)

Row = TypeVar("Row")

LISTED_ROWS = 20
"""Rows of a kind of problem that a message lists; `RowProblems` knows them all."""
NEIGHBOURS = 32
"""Rows before and after an unusable one, in the order of reading, that may replace it: they are in memory."""
MAX_THREADS = 8


class RowError(DataError):
    """A row cannot be used; `kind` groups equal problems.

    Args:
        kind: Short name, the same for every row with this problem.
        message: What is wrong in this row, at which key, and what to do.
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


def check_text(text: str, key: str) -> str:
    """The text, if tokenizer, template and store can hold it.

    Raises:
        RowError: It has NUL characters or unpaired surrogates.
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
    """True for None and for NaN, which pandas writes for a missing value."""
    return value is None or (isinstance(value, float) and math.isnan(value))


@dataclass(frozen=True, slots=True)
class RowProblem:
    """A skipped row and the reason."""

    file: Path
    row: int
    """Index in the file, from 0."""
    kind: str
    message: str


@dataclass
class RowProblems:
    """The rows that were skipped so far, each listed once."""

    problems: list[RowProblem] = field(default_factory=list)
    _seen: set[tuple[Path, int]] = field(default_factory=set)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __contains__(self, place: tuple[Path, int]) -> bool:
        return place in self._seen

    def add(self, file: Path, row: int, error: RowError) -> None:
        """List a skipped row; the first of each kind is logged in full, the summary at 10, 100, ... rows."""
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
        """One line per kind: how many, which rows, and the first one's message."""
        lines = []
        for kind in dict.fromkeys(problem.kind for problem in self.problems):
            same = [problem for problem in self.problems if problem.kind == kind]
            listed = ", ".join(str(problem.row) for problem in same[:LISTED_ROWS])
            more = ", ..." if len(same) > LISTED_ROWS else ""
            lines.append(f"{len(same)} x {kind}, rows {listed}{more} (first, in {same[0].file}: {same[0].message})")
        return "\n".join(lines)

    def report(self, num_usable: int) -> None:
        """Log the skipped rows.

        Raises:
            DataError: No usable row is left.
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
    """Names of the columns of a benchmark of format `fields`."""

    question: str = "question"
    """The question's text."""
    answer: str = "answer"
    """One answer, or a list of accepted answers."""
    image: str = "image"
    """Bytes, a path, base64 text, or a list of these."""
    options: str = ""
    """A list of options, lettered in the prompt; the answer is then a letter. Empty: no options."""
    category: str = ""
    """Results are split by this column; empty: they are not."""
    metric: MetricName | None = None
    """The benchmark's own metric; null: the project's rule, and the judge where there is one."""


@dataclass(frozen=True, kw_only=True)
class ReaderConfig:
    """How files of tasks and conversations are read."""

    format: FormatName | Benchmark = "codevision"
    """Format of task files: the RL and benchmark format of CodeVision, a public benchmark's own, plain columns under
    the names in `fields`, or a `Benchmark` of your own by `class_path`."""
    fields: FieldNames = field(default_factory=FieldNames)
    """Columns of format `fields`."""
    metric: MetricName | Metric | None = None
    """Metric that replaces the format's own: a name, or a `Metric` of your own by `class_path`."""
    data_source: str = ""
    """Name of the data set in metrics and published results; empty: the file's."""
    bbox_frame: Literal["given", "upright"] = "given"
    """Whether boxes are in pixels of the image as given, or of the upright image before its transform; `data check`
    reports which one fits."""
    prompt: Literal["given", "own"] = "given"
    """given: the file's messages, unchanged; own: the agent's prompt around the bare question."""
    system: Literal["given", "own"] = "given"
    """given: a system message of the file stays, and the agent's is added if there is none; own: the agent's replaces
    it."""
    image_folder: str = ""
    """Folder that relative image paths start from; empty: the folder of the file."""
    num_threads: NonNegativeInt = 0
    """Threads that decode the images of a batch; 0: one per core, at most 8."""

    def __post_init__(self) -> None:
        check_ranges(self, "data.init_args.reader")


class RowIndex:
    """Numbers of rows over several files, one file after another.

    Args:
        sizes: Rows of each file.
    """

    def __init__(self, sizes: Iterable[int]) -> None:
        self.starts = [0, *accumulate(sizes)]

    def __len__(self) -> int:
        return self.starts[-1]

    def locate(self, index: int) -> tuple[int, int]:
        """Number of a row's file, and the row's number in it, both from 0."""
        file = bisect_right(self.starts, index) - 1
        return file, index - self.starts[file]

    def rows_of(self, file: int) -> range:
        """Indices of a file's rows."""
        return range(self.starts[file], self.starts[file + 1])


class RowFiles(ABC, Generic[Row]):
    """Rows of files by index; `problems` lists those that were skipped so far.

    There are two views. Training (`take`) goes through all rows in an order and replaces an unusable one by a
    neighbour, so that it starts without reading the whole set. Evaluation (`len` and `row`) knows the usable rows only:
    it reads every row's texts and image headers first, because each row counts once, and never replaces one.

    Args:
        files: Paths of the files.
        config: How they are read.
        flag: Flag that names the files, for messages.

    Raises:
        DataError: A file does not exist.
    """

    def __init__(self, files: Sequence[str | Path], config: ReaderConfig, flag: str) -> None:
        self.paths = expand_files(files, flag)
        self.names = unique_names(self.paths)
        self.config = config
        self.problems = RowProblems()

    def _open(self, sizes: Iterable[int]) -> None:
        """Number the rows and read each file's first usable row; the last call of a subclass's constructor.

        Args:
            sizes: Rows of each file.

        Raises:
            DataError: A file has no usable row; the message says why.
        """
        self._index = RowIndex(sizes)
        for file, path in enumerate(self.paths):
            rows = self._index.rows_of(file)
            if not rows:
                raise DataError(f"{path}: no rows at all")
            if not any(self._is_usable(index, decode=True) for index in rows):
                raise DataError(f"{path}: no usable row:\n{self.problems.summary()}")

    @abstractmethod
    def read(self, index: int, *, decode: bool = True) -> Row:
        """One row; with `decode` False only the headers of its images are read: they have sizes but no pixels.

        Raises:
            RowError: It cannot be used.
        """

    @property
    def num_rows(self) -> int:
        """Rows of all files, unusable ones too."""
        return len(self._index)

    def place(self, index: int) -> tuple[Path, int]:
        """File of a row, and its number there, from 0."""
        file, number = self._index.locate(index)
        return self.paths[file], number

    def order(self, rng: random.Random) -> list[int]:
        """All rows in a shuffled order that is cheap to read."""
        return rng.sample(range(self.num_rows), self.num_rows)

    # ---------------------------------------------------------------------------------------- training
    def take(self, order: Sequence[int], at: int) -> Row:
        """The row at a place of an order, or if it is unusable one near it; equal arguments give equal rows.

        Raises:
            DataError: No row of the order can be used.
        """
        for index in _candidates(order, at):
            try:
                return self._read_or_list(index)
            except RowError:
                continue
        raise DataError(f"no usable row:\n{self.problems.summary()}")

    def take_many(self, places: Sequence[tuple[Sequence[int], int]]) -> list[Row]:
        """`take` for several (order, place); a few threads decode the images."""
        if len(places) < 2 or self._num_threads < 2:
            return [self.take(order, at) for order, at in places]
        return list(self._pool.map(lambda place: self.take(*place), places))

    @property
    def _num_threads(self) -> int:
        return self.config.num_threads or min(MAX_THREADS, len(os.sched_getaffinity(0)))

    @cached_property
    def _pool(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(self._num_threads, thread_name_prefix="decode")

    # ---------------------------------------------------------------------------------------- evaluation
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
            RowError: Its header is valid but its pixels are broken; `problems` lists it.
        """
        return self._read_or_list(self._usable[position])

    def _is_usable(self, index: int, *, decode: bool) -> bool:
        with suppress(RowError):
            self._read_or_list(index, decode=decode)
            return True
        return False

    def _read_or_list(self, index: int, *, decode: bool = True) -> Row:
        try:
            return self.read(index, decode=decode)
        except RowError as error:
            self.problems.add(*self.place(index), error)
            raise


def _candidates(order: Sequence[int], at: int) -> Iterator[int]:
    """The row, its neighbours in a random order (so that no single row replaces a run of bad ones), then all rows."""
    yield order[at]
    near = range(max(0, at - NEIGHBOURS), min(len(order), at + NEIGHBOURS))
    yield from (order[place] for place in random.Random(f"{order[at]}/{at}").sample(near, len(near)))
    yield from (order[(at + offset) % len(order)] for offset in range(len(order)))


def log_unread(path: Path, names: Iterable[str], known: Sequence[str]) -> None:
    """Log the columns or keys of a file that are not read, because a user may rely on them."""
    unread = [str(name) for name in names if name not in known]
    if unread:
        tools = "; the tools are those of rollout.agent.tools" if "tools" in unread else ""
        level = logging.WARNING if tools else logging.INFO
        logger.log(level, "%s: not read: %s%s", path, ", ".join(unread[:LISTED_ROWS]), tools)


def expand_files(files: Sequence[str | Path], flag: str) -> list[Path]:
    """The files as paths, `~` expanded; of the Hub's (`hf://`) the copies in its cache.

    Raises:
        DataError: No file is named, or one is a folder or does not exist; names the flag.
    """
    found = (hub.local_files(file, flag) if hub.is_hub_path(file) else [Path(file).expanduser()] for file in files)
    paths = [path for listed in found for path in listed]
    if folders := [str(path) for path in paths if path.is_dir()]:
        raise DataError(f"{flag}: {', '.join(folders)} is a folder; name its files")
    missing = [str(path) for path in paths if not path.is_file()]
    if missing or not paths:
        raise DataError(f"{flag}: {'no such file: ' + ', '.join(missing) if missing else 'no file given'}")
    return paths


def unique_names(paths: Sequence[Path]) -> list[str]:
    """A short name for each file, which starts its rows' ids: its stem, with the folder's name if stems are equal."""
    for depth in range(1, max((len(path.parts) for path in paths), default=1) + 1):
        names = [".".join([*path.parts[-depth:-1], path.stem]) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [f"{path.stem}.{number}" for number, path in enumerate(paths)]  # the same file given twice
