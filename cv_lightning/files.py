"""Files that appear whole or not at all, whatever stops the process that writes them."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

DISK_ERRORS = frozenset((errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.EFBIG))
"""What the system says where nothing (more) can be written: a matter of the machine, not a defect of the program."""


def describe_disk_error(error: BaseException) -> str:
    """One line for people; empty for any other error."""
    if not isinstance(error, OSError) or error.errno not in DISK_ERRORS:
        return ""
    place = error.filename2 or error.filename
    said = f"{place}: {error.strerror}" if place is not None else str(error.strerror)
    return f"{said}. Free space there, or choose a folder that can be written"


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A file to write beside `path`, which takes its place once the context ends without an error.

    Args:
        path: the file; its folder exists. Two processes must not write the same one at a time. A link, device or pipe
            (`/dev/stdout`) is written itself: nothing could take its place.
    """
    if path.is_symlink() or (path.exists() and not path.is_file()):
        yield path
        return
    temporary = path.with_name(path.name + ".tmp")
    try:
        yield temporary
        sync_file(temporary)  # else a power cut may leave the new name with nothing behind it
        os.replace(temporary, path)
    finally:
        with suppress(OSError):  # on a disk that became read-only; what went wrong before is the news
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
    """Write text as UTF-8, whole or not at all.

    Args:
        path: the file; its folder exists.
        text: what it will hold.
        errors: as of `str.encode`, for characters that UTF-8 cannot hold.
    """
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors=errors)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(value, indent=1))
