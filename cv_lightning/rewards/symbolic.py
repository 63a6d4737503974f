"""Symbolic equality of formulas by math-verify, in a separate process.

A policy writes the formulas, and some would occupy a computer algebra system for ever (9^9^9) or take all memory. The
process has limits, and is killed when it does not answer in time; a caller waits at most `timeout_s`.
"""

from __future__ import annotations

import importlib.util
import json
import re
import select
import subprocess
import sys
import threading
from functools import lru_cache
from pathlib import Path

WORKER = Path(__file__).with_name("symbolic_worker.py")
START_S = 60.0
"""Time to import sympy, also on a busy machine."""
REMEMBERED = 10_000
"""Comparisons that are not made again."""

_COMMAND = re.compile(r"\\[A-Za-z]+")
_WORD = re.compile(r"[^\W\d_]{2,}")
_FUNCTIONS = frozenset("sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh log ln exp sqrt pi".split())
_VARIABLE = re.compile(r"\s*\\?\(?\s*[A-Za-z](?:_\{?\w\}?)?(?:\([a-z]\))?\s*\Z")


def is_formula(text: str) -> bool:
    """True for a text that is only a formula, with at most `x = ` before it.

    Words are refused, because a computer algebra system reads them as products of letters, in which anagrams are equal;
    so are an equation between two values ("41 = 42"), of which it would pick one side, and a box within a text.
    """
    words = _WORD.findall(_COMMAND.sub(" ", text))
    left, equals, right = text.partition("=")
    named = not equals or (_VARIABLE.match(left) is not None and "=" not in right)
    bare = len(text.strip()) == 1 and text.strip().isalpha()
    return bool(text.strip()) and named and not bare and "\\boxed" not in text and _FUNCTIONS.issuperset(words)


class SymbolicComparer:
    """Compares formulas; safe to call from several threads. The process starts with the first question."""

    def __init__(self, timeout_s: float = 2.0) -> None:
        """Check that math-verify is installed.

        Args:
            timeout_s: Limit of one comparison; a longer one counts as not equal.

        Raises:
            ValueError: It is not installed.
        """
        if importlib.util.find_spec("math_verify") is None:
            raise ValueError(
                "reward.mathematics needs the package math-verify: pip install 'cv-lightning[math]', or set it to false"
            )
        self.timeout_s = timeout_s
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()
        self._compare = lru_cache(REMEMBERED)(self._ask)

    def __call__(self, answer: str, ground_truth: str) -> bool:
        """True if both are formulas and proven equal in time."""
        if not is_formula(answer) or not is_formula(ground_truth):
            return False
        with self._lock:
            return self._compare(answer, ground_truth)

    def _ask(self, answer: str, ground_truth: str) -> bool:
        process = self._started()
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps([answer, ground_truth]).encode() + b"\n")
            said = self._line(process, self.timeout_s)
        except BrokenPipeError:  # the process died after its last answer
            said = b""
        if not said:
            self._kill()
        return said == b"1"

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is not None and self._process.poll() is None:
            return self._process
        # -P: nothing is imported from the script's folder. A session of its own: Ctrl-C in the terminal, which lets a
        # run finish its iteration, does not reach the process.
        command = [sys.executable, "-P", "-W", "ignore", str(WORKER)]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            start_new_session=True,
        )
        if self._line(self._process, START_S) != b"ready":
            self._kill()
            raise RuntimeError(f"math-verify does not start within {START_S:g} s; try: {' '.join(command)}")
        return self._process

    @staticmethod
    def _line(process: subprocess.Popen[bytes], timeout_s: float) -> bytes:
        """The next line, which the process writes as a whole; empty if none comes in time or it has ended."""
        assert process.stdout is not None
        ready, _, _ = select.select([process.stdout], [], [], timeout_s)
        return process.stdout.readline().strip() if ready else b""

    def _kill(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.communicate()  # closes the pipes

    def close(self) -> None:
        """End the process."""
        with self._lock:
            self._kill()
