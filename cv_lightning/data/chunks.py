"""Rows of Parquet files by number, a bounded part in memory.

A chunk is a run of rows within a row group. Small row groups are a chunk each; of large ones (a file may be a single
row group of gigabytes) the chunks are read one after another from a stream, which costs nothing extra in the order
that `ParquetRows.order` gives.
"""

from __future__ import annotations

import random
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from cv_lightning.data.rows import RowError, RowIndex
from cv_lightning.types import DataError

CHUNK_BYTES = 16 << 20
"""Approximate uncompressed size of a chunk."""
MAX_CHUNK_ROWS = 1024
"""A dictionary-encoded column (one image, many questions) makes rows look smaller than they are once read."""
MIXED_CHUNKS = 4
"""Chunks from different row groups whose rows are shuffled together."""
KEPT_CHUNKS = 2 * MIXED_CHUNKS
"""Chunks in memory; threads and ranks may read the chunks before and after a change at the same time."""
BUFFER_BYTES = 1 << 20


class Chunk(NamedTuple):
    """A run of rows."""

    file: int
    group: int
    """Row group in the file."""
    start: int
    """First row within the row group."""
    first: int
    """First row within the file."""
    num_rows: int


@dataclass(slots=True)
class _Stream:
    """A row group that is read from front to back."""

    batches: Iterator[pa.RecordBatch]
    position: int = 0
    """Row at which `held` starts."""
    held: pa.RecordBatch | None = None


class ParquetRows:
    """Rows of Parquet files as mappings, by index over all files; may be used by several threads.

    Args:
        paths: The files.
        columns: Groups of columns; a file must have one column of each group, and a row holds all that are there.
        optional: Further columns of a row; None: all that the file has.

    Raises:
        DataError: A file is not Parquet, or lacks columns.
    """

    def __init__(
        self, paths: Sequence[Path], columns: Sequence[Sequence[str]], optional: Sequence[str] | None = ()
    ) -> None:
        self.paths = list(paths)
        self._files = [open_parquet(path, columns) for path in self.paths]
        wanted = [name for names in columns for name in names] + list(optional or ())
        self._columns = [
            [name for name in file.schema_arrow.names if optional is None or name in wanted] for file in self._files
        ]
        self.chunks = [chunk for number, file in enumerate(self._files) for chunk in _chunks_of_file(number, file)]
        self._index = RowIndex(chunk.num_rows for chunk in self.chunks)
        self._lock = threading.Lock()
        self._kept: OrderedDict[int, pa.RecordBatch | RowError] = OrderedDict()
        self._streams: OrderedDict[tuple[int, int], _Stream] = OrderedDict()
        self._broken: dict[tuple[int, int], tuple[int, str]] = {}

    def __len__(self) -> int:
        return len(self._index)

    @property
    def names(self) -> list[list[str]]:
        """All columns of each file."""
        return [list(file.schema_arrow.names) for file in self._files]

    @property
    def sizes(self) -> list[int]:
        """Rows of each file."""
        return [file.metadata.num_rows for file in self._files]

    def row(self, index: int) -> dict[str, Any]:
        """One row, column to value.

        Raises:
            RowError: Its part of the file cannot be read.
        """
        at, number = self._index.locate(index)
        with self._lock:
            batch = self._kept.get(at)
            if batch is None:
                batch = self._kept[at] = self._read(self.chunks[at])
                while len(self._kept) > KEPT_CHUNKS:
                    self._kept.popitem(last=False)
            self._kept.move_to_end(at)
        if isinstance(batch, RowError):
            raise RowError(batch.kind, str(batch))
        [row] = batch.slice(number, 1).to_pylist()
        return dict(row)

    def order(self, rng: random.Random) -> list[int]:
        """All rows, shuffled so that each chunk is read once and a row group from front to back.

        Row groups come in a random order, several at a time, and the rows of their current chunks are mixed.
        """
        groups: dict[tuple[int, int], list[int]] = {}
        for at, chunk in enumerate(self.chunks):
            groups.setdefault((chunk.file, chunk.group), []).append(at)
        waiting = list(groups.values())
        rng.shuffle(waiting)
        lanes: list[list[int]] = []
        order: list[int] = []
        while waiting or lanes:
            while waiting and len(lanes) < MIXED_CHUNKS:
                lanes.append(waiting.pop())
            mixed = [index for lane in lanes for index in self._index.rows_of(lane[0])]
            rng.shuffle(mixed)
            order += mixed
            lanes = [lane[1:] for lane in lanes if lane[1:]]
        return order

    # ---------------------------------------------------------------------------------------- reading
    def _read(self, chunk: Chunk) -> pa.RecordBatch | RowError:
        key = (chunk.file, chunk.group)
        broken_at, why = self._broken.get(key, (chunk.start + chunk.num_rows, ""))
        if chunk.start + chunk.num_rows > broken_at:
            return self._unreadable(chunk, why)
        stream = self._streams.get(key)
        if stream is None or stream.position > chunk.start:
            stream = self._streams[key] = self._open_stream(chunk)
            while len(self._streams) > KEPT_CHUNKS:
                self._streams.popitem(last=False)
        self._streams.move_to_end(key)
        try:
            batch = _advance(stream, chunk)
        except (pa.ArrowException, OSError, StopIteration) as error:
            # Rows after a broken page cannot be found: a row group is read from its front.
            self._broken[key] = (chunk.start, str(error) or "it ends early")
            del self._streams[key]
            return self._unreadable(chunk, self._broken[key][1])
        if chunk.start + chunk.num_rows == self._files[chunk.file].metadata.row_group(chunk.group).num_rows:
            del self._streams[key]
        return batch

    def _open_stream(self, chunk: Chunk) -> _Stream:
        batches = self._files[chunk.file].iter_batches(
            batch_size=chunk.num_rows, row_groups=[chunk.group], columns=self._columns[chunk.file], use_threads=False
        )
        return _Stream(iter(batches))

    def _unreadable(self, chunk: Chunk, why: str) -> RowError:
        where = f"rows {chunk.first} to {chunk.first + chunk.num_rows - 1} (row group {chunk.group})"
        return RowError("unreadable rows", f"{where} cannot be read ({why}); is the file damaged?")


def _advance(stream: _Stream, chunk: Chunk) -> pa.RecordBatch:
    """The rows of a chunk; rows before it are skipped."""
    parts: list[pa.RecordBatch] = []
    missing = chunk.num_rows
    while missing:
        batch = stream.held if stream.held is not None else next(stream.batches)
        stream.held = None
        skip = min(batch.num_rows, max(0, chunk.start - stream.position))
        taken = batch.slice(skip, missing)
        stream.position += skip + taken.num_rows
        if taken.num_rows:
            parts.append(taken)
            missing -= taken.num_rows
        if skip + taken.num_rows < batch.num_rows:
            stream.held = batch.slice(skip + taken.num_rows)
    return parts[0] if len(parts) == 1 else pa.concat_batches(parts)


def _chunks_of_file(number: int, file: pq.ParquetFile) -> Iterator[Chunk]:
    first = 0
    for group in range(file.num_row_groups):
        metadata = file.metadata.row_group(group)
        rows: int = metadata.num_rows
        size = max(1, min(rows, MAX_CHUNK_ROWS, CHUNK_BYTES * rows // max(1, metadata.total_byte_size)))
        for start in range(0, rows, size):
            yield Chunk(number, group, start, first + start, min(size, rows - start))
        first += rows


def open_parquet(path: Path, columns: Sequence[Sequence[str]] = ()) -> pq.ParquetFile:
    """Open a file; only its footer is read.

    Args:
        path: The file.
        columns: Groups of columns; the file must have one of each.

    Raises:
        DataError: It is not Parquet, or a column is missing.
    """
    try:
        # No memory map and no read-ahead: resident memory must not grow with what has been read.
        file = pq.ParquetFile(path, buffer_size=BUFFER_BYTES, pre_buffer=False)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: cannot be read as Parquet ({error}); is it cut off, or another format?") from error
    names = set(file.schema_arrow.names)
    for wanted in columns:
        if not names & set(wanted):
            raise DataError(f"{path}: no column {' or '.join(wanted)}; it has {', '.join(sorted(names))}")
    return file
