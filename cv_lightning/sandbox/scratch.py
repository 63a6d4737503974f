"""Keeps images that a snippet saves under a file name in its own memory, so that it can open them again.

A child cannot write files, but many well-meant snippets save a step and open it again. For them, Pillow and OpenCV keep
the encoded image under its absolute path and look there first when they read. Like the size checks in `guard`, this is
not a layer of isolation: nothing leaves the process, and the memory limit counts.
"""

from __future__ import annotations

import functools
import io
import os
import sys
from typing import Any

from PIL import Image

_saved: dict[str, bytes] = {}
"""Encoded images by absolute path, all of the one snippet that a child runs."""


def _key(file: Any) -> str | None:
    """The absolute path, or None for an open file or a buffer."""
    if isinstance(file, str | bytes | os.PathLike):
        return os.path.normpath(os.path.join("/", os.fsdecode(file)))
    return None


def install() -> None:
    """Wrap the functions that write and read image files. Once, in the fork server."""
    _wrap_pillow()
    if "cv2" in sys.modules:
        _wrap_cv2(sys.modules["cv2"])


def _wrap_pillow() -> None:
    original_save, original_open = Image.Image.save, Image.open

    @functools.wraps(original_save)
    def save(self: Image.Image, fp: Any, format: str | None = None, **params: Any) -> None:
        key = _key(fp)
        kind = format or (Image.registered_extensions().get(os.path.splitext(key)[1].lower()) if key else None)
        if key is None or kind is None:  # an open file, or a name that Pillow will reject
            original_save(self, fp, format, **params)
            return
        buffer = io.BytesIO()
        original_save(self, buffer, kind, **params)
        _saved[key] = buffer.getvalue()

    @functools.wraps(original_open)
    def open_(fp: Any, *args: Any, **kwargs: Any) -> Any:
        key = _key(fp)
        return original_open(io.BytesIO(_saved[key]) if key in _saved else fp, *args, **kwargs)

    Image.Image.save = save  # type: ignore[method-assign]
    Image.open = open_


def _wrap_cv2(cv2: Any) -> None:
    import numpy as np

    original_write, original_read = cv2.imwrite, cv2.imread

    @functools.wraps(original_write)
    def imwrite(filename: Any, img: Any, params: Any = ()) -> bool:
        key = _key(filename)
        if key is None:
            return bool(original_write(filename, img, params))
        done, data = cv2.imencode(os.path.splitext(key)[1], img, params)
        if done:
            _saved[key] = data.tobytes()
        return bool(done)

    @functools.wraps(original_read)
    def imread(filename: Any, flags: int = cv2.IMREAD_COLOR, **kwargs: Any) -> Any:
        key = _key(filename)
        if key in _saved:
            return cv2.imdecode(np.frombuffer(_saved[key], np.uint8), flags)
        return original_read(filename, flags, **kwargs)

    cv2.imwrite, cv2.imread = imwrite, imread
