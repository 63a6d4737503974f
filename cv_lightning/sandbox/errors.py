"""What went wrong in a snippet, as the short text that the model reads: kind, lines of the snippet, message, hint."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Sequence

from cv_lightning.sandbox import guard

FILE = "<code>"
"""File name of the snippet in tracebacks."""
_LIBRARIES = "available: PIL, numpy, cv2, skimage, scipy, math and the standard library"
HINTS = {
    "FileNotFoundError": "files cannot be read; the picture is in `image`",
    "PermissionError": "files, processes and the network are closed; use `image` and the imaging libraries "
    "(image.save(name) and Image.open(name) work: they keep the file in memory)",
    "ModuleNotFoundError": _LIBRARIES,
    "ImportError": _LIBRARIES,
    "SyntaxError": "send complete, valid Python",
}
NO_THREADS = "threads and processes are not available here; call the function in a plain loop, or with map()"
NOT_FINITE = "the result has NaN or infinite values; use np.nan_to_num and values from 0 to 255"
MAX_FRAMES = 3
"""Lines of a traceback: the first of the snippet, and the last two."""


class ResultError(Exception):
    """The snippet's result is not a usable image; `kind` is the typed reason."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(text)
        self.kind = kind


def describe_error(error: BaseException, code: str, memory_mb: int) -> tuple[str, str]:
    """Kind and text of an exception: its name, the snippet's line, a hint."""
    return _described(error, _line(error, code), memory_mb)


def describe_traceback(error: BaseException, code: str, memory_mb: int, max_chars: int) -> tuple[str, str]:
    """Kind and text of an exception, with the snippet's lines that led to it above, as Python shows a traceback.

    Args:
        error: The exception.
        code: The snippet.
        memory_mb: The limit, for the text of a `MemoryError`.
        max_chars: Characters of the text; the message keeps half of them.
    """
    kind, text = _described(error, "", memory_mb)
    steps = [*_steps(error, code)]
    while steps and len("\n".join(steps)) > max_chars // 2:
        del steps[0]
    if not steps:
        return kind, text[:max_chars]
    above = "\n".join(["Traceback:", *steps, ""])
    return kind, above + text[: max_chars - len(above)]


def _described(error: BaseException, line: str, memory_mb: int) -> tuple[str, str]:
    if isinstance(error, ResultError):
        return error.kind, str(error)
    name = type(error).__name__
    if isinstance(error, guard.TooLargeError):
        return "too_large", f"too large{line}: {error}"
    if isinstance(error, MemoryError) or "Insufficient memory" in str(error) or "DecompressionBomb" in name:
        advice = f"too large: more than {memory_mb} MB of memory; crop or resize to a smaller size"
        return "memory", f"MemoryError{line}: {advice}"
    if isinstance(error, SystemExit | KeyboardInterrupt):
        return "no_result", f"no result: the code ended by {name}{line}; put the new image into `result`"
    if isinstance(error, SyntaxError):
        at = f" (line {error.lineno})" if error.filename == FILE and error.lineno else ""
        return name, f"{name}{at}: {error.msg}. Hint: {HINTS['SyntaxError']}"
    message = " ".join(str(error)[:3000].split())[:300]
    hint = NO_THREADS if "start new thread" in message else HINTS.get(name)
    return name, f"{name}{line}: {message}" + (f". Hint: {hint}" if hint else "")


def _line(error: BaseException, code: str) -> str:
    """` (line 3: `x = y`)`: the deepest line of the snippet in the traceback; empty if there is none."""
    number, step = 0, error.__traceback__
    # One pass without a list: a runaway recursion leaves millions of frames.
    while step is not None:
        if step.tb_frame.f_code.co_filename == FILE:
            number = step.tb_lineno
        step = step.tb_next
    lines = code.splitlines()
    return f" (line {number}: `{lines[number - 1].strip()[:80]}`)" if 0 < number <= len(lines) else ""


def _steps(error: BaseException, code: str) -> list[str]:
    """The lines of the snippet in the traceback, the deepest last; of many the first and the last two."""
    lines = re.split("\r\n|\r|\n", code)  # as Python counts them
    if isinstance(error, SyntaxError) and error.filename == FILE and error.lineno:
        return [_step(error.lineno, "", lines)]
    first: tuple[int, str] | None = None
    last, count, step = deque[tuple[int, str]](maxlen=MAX_FRAMES - 1), 0, error.__traceback__
    while step is not None:
        frame = step.tb_frame.f_code
        if frame.co_filename == FILE:
            place = step.tb_lineno, frame.co_name  # made a text at the end: there may be millions
            first, count = first or place, count + 1
            last.append(place)
        step = step.tb_next
    left_out = [f"  ... {count - MAX_FRAMES} more ..."] if count > MAX_FRAMES else []
    above = [_step(*first, lines)] if first is not None and count >= MAX_FRAMES else []
    return [*above, *left_out, *(_step(*place, lines) for place in last)]


def _step(number: int, function: str, lines: Sequence[str]) -> str:
    source = lines[number - 1].strip()[:80] if 0 < number <= len(lines) else ""
    where = f", in {function[:40]}" if function.isidentifier() else ""
    return f"  line {number}{where}: {source}"
