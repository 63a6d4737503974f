"""The trajectory store: one group a line, every image once, append-only.

Layout of a store (`RUN/rl`, `RUN/eval/<name>`, ...):

    trajectories/<name>.rank<r>.jsonl   one JSON line per group (see `codec.py`)
    images/<content hash>.png           original pixels, written once

A line is written whole and flushed, images before the line that names them. A process may be killed at any
byte: the torn line is ignored and counted by the reader, also when a new writer appends after it.
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
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

import numpy as np
from PIL import Image

from cv_lightning.files import sync_file, sync_folder
from cv_lightning.images import content_hash
from cv_lightning.trajectory.codec import encode_group
from cv_lightning.types import CVLightningError, Group

LOG = logging.getLogger(__name__)
LINES = "trajectories"
IMAGES = "images"
STALE_S = 3600.0
"""Age of a temporary image from which on its writer counts as gone."""
MAX_WAITING = 32
"""Groups that may wait to be written in the background, with their images in memory."""


@dataclass(frozen=True, kw_only=True)
class StoreConfig:
    """What is kept of a run's trajectories."""

    share: float = 1.0
    """Share of groups that are stored, in [0, 1]; chosen by task and iteration, the same on every rank."""
    max_gb: float = 20.0
    """A rank stops storing (and says so once) when the images and lines that it found, of a run that it goes on with,
    and those that it wrote exceed this many GB. What other ranks write meanwhile is not in it."""
    image_format: Literal["png", "webp"] = "png"
    """Both are lossless; WebP is smaller and about ten times slower to write."""
    tokens: bool = False
    """Store token ids, loss mask and log-probabilities too (about 12 bytes a token)."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.share <= 1.0:
            raise ValueError(f"store share {self.share}: must be between 0 and 1; change `store.share`")
        if self.max_gb <= 0:
            raise ValueError(f"store max_gb {self.max_gb}: must be positive; to store nothing set `store.share` to 0")


class TrajectoryWriter:
    """Appends groups to a store.

    Several ranks (or several runs one after another) may write to one folder: each rank has its own file, and
    an image that exists is not written again.

    Args:
        folder: the store; made if missing.
        config: what is kept.
        rank: of this process.
        name: stem of the file, to keep apart what one folder holds.
        background: a thread encodes and writes, while the caller goes on and leaves the groups as they are. The last
            ones may not be on disk before `flush` or `close`, which raise what is wrong if no call before them did.
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
        self.num_written = 0
        self.num_skipped = 0
        """Groups left out by `share` or `max_gb`."""
        self.num_bytes = 0
        """Of the images that were here before, of this file, and of what was written since."""
        self._images = self.folder / IMAGES
        self._images.mkdir(parents=True, exist_ok=True)
        path = self.folder / LINES / f"{name}.rank{rank}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._temporary = f".{os.getpid()}.{rank}.tmp"
        self._unsynced: set[str] = set()
        """Images that were written since the last `sync`."""
        self._stored: set[str] = set()
        for entry in os.scandir(self._images):
            if entry.name.endswith(".tmp") and _is_stale(entry, f".{rank}.tmp"):
                Path(entry.path).unlink(missing_ok=True)
                continue
            self._stored.add(entry.name)
            self.num_bytes += _size_of(entry)
        self._file = path.open("ab")
        self.num_bytes += self._file.tell()
        if torn := _ends_torn(path):
            # whatever the last writer left unfinished becomes a line of its own, which the reader counts as bad
            self._file.write(b"\n")
            LOG.warning("%s ends in %d bytes of an unfinished line (a killed run); appending after it", path, torn)
        self._thread = ThreadPoolExecutor(1, "store") if background else None
        self._waiting: deque[Future[None]] = deque()
        self._warn_if_full()

    def write_group(self, group: Group, iteration: int) -> None:
        """Store one group: its new images, then its line, flushed to the operating system.

        Args:
            group: scored or not.
            iteration: RL iteration; 0 in evaluations.

        Raises:
            CVLightningError: this group, or in the background one before it, cannot be written.
        """
        if not self._wanted(group.task.id, iteration):
            self.num_skipped += 1
            return
        if self._thread is None:
            self._write(group, iteration)
            return
        self._waiting.append(self._thread.submit(self._write, group, iteration))
        while self._waiting and (self._waiting[0].done() or len(self._waiting) > MAX_WAITING):
            self._waiting.popleft().result()

    def _write(self, group: Group, iteration: int) -> None:
        if self._is_full:
            self.num_skipped += 1
            return
        try:
            group = replace(group, iteration=iteration)
            line = encode_group(group, name_image=self._store_image, tokens=self.config.tokens)
            self._file.write(line)
            self._file.flush()
        except OSError as error:
            raise self._cannot_store(error) from error
        self.num_written += 1
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
            CVLightningError: something that waited cannot be.
        """
        while self._waiting:
            self._waiting.popleft().result()

    def sync(self) -> None:
        """Wait until everything is written and on disk: new images, their names, then the lines.

        Raises:
            CVLightningError: something that waited cannot be written.
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
        """Finish; closing twice is fine.

        Raises:
            CVLightningError: as of `flush`.
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

    def _wanted(self, task_id: str, iteration: int) -> bool:
        if self._is_full:
            return False
        if self.config.share >= 1.0:
            return True
        digest = hashlib.blake2b(f"{iteration}/{task_id}".encode(), digest_size=8).digest()
        return int.from_bytes(digest) / 2**64 < self.config.share

    def _store_image(self, image: Image.Image) -> str:
        """File name of the image, which is written unless it is there."""
        name = f"{content_hash(image)}.{self.config.image_format}"
        if name not in self._stored or not (self._images / name).exists():  # somebody may have removed it
            self._write_image(image, name)
            self._stored.add(name)
        return name

    def _write_image(self, image: Image.Image, name: str) -> None:
        data = encode_image(image, self.config.image_format)
        temporary = self._images / (name + self._temporary)
        try:
            temporary.write_bytes(data)
            temporary.replace(self._images / name)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
        self._unsynced.add(name)
        self.num_bytes += len(data)


def drop_after(folder: str | Path, iteration: int) -> dict[Path, int]:
    """Cut off the groups that a killed run stored after an iteration from which it now goes on.

    Files are in the order of iterations, so what goes is their end; an unfinished line goes with it. Images stay: they
    are stored by content, and the run that goes on finds them there.

    Args:
        folder: the store.
        iteration: the last one that stands.

    Returns:
        Number of groups dropped by file, of files that lost any.
    """
    dropped = {}
    for path in sorted(Path(folder, LINES).glob("*.jsonl")):
        groups = 0
        with path.open("r+b") as file:
            if not (end := file.seek(0, os.SEEK_END)):
                continue
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                while end > 0:
                    start = data.rfind(b"\n", 0, end - 1) + 1
                    number = _iteration_of(data[start:end])
                    if number is not None and number <= iteration:
                        break
                    groups += number is not None
                    end = start
            file.truncate(end)
        if groups:
            dropped[path] = groups
    return dropped


def last_groups(path: Path) -> tuple[int, int]:
    """The last iteration in a file of groups, and how many groups it has there; (0, 0) without any.

    Reads the end of the file only.
    """
    last = count = 0
    with path.open("rb") as file:
        if not (end := file.seek(0, os.SEEK_END)):
            return 0, 0
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            while end > 0:
                start = data.rfind(b"\n", 0, end - 1) + 1
                number = _iteration_of(data[start:end])
                if number is not None and count and number != last:
                    break
                if number is not None:
                    last, count = number, count + 1
                end = start
    return last, count


def _is_stale(entry: os.DirEntry[str], own: str) -> bool:
    """True for a temporary image that no writer will finish: an earlier one of this rank, or an old one."""
    try:
        return entry.name.endswith(own) or time.time() - entry.stat().st_mtime > STALE_S
    except FileNotFoundError:
        return False


def _size_of(entry: os.DirEntry[str]) -> int:
    """0 for a temporary file of another rank that is gone by now."""
    try:
        return entry.stat().st_size
    except FileNotFoundError:
        return 0


def _iteration_of(line: bytes) -> int | None:
    """None if the line is no group."""
    try:
        return int(json.loads(line)["iteration"])
    except (ValueError, KeyError, TypeError):
        return None


def encode_image(image: Image.Image, image_format: Literal["png", "webp"] = "png") -> bytes:
    """Lossless file of an image; grey RGB pictures are written with one channel, three times as fast."""
    buffer = io.BytesIO()
    compact = _grey(image) or image
    if image_format == "webp":
        compact.convert("RGB").save(buffer, "WEBP", lossless=True, quality=20, method=0)
    else:
        compact.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def _grey(image: Image.Image) -> Image.Image | None:
    if image.mode != "RGB":
        return None
    pixels = np.asarray(image)
    first = pixels[:: max(1, image.height // 8)]  # tells photographs in microseconds
    for part in (first, pixels):
        red = part[..., 0]
        if not (np.array_equal(red, part[..., 1]) and np.array_equal(red, part[..., 2])):
            return None
    return image.getchannel(0)


def _ends_torn(path: Path) -> int:
    """Number of bytes after the last newline."""
    with path.open("rb") as file:
        size = position = file.seek(0, os.SEEK_END)
        while position > 0:
            start = max(0, position - 65536)
            file.seek(start)
            found = file.read(position - start).rfind(b"\n")
            if found >= 0:
                return size - (start + found + 1)
            position = start
    return size
