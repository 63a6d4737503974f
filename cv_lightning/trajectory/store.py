"""The trajectory store: one group per line, every image once, append-only.

Layout of a store (the run's folder for training, `RUN/eval/<name>` for an evaluation):

    trajectories/<name>.rank<r>.jsonl   one JSON line per group (see `codec.py`)
    images/<content hash>.png           original pixels, written once

A line is written whole and flushed, and images are written before the line that names them. A process may be killed at
any byte: the reader skips and counts an unfinished line, also one that a later writer has appended to.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import mmap
import os
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Literal, NamedTuple, Self

import numpy as np
from PIL import Image

from cv_lightning.files import sync_file, sync_folder
from cv_lightning.images import content_hash
from cv_lightning.ranges import Fraction, Limit, check_ranges
from cv_lightning.trajectory.codec import encode_group
from cv_lightning.types import CVLightningError, Group

LOG = logging.getLogger(__name__)
LINES = "trajectories"
IMAGES = "images"
STALE_S = 3600.0
"""Age above which a temporary image of another rank is deleted: its writer is gone."""
MAX_WEBP_SIDE = 16383
"""Pixels of the longest side of a WebP image."""
MAX_WAITING = 32
"""Number of groups that may wait for the background thread, with their images in memory."""


@dataclass(frozen=True, kw_only=True)
class StoreConfig:
    """What is kept of a run's trajectories."""

    share: Fraction = 1.0
    """Fraction of groups that are stored, in [0, 1]; chosen by task and iteration, the same on every rank."""
    max_gb: Limit = 20.0
    """Size in GB above which a rank stops storing and logs one warning. It counts the images and lines that the rank
    found at the start and those that it wrote, not what other ranks write meanwhile."""
    image_format: Literal["png", "webp"] = "png"
    """Both are lossless; WebP is smaller and about ten times slower to write. An image with a side above 16383 pixels,
    which WebP cannot hold, is stored as PNG."""
    tokens: bool = False
    """Also store token ids, loss mask and log-probabilities (about 14 bytes per token)."""

    def __post_init__(self) -> None:
        check_ranges(self, "rollout.store")


class TrajectoryWriter:
    """Appends groups to a store.

    Several ranks, or several runs one after another, may write to one folder: each rank has its own file, and an image
    that exists is not written again.

    Args:
        folder: The store; created if missing.
        config: What is kept.
        rank: The rank of this process.
        name: Start of the file's name.
        background: Encode and write on a thread; the caller must not change the groups meanwhile. Call `flush` or
            `close` to wait for the last groups and to get their errors.
    """

    def __init__(
        self,
        folder: str | Path,
        config: StoreConfig | None = None,
        rank: int = 0,
        *,
        name: str = "groups",
        background: bool = False,
    ) -> None:
        self.folder = Path(folder)
        self.config = config or StoreConfig()
        self.num_bytes = 0
        """Bytes of the images found at the start, of this rank's file, and of what was written since."""
        self.path = self.folder / LINES / f"{name}.rank{rank}.jsonl"
        self._images = self.folder / IMAGES
        for parent in (self._images, self.path.parent):
            parent.mkdir(parents=True, exist_ok=True)
        self._temporary = f".{os.getpid()}.{rank}.tmp"
        self._stored: set[str] = set()
        """Names of the images in the store."""
        self._unsynced: set[str] = set()
        """Names of the images written since the last `sync`."""
        self._scan_images(rank)
        self._file = self.path.open("ab")
        self.num_bytes += self._file.tell()
        if torn := _unfinished_bytes(self.path):
            self._file.write(b"\n")  # makes the unfinished line one of its own, which the reader counts as bad
            LOG.warning("%s ends in %d bytes of an unfinished line (a killed run); appending after it", self.path, torn)
        self._thread = ThreadPoolExecutor(1, "store") if background else None
        self._waiting: deque[Future[None]] = deque()
        self._warn_if_full()

    def _scan_images(self, rank: int) -> None:
        """Note the images that are there, and delete the temporary ones that no writer will finish."""
        for entry in os.scandir(self._images):
            with suppress(FileNotFoundError):  # a temporary file that another rank has renamed by now
                status = entry.stat()
                own = entry.name.endswith(f".{rank}.tmp")
                if own or (entry.name.endswith(".tmp") and time.time() - status.st_mtime > STALE_S):
                    os.unlink(entry.path)
                else:
                    self._stored.add(entry.name)
                    self.num_bytes += status.st_size

    def write_group(self, group: Group, iteration: int) -> None:
        """Store one group: its new images, then its line, flushed to the operating system.

        Args:
            group: Scored or not.
            iteration: RL iteration; 0 in evaluations.

        Raises:
            CVLightningError: This group, or in the background an earlier one, cannot be written.
        """
        if self._is_full or not self._is_chosen(group.task.id, iteration):
            return
        group = replace(group, iteration=iteration)
        if self._thread is None:
            self._write(group)
            return
        self._waiting.append(self._thread.submit(self._write, group))
        while self._waiting and (self._waiting[0].done() or len(self._waiting) > MAX_WAITING):
            self._waiting.popleft().result()

    def _write(self, group: Group) -> None:
        if self._is_full:
            return
        try:
            line = encode_group(group, name_image=self._store_image, tokens=self.config.tokens)
            self._file.write(line)
            self._file.flush()
        except OSError as error:
            raise self._cannot_store(error) from error
        self.num_bytes += len(line)
        self._warn_if_full()

    def _cannot_store(self, error: OSError) -> CVLightningError:
        return CVLightningError(
            f"trajectories cannot be stored in {self.folder}: {error.strerror or error}. Free space, or lower "
            "store.share or store.max_gb, and continue with the same command (fit: with --ckpt_path last)"
        )

    def flush(self) -> None:
        """Wait until everything is written.

        Raises:
            CVLightningError: A waiting group cannot be written.
        """
        while self._waiting:
            self._waiting.popleft().result()

    def sync(self) -> None:
        """Wait until everything is written and on disk: new images, their names, then the lines.

        Raises:
            CVLightningError: A waiting group cannot be written.
        """
        self.flush()
        images, self._unsynced = self._unsynced, set()
        try:
            for name in sorted(images):
                with suppress(FileNotFoundError):  # removed by hand
                    sync_file(self._images / name)
            if images:
                sync_folder(self._images)
            os.fsync(self._file.fileno())
            sync_folder(self.path.parent)
        except OSError as error:
            raise self._cannot_store(error) from error

    def close(self) -> None:
        """Write what waits and close the file; a second call does nothing.

        Raises:
            CVLightningError: A waiting group cannot be written.
        """
        try:
            self.flush()
        finally:
            if self._thread is not None:
                self._thread.shutdown(cancel_futures=True)
            try:
                self._file.close()
            except OSError as error:  # on a full disk: bytes of the group that could not be written
                LOG.warning("the last trajectories are not in %s: %s", self.path, error)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def _is_full(self) -> bool:
        return self.num_bytes > self.config.max_gb * 1e9

    def _warn_if_full(self) -> None:
        if self._is_full:
            LOG.warning("%s: %.1f GB stored, store.max_gb reached; storing no more", self.path, self.num_bytes / 1e9)

    def _is_chosen(self, task_id: str, iteration: int) -> bool:
        digest = hashlib.blake2b(f"{iteration}/{task_id}".encode(), digest_size=8).digest()
        return self.config.share >= 1.0 or int.from_bytes(digest) / 2**64 < self.config.share

    def _store_image(self, image: Image.Image) -> str:
        """Write the image unless it is there, and return its file name."""
        image_format = self.config.image_format if max(image.size) <= MAX_WEBP_SIDE else "png"
        name = f"{content_hash(image)}.{image_format}"
        if name in self._stored and (self._images / name).exists():  # it may have been removed by hand
            return name
        data = encode_image(image, image_format)
        temporary = self._images / (name + self._temporary)
        try:
            temporary.write_bytes(data)
            temporary.replace(self._images / name)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
        self._stored.add(name)
        self._unsynced.add(name)
        self.num_bytes += len(data)
        return name


# ------------------------------------------------------------------------------------------------ ends of files
class _Line(NamedTuple):
    """A line of a file of groups."""

    end: int
    """Offset of the byte after it."""
    iteration: int | None
    """RL iteration of its group; None for a line that is not a group."""


@contextmanager
def _bytes_of(path: Path) -> Iterator[mmap.mmap | bytes]:
    """The content of a file, of which only what is looked at is read."""
    with path.open("rb") as file:
        if not os.fstat(file.fileno()).st_size:
            yield b""
            return
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            yield data


def _lines_from_end(data: mmap.mmap | bytes) -> Iterator[_Line]:
    end = len(data)
    while end > 0:
        start = data.rfind(b"\n", 0, end - 1) + 1
        try:
            iteration = int(json.loads(data[start:end])["iteration"])
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            iteration = None
        yield _Line(end, iteration)
        end = start


def _unfinished_bytes(path: Path) -> int:
    """Number of bytes after the last newline."""
    with _bytes_of(path) as data:
        return len(data) - (data.rfind(b"\n") + 1)


def drop_after(folder: str | Path, iteration: int) -> dict[Path, int]:
    """Delete the groups that a killed run stored after the iteration from which it now resumes.

    Groups lie in the order of iterations, so each file is cut at its end, an unfinished line included. Images stay: the
    resumed run finds them by their content.

    Args:
        folder: The store.
        iteration: The last iteration that is kept.

    Returns:
        Number of deleted groups by file, for the files that lost any.
    """
    dropped = {}
    for path in sorted(Path(folder, LINES).glob("*.jsonl")):
        groups, kept = 0, 0
        with _bytes_of(path) as data:
            for line in _lines_from_end(data):
                if line.iteration is not None and line.iteration <= iteration:
                    kept = line.end
                    break
                groups += line.iteration is not None
        os.truncate(path, kept)
        if groups:
            dropped[path] = groups
    return dropped


def last_groups(path: Path) -> tuple[int, int]:
    """The last iteration in a file of groups, and its number of groups there; (0, 0) without any.

    Reads the end of the file only.
    """
    last = count = 0
    with _bytes_of(path) as data:
        for line in _lines_from_end(data):
            if line.iteration is None:
                continue
            if count and line.iteration != last:
                break
            last, count = line.iteration, count + 1
    return last, count


# ------------------------------------------------------------------------------------------------ image files
def encode_image(image: Image.Image, image_format: Literal["png", "webp"] = "png") -> bytes:
    """Lossless file of an image; a grey RGB image is written with one channel, which is three times as fast."""
    buffer = io.BytesIO()
    compact = _grey(image) or image
    if image_format == "webp":
        compact.convert("RGB").save(buffer, "WEBP", lossless=True, quality=20, method=0)
    else:
        compact.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def _grey(image: Image.Image) -> Image.Image | None:
    """The image in one channel; None if it has colours."""
    if image.mode != "RGB":
        return None
    pixels = np.asarray(image)
    for part in (pixels[:: max(1, image.height // 8)], pixels):  # a few rows rule out photographs in microseconds
        if any(not np.array_equal(part[..., 0], part[..., channel]) for channel in (1, 2)):
            return None
    grey = image.getchannel(0)
    grey.info = {}  # a transparent colour would have three channels
    return grey
