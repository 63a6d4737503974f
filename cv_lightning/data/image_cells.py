"""Image cells of rows and how they are decoded; the same rule holds for every reader.

A cell is bytes, a path, base64 text (with or without a `data:` prefix), or a mapping with `bytes` or `path`.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import os
import re
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from cv_lightning.data.rows import RowError, is_missing
from cv_lightning.images import MAX_ASPECT, MAX_DECODED_PIXELS, decode_image
from cv_lightning.types import ImageError

MIN_BASE64 = 256
"""Text of at least this length is the image itself in base64, unless a file of that name exists."""
EXIF_ORIENTATION = 0x0112
_WHERE_IN_MEMORY = re.compile(r"image file <_io\.BytesIO object at 0x[0-9a-f]+>")


def load_images(cells: Sequence[Any], folder: Path, decode: bool) -> tuple[Image.Image, ...]:
    """The images of a row's cells; with `decode` False they have sizes but no pixels.

    Raises:
        RowError: One of them cannot be used; names its place.
    """
    keys = [f"images[{index}]" for index in range(len(cells))]
    return tuple(
        load_image(image_source(cell, key, folder), key, decode) for cell, key in zip(cells, keys, strict=True)
    )


def image_source(cell: Any, key: str, folder: Path) -> bytes | Path:
    """The encoded bytes or the file that a cell names.

    Args:
        cell: Bytes, a path, base64 text, or a mapping with `bytes` or `path`.
        key: Name of the cell in messages.
        folder: Folder that relative paths start from.

    Raises:
        RowError: It names neither.
    """
    data = (cell.get("bytes") or cell.get("path")) if isinstance(cell, Mapping) else cell
    if isinstance(data, bytes) and data:
        return data
    if is_missing(data) or not isinstance(data, str) or not data or "\0" in data:
        raise RowError("no image", f"{key} has neither bytes nor path")
    path = folder / data.removeprefix("file://")
    if is_base64(data) and not os.path.isfile(path):
        return _decoded(data, key)
    try:
        mode = path.stat().st_mode
    except FileNotFoundError as error:
        start = "" if os.path.isabs(data) else f"; relative paths start from {os.path.abspath(folder)}"
        raise RowError(
            "unreadable image",
            f"{key}: no such file: {data}{start} (the file's folder, or data.init_args.reader.image_folder)",
        ) from error
    except (OSError, ValueError):
        return path  # opening it fails with the reason
    if not stat.S_ISREG(mode):  # a pipe would be waited for, a device may never end
        raise RowError("unreadable image", f"{key}: {path} is a folder, pipe or device; an image file is wanted")
    return path


def is_base64(text: str) -> bool:
    """True for a text that holds an image itself; a shorter one is a path."""
    return len(text) >= MIN_BASE64 or text.startswith("data:")


def _decoded(text: str, key: str) -> bytes:
    try:
        return base64.b64decode(text.rpartition("base64,")[2], validate=True)
    except (binascii.Error, ValueError) as error:
        raise RowError(
            "unreadable image", f"{key}: a text of {len(text)} characters that is neither a file nor base64 ({error})"
        ) from error


def load_image(source: bytes | Path, key: str, decode: bool) -> Image.Image:
    """Decode an image; with `decode` False read only its header: the result then has a size but no pixels.

    Raises:
        RowError: It is not an image, or too large or too long for the model; names the key.
    """
    try:
        image = decode_image(source) if decode else _open_header(source)
    except (ImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        kind = "image too large" if _is_too_large(error) else "unreadable image"
        raise RowError(kind, f"{key}: {_WHERE_IN_MEMORY.sub('these bytes', str(error))}") from error
    # A decoder may raise anything: struct.error, OverflowError, MemoryError, ... mean one bad image.
    except Exception as error:
        raise RowError("unreadable image", f"{key}: cannot be decoded ({error!r})") from error
    if max(image.size) >= MAX_ASPECT * min(image.size):
        raise RowError(
            "image too long",
            f"{key}: {image.width}x{image.height} is {MAX_ASPECT:.0f} times as long as wide or more, which no "
            "model takes",
        )
    return image


def _is_too_large(error: BaseException) -> bool:
    """True for our own limit, and for Pillow's higher one, whose message `decode_image` passes on."""
    return any(words in str(error) for words in (f"more than {MAX_DECODED_PIXELS} pixels", "decompression bomb"))


def _open_header(source: bytes | Path) -> Image.Image:
    with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
        if image.width * image.height > MAX_DECODED_PIXELS:
            raise ImageError(f"{image.width}x{image.height} is more than {MAX_DECODED_PIXELS} pixels")
        turned = is_turned_by_exif(image)
    return decode_image(source) if turned else image


def is_turned_by_exif(image: Image.Image) -> bool:
    """True if the EXIF data of an opened file turn or mirror the image."""
    # For a PNG without EXIF in its header, getexif() would decode every pixel.
    has_exif = image.format != "PNG" or "exif" in image.info
    return bool(has_exif and image.getexif().get(EXIF_ORIENTATION, 1) > 1)


def cells_digest(cells: Sequence[Any], folder: Path) -> str:
    """Hash of a question's image cells: equal for questions about the same images."""
    digest = hashlib.blake2b(digest_size=8)
    for cell in cells:
        given = (cell.get("bytes") or cell.get("path")) if isinstance(cell, Mapping) else cell
        if isinstance(given, str) and not is_base64(given):
            given = str(folder / given)
        digest.update(given if isinstance(given, bytes) else str(given).encode())
    return digest.hexdigest()
