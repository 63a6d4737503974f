"""What a snippet prints and shows, in the child, bounded while it comes.

`print`, `sys.stdout`, `sys.stderr`, and `os.write` to their descriptors go into one text, in the order of writing, of
which only the beginning and the end are kept. Descriptors 1 and 2 themselves stay on /dev/null: what compiled code
prints there is lost. Like the tracer, all of this shares its process with model code, which can only forge its own
text; the parent checks sizes and makes control characters harmless.
"""

from __future__ import annotations

import ast
import io
import os
import sys
from collections.abc import Callable
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from cv_lightning.sandbox.tracer import TRACER

if TYPE_CHECKING:
    from collections.abc import Iterator

RESULTS = ("result", "output")
"""Names whose value is shown beside the images of `show`."""


class Printed:
    """The beginning and the end of a text, at most `limit` bytes of it."""

    def __init__(self, limit: int) -> None:
        self.room = limit // 2
        self.head, self.tail = bytearray(), bytearray()
        self.total = 0

    def add(self, data: Any) -> int:
        """Append bytes; returns their number."""
        view = memoryview(data).cast("B")
        number = len(view)
        self.total += number
        free = self.room - len(self.head)
        if free > 0:
            self.head += view[:free]
            view = view[free:]
        if len(view):
            self.tail += view[-self.room :]
            if len(self.tail) > 8 * self.room:  # rarely, because it moves what is kept
                del self.tail[: -self.room]
        return number

    def kept(self) -> tuple[bytes, int]:
        """The bytes that are kept, and the place in them where the middle is missing (-1: nowhere)."""
        tail = self.tail[-self.room :]
        is_cut = self.total > len(self.head) + len(tail)
        return bytes(self.head + tail), len(self.head) if is_cut else -1


class _Stream(io.RawIOBase):
    """The file below `sys.stdout` or `sys.stderr`."""

    def __init__(self, printed: Printed, fd: int, before: Callable[[], None] | None = None) -> None:
        self._printed, self._fd, self._before = printed, fd, before
        self.name = f"<{'stdout' if fd == 1 else 'stderr'}>"

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._fd

    def write(self, data: Any, /) -> int:
        if self._before is not None:
            self._before()
        return self._printed.add(data)


def _text_file(stream: Any, *, write_through: bool = False) -> io.TextIOWrapper:
    return io.TextIOWrapper(stream, "utf-8", "backslashreplace", newline="\n", write_through=write_through)


class Output:
    """Collects what one snippet prints and shows.

    Args:
        text_bytes: Bytes of text that are kept.
        max_shown: Images that may be shown.
        check: Makes the RGB form of a result; raises for what is not a usable image.
        max_pixels: Pixels of all images together.
    """

    def __init__(
        self, text_bytes: int, max_shown: int, check: Callable[[Any, int], Image.Image], max_pixels: int
    ) -> None:
        self.printed = Printed(text_bytes)
        self.images: list[Image.Image] = []
        self._max_shown, self._check, self._max_pixels = max_shown, check, max_pixels
        self._originals: list[Any] = []
        self._stdout = _text_file(_Stream(self.printed, 1))
        self._write = os.write

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Collect what is printed until the end of the block."""
        before = sys.stdout, sys.stderr, sys.displayhook
        # Standard output is buffered, for its speed; the order stays that of writing.
        sys.stdout, sys.stderr = self._stdout, _text_file(_Stream(self.printed, 2, self._flush), write_through=True)
        sys.displayhook, os.write = self.display, self._os_write
        try:
            yield
        finally:
            self._flush()
            sys.stdout, sys.stderr, sys.displayhook = before
            os.write = self._write

    def _flush(self) -> None:
        with suppress(ValueError):  # the snippet closed it
            self._stdout.flush()

    def _os_write(self, fd: int, data: Any, /) -> int:
        if fd not in (1, 2):
            return self._write(fd, data)
        self._flush()
        return self.printed.add(data)

    def display(self, value: Any) -> None:
        """Show the value of a last expression: an image as an image, None not at all, anything else by its `repr`."""
        if isinstance(value, Image.Image):
            self._show_new(value)
        elif value is not None:
            print(repr(value))

    def show(self, *images: Any) -> None:
        """Show images, or lists of them, as they are now; the `show` of a snippet."""
        pictures = [item for value in images for item in (value if isinstance(value, list | tuple) else [value])]
        for value in pictures:
            if len(self.images) >= self._max_shown:
                raise ValueError(f"at most {self._max_shown} images can be shown by one call")
            TRACER.depth += 1  # what is done here is no operation of the snippet
            try:
                left = self._max_pixels - sum(image.width * image.height for image in self.images)
                image = self._check(value, left).copy()
                TRACER.set_origin(image, TRACER.origin_of(value) or TRACER.guess())
            finally:
                TRACER.depth -= 1
            self.images.append(image)
            self._originals.append(value)

    def _show_new(self, *images: Any) -> None:
        """Show those that the snippet has not shown itself."""
        self.show([value for value in images if not any(value is known for known in self._originals)])

    def take_results(self, scope: dict[str, Any]) -> None:
        """Show what the snippet put into `result` or `output`: an image, a list of images, or another value as text."""
        value = next((scope[name] for name in RESULTS if scope.get(name) is not None), None)
        if isinstance(value, list | tuple) and value and all(map(is_picture, value)):
            self._show_new(*value)
        elif is_picture(value):
            self._show_new(value)
        else:
            self.display(value)

    @property
    def is_empty(self) -> bool:
        """True while nothing was printed or shown."""
        return not self.images and not self.printed.total


def is_picture(value: Any) -> bool:
    """True for an image, and for an array that is meant as one."""
    return isinstance(value, Image.Image) or (isinstance(value, np.ndarray) and value.ndim >= 2)


def run_as_cell(code: str, file: str, scope: dict[str, Any]) -> None:
    """Run code as a notebook runs a cell: the value of its last expression goes to `sys.displayhook`.

    As there, a semicolon at the end suppresses the value, and `exit()` ends the code without an error.
    """
    tree = ast.parse(code, file)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    try:
        exec(compile(tree, file, "exec", dont_inherit=True), scope)
        if last is not None:
            single = ast.Module([last], []) if code.rstrip().endswith(";") else ast.Interactive([last])
            mode = "exec" if isinstance(single, ast.Module) else "single"
            exec(compile(single, file, mode, dont_inherit=True), scope)
    except SystemExit as end:
        if end.code not in (None, 0):
            raise
