"""Files that appear whole or not at all, whatever stops the process that writes them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


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
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str, errors: str = "strict") -> None:
    """Write text as UTF-8, whole or not at all.

    Args:
        path: the file; its folder exists.
        text: what it will hold.
        errors: as of `str.encode`, for characters that UTF-8 cannot hold.
    """
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors=errors)
