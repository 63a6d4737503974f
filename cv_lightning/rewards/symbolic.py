"""Symbolic equality of formulas by math-verify, in a process of its own.

A policy writes the formulas, and some take a computer algebra system for ever (9^9^9) or all memory. The process has
limits, and one that does not answer in time is killed; a caller waits for `timeout_s` at most.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import select
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from pathlib import Path

WORKER = Path(__file__).with_name("symbolic_worker.py")
START_S = 60.0
"""Time to import sympy, on a busy machine too."""
REMEMBERED = 10_000

_COMMAND = re.compile(r"\\[A-Za-z]+")
_WORD = re.compile(r"[^\W\d_]{2,}")
_FUNCTIONS = frozenset("sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh log ln exp sqrt pi".split())
_VARIABLE = re.compile(r"\s*\\?\(?\s*[A-Za-z](?:_\{?\w\}?)?(?:\([a-z]\))?\s*\Z")


def is_formula(text: str) -> bool:
    """True for a text that is a formula and nothing else, at most `x = ` before it.

    Words are none: a computer algebra system takes them for products of letters, in which anagrams are equal. Neither
    is an equation between two values ("41 = 42"), of which it would pick a side, nor a box within a text.
    """
    words = _WORD.findall(_COMMAND.sub(" ", text))
    left, equals, right = text.partition("=")
    named = not equals or (_VARIABLE.match(left) is not None and "=" not in right)
    bare = len(text.strip()) == 1 and text.strip().isalpha()
    return bool(text.strip()) and named and not bare and "\\boxed" not in text and _FUNCTIONS.issuperset(words)


class SymbolicComparer:
    """Compares formulas; safe to call from several threads. The process starts with the first question."""

    def __init__(self, timeout_s: float = 2.0) -> None:
        """Check that math-verify is there.

        Args:
            timeout_s: longest time for one comparison; a longer one counts as not equal.

        Raises:
            ValueError: it is not installed.
        """
        if importlib.util.find_spec("math_verify") is None:
            raise ValueError(
                "reward.mathematics needs the package math-verify: pip install 'cv-lightning[math]', or set it to false"
            )
        self.timeout_s = timeout_s
        self._process: subprocess.Popen[bytes] | None = None
        self._known: OrderedDict[tuple[str, str], bool] = OrderedDict()
        self._lock = threading.Lock()

    def __call__(self, answer: str, ground_truth: str) -> bool:
        """True if both are formulas and equal; False also where that cannot be told in time."""
        if not is_formula(answer) or not is_formula(ground_truth):
            return False
        with self._lock:
            pair = answer, ground_truth
            if pair not in self._known:
                self._known[pair] = self._ask(pair)
                if len(self._known) > REMEMBERED:
                    self._known.popitem(last=False)
            return self._known[pair]

    def _ask(self, pair: tuple[str, str]) -> bool:
        process = self._started()
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps(pair).encode() + b"\n")
            process.stdin.flush()
        except BrokenPipeError:  # the last question was its end
            self._kill()
            return False
        said = self._line(process, self.timeout_s)
        if said is None:
            self._kill()
        return said == b"1"

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is not None and self._process.poll() is None:
            return self._process
        # -P: the folder of the script is no place to import from
        command = [sys.executable, "-P", "-W", "ignore", str(WORKER)]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, bufsize=0)
        if self._line(self._process, START_S) != b"ready":
            self._kill()
            raise RuntimeError(f"math-verify does not start within {START_S:g} s; try: {' '.join(command)}")
        return self._process

    @staticmethod
    def _line(process: subprocess.Popen[bytes], timeout_s: float) -> bytes | None:
        """The next line without its end; None if none comes in time or the process has ended."""
        assert process.stdout is not None
        descriptor, line, end = process.stdout.fileno(), b"", time.monotonic() + timeout_s
        while not line.endswith(b"\n"):
            ready, _, _ = select.select([descriptor], [], [], max(0.0, end - time.monotonic()))
            piece = os.read(descriptor, 64) if ready else b""
            if not piece:
                return None
            line += piece
        return line.strip()

    def _kill(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                stream.close()

    def close(self) -> None:
        """End the process."""
        with self._lock:
            self._kill()
