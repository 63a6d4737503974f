"""Files that are written completely or not at all, even if the writing process is killed."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

DISK_ERRORS = frozenset((errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.EFBIG))
"""Errors of the system where nothing (more) can be written: a problem of the machine, not of the program."""


def describe_disk_error(error: BaseException) -> str:
    """One line about an error of the disk; empty for any other error."""
    if not isinstance(error, OSError) or error.errno not in DISK_ERRORS:
        return ""
    place = error.filename2 or error.filename
    said = f"{place}: {error.strerror}" if place is not None else str(error.strerror)
    return f"{said}. Free space there, or choose a folder that can be written"


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A temporary file beside `path`, which replaces it when the context ends without an error.

    Args:
        path: The file; its folder exists. Only one process may write it at a time. A link, device or pipe
            (`/dev/stdout`) is written directly.
    """
    if path.is_symlink() or (path.exists() and not path.is_file()):
        yield path
        return
    temporary = path.with_name(path.name + ".tmp")
    try:
        yield temporary
        sync_file(temporary)  # otherwise a power cut may leave an empty file under the new name
        os.replace(temporary, path)
    finally:
        with suppress(OSError):  # the disk became read-only; the earlier error is raised
            temporary.unlink(missing_ok=True)


def sync_file(path: Path) -> None:
    """Wait until a file's content is on disk."""
    with path.open("rb") as opened:
        os.fsync(opened.fileno())


def sync_folder(folder: Path) -> None:
    """Wait until a folder's list of names is on disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str, errors: str = "strict") -> None:
    """Write text as UTF-8, completely or not at all.

    Args:
        path: The file; its folder exists.
        text: Its content.
        errors: As in `str.encode`, for characters that UTF-8 cannot encode.
    """
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors=errors)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file, completely or not at all; its folder is made if absent."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(value, indent=1))
