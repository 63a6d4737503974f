"""Runs hostile, faulty and harmless snippets and judges whether each was contained.

The packaged cases are in cases.json beside this file; other files of the same format (a list under `cases`, each with
name, category, code, expect) are judged by the same rules. A case with `"text": true` runs with printed text and
several images; all of a file do so where the self-test is asked to.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import resource
import socket
import subprocess
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from cv_lightning.sandbox.config import SandboxConfig
from cv_lightning.sandbox.pool import WATCHDOG_S
from cv_lightning.sandbox.reading import readable
from cv_lightning.sandbox.wire import CUT_OUT
from cv_lightning.types import DataError, SandboxResult, ToolStatus


class Sandboxed(Protocol):
    """The part of `Sandbox` that the self-test uses; the sandbox itself runs the self-test when it starts."""

    config: SandboxConfig

    @property
    def layers(self) -> dict[str, str]:
        """State of every isolation layer."""

    @property
    def stats(self) -> dict[str, float]:
        """Counters since the start."""

    def server_pids(self) -> list[int]:
        """Processes of the fork servers."""

    def run_sync(self, image: Image.Image, code: str, *, owner: str = "", max_shown: int = 0) -> SandboxResult:
        """Run a snippet on an image."""


PORT = 39871
SECRET_NAME, SECRET = "SBX_SECRET_TOKEN", "s3cr3t"
CANARY = "/tmp/sbx_secret.png"
SLACK_S = 0.5
"""A timeout must come at most this long after its limit."""
MAX_GROWTH_KB = 256 << 10
"""Largest growth of this process during a case."""
VICTIM = "VICTIM_PID"
"""Placeholder in a case's code for the process id of a victim, a process of the user that runs the test."""
MAX_SHOWN = 4
"""Images that a case with text may show."""
MAX_ESCAPE = 4
"""Characters that stand for one byte of what was printed, at most; beside them there is the mark of a cut."""
NEXT_JOB = "assert np.mean(np.zeros(4)) == 0\ndef f(x):\n    return x.rotate(90)\nresult = f(image)"
"""Runs after every case: the state must be clean."""
_FAILED = (ToolStatus.ERROR, ToolStatus.KILLED)
_JUDGED_ALWAYS = ("no_leak", "no_attach", "parent_alive", "bounded_stdout", "victim_alive")
"""Expectations that `_run_case` judges for every case."""
_OTHERWISE: dict[str, ToolStatus | None] = {
    "error": None,
    "killed_or_error": None,
    "any": None,
    "error_or_timeout": ToolStatus.TIMEOUT,
    "killed_or_error_or_ok": ToolStatus.OK,
    "ok_or_error": ToolStatus.OK,
}
"""Expectations of an error, and the status that each allows instead of one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One snippet and its expected result."""

    name: str
    category: str
    code: str
    expect: str
    text: bool = False
    """Run with printed text and several images."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CaseResult:
    """How a case ended."""

    name: str
    ok: bool
    got: str


def load_cases(path: str | Path) -> list[Case]:
    """Cases of a file.

    Raises:
        DataError: There is no such file, it is not JSON, or a case lacks name, code or expect.
    """
    try:
        rows = json.loads(Path(path).read_text(encoding="utf-8"))["cases"]
        return [
            Case(
                name=row["name"],
                category=row.get("category", ""),
                code=row["code"],
                expect=row["expect"],
                text=bool(row.get("text")),
            )
            for row in rows
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: not a corpus of cases with name, code and expect ({error!r})") from error


PACKAGED = Path(__file__).with_name("cases.json")
START_NAMES = (
    "file_read file_write socket_udp fork execve kill_parent signal_victim ptrace_parent memory benign"
).split()
START_CASES = tuple(case for case in load_cases(PACKAGED) if case.name in START_NAMES)
"""The quick subset that runs at every start."""


@functools.cache
def test_image() -> Image.Image:
    """512x512 RGB, every pixel different from its neighbours. All cases share it; it is compared after each."""
    y, x = np.mgrid[0:512, 0:512]
    return Image.fromarray(np.stack([x % 256, y % 256, (x * 7 + y * 13) % 256], axis=-1).astype(np.uint8))


class Listener:
    """Counts TCP connections to 127.0.0.1:39871."""

    def __init__(self) -> None:
        self.reached = 0
        self._socket = socket.socket()
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with contextlib.suppress(OSError):  # in use: a snippet would then reach the listener of another process
            self._socket.bind(("127.0.0.1", PORT))
            self._socket.listen()
            threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                connection, _ = self._socket.accept()
                self.reached += 1
                connection.close()

    def close(self) -> None:
        """Stop listening."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


class Victim:
    """A process that sleeps until a signal ends it; started by the first case that contains `VICTIM`."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def code_for(self, case: Case) -> str:
        """The case's code with the victim's process id filled in."""
        if VICTIM not in case.code:
            return case.code
        if not self.is_alive():
            self._process = subprocess.Popen(["sleep", "300"], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        assert self._process is not None
        return case.code.replace(VICTIM, str(self._process.pid))

    def is_alive(self) -> bool:
        """True if the victim runs: neither ended nor stopped."""
        if self._process is None or self._process.poll() is not None:
            return False
        return Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()[0] in "RSD"

    def close(self) -> None:
        """End the victim."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()


@dataclass(frozen=True, slots=True)
class Surroundings:
    """Targets that the cases try to reach."""

    listener: Listener
    victim: Victim


@contextlib.contextmanager
def surroundings() -> Iterator[Surroundings]:
    """Provide the targets of the cases: a secret in the environment, an image file, a listener, a victim."""
    before = os.environ.get(SECRET_NAME)
    os.environ[SECRET_NAME] = SECRET
    with contextlib.suppress(OSError):  # a file of another user serves as well
        Image.new("RGB", (8, 8), (200, 10, 10)).save(CANARY)
        os.chmod(CANARY, 0o644)
    try:
        with contextlib.closing(Listener()) as listener, contextlib.closing(Victim()) as victim:
            yield Surroundings(listener, victim)
    finally:
        os.environ.pop(SECRET_NAME) if before is None else os.environ.update({SECRET_NAME: before})
        with contextlib.suppress(OSError):
            os.unlink(CANARY)


def run_cases(sandbox: Sandboxed, cases: Iterable[Case], *, text: bool = False) -> list[CaseResult]:
    """Run cases one after the other, with a harmless job after each.

    Args:
        sandbox: Started.
        cases: The cases.
        text: Run all of them with printed text and several images. A result that is no image is then a text, and no
            error.
    """
    with surroundings() as around:
        return [_run_case(sandbox, case, around, text=text or case.text) for case in cases]


def _tracer() -> str:
    status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    return next((line for line in status.splitlines() if line.startswith("TracerPid:")), "")


def _peak_kb() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def strays(sandbox: Sandboxed) -> list[int]:
    """Processes in the sessions of the fork servers that are neither fork servers nor their children."""
    servers = set(sandbox.server_pids())
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            # pid (name) state ppid group session ...
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            parent, session = int(fields[1]), int(fields[3])
            if session in servers and int(folder.name) not in servers and parent not in servers:
                found.append(int(folder.name))
    return found


@dataclass(frozen=True, slots=True)
class _Run:
    """A case that has run."""

    sandbox: Sandboxed
    case: Case
    result: SandboxResult
    seconds: float
    reached: int
    """Connections to the listener meanwhile."""

    max_shown: int
    """Images that the case might show; 0: one image and no text."""

    def fault(self, expectation: str) -> str:
        """Why one part of the expectation is not met; empty if it is."""
        kind, _, detail = expectation.strip().partition(":")
        if kind == "timeout":
            limit = self.sandbox.config.timeout_s + SLACK_S
            # The running time counts; a busy machine may report it later.
            in_time = self.result.elapsed_s <= limit and self.seconds <= limit + WATCHDOG_S
            is_met = self.result.status is ToolStatus.TIMEOUT and in_time
            return "" if is_met else f"no timeout within {limit} s ({self.seconds:.2f} s)"
        if kind == "ok_image":
            return self._image_fault(detail)
        if kind == "says":
            return "" if detail in self.result.text else f"the text does not say {detail!r}"
        if kind == "says_not":
            return f"the text says {detail!r}" if detail in self.result.text else ""
        if kind == "ok_text":
            is_text = self.result.status is ToolStatus.OK and self.result.image is None and bool(self.result.text)
            return "" if is_text else f"{self.result.status} where a text was expected"
        if kind == "no_side_effect":
            return f"{detail} exists" if os.path.exists(detail) else ""
        if kind == "no_connect":
            return "the listener was reached" if self.reached else ""
        if kind in _OTHERWISE:
            return self._status_fault(kind, detail)
        return "" if kind in _JUDGED_ALWAYS else f"unknown expectation {kind}"

    def _image_fault(self, detail: str) -> str:
        image = self.result.image
        if image is None or image.mode != "RGB":
            return "no RGB image"
        if "info dropped" in detail and image.info:
            return "the result carries metadata"
        if "same twice" in detail:
            again = self.sandbox.run_sync(test_image(), self.case.code, max_shown=self.max_shown).image
            return "" if again is not None and again.tobytes() == image.tobytes() else "another result the second time"
        return ""

    def _status_fault(self, kind: str, detail: str) -> str:
        """Why the status is not the expected one. In a private root a path outside does not exist at all."""
        result = self.result
        is_text = result.status is ToolStatus.OK and not result.made and self.max_shown > 0
        if is_text and not self.case.text and not detail.endswith("Error"):
            return ""  # what is no image is an error without text, and a text with it; a denied attempt stays an error
        if result.status in (ToolStatus.INFRASTRUCTURE_ERROR, ToolStatus.REJECTED):
            return f"it did not run: {result.status}"
        if kind == "any" or result.status in _FAILED:
            hidden = self.sandbox.layers.get("private_root", "").startswith("active")
            equivalent = {
                "MemoryError": ("too_large", "SIGKILL"),
                "PermissionError": ("FileNotFoundError", "NotADirectoryError") if hidden else (),
            }
            word = detail if kind == "error" and detail.endswith("Error") else ""
            named = word in result.error or result.error_kind in equivalent.get(word, ())
            return "" if named or result.status is ToolStatus.KILLED else f"the error does not name {word}"
        return "" if _OTHERWISE[kind] is result.status else f"{result.status} where {kind} was expected"

    def hit_another_limit(self) -> bool:
        """True if a case that uses up a resource was stopped in time by another limit than the expected one."""
        if self.seconds > self.sandbox.config.timeout_s + SLACK_S:
            return False
        if self.case.expect == "timeout":
            return self.result.error_kind == "memory"
        is_exhaustion = self.case.expect in ("error:MemoryError", "killed_or_error")
        return is_exhaustion and self.result.status is ToolStatus.TIMEOUT


def _run_case(sandbox: Sandboxed, case: Case, around: Surroundings, *, text: bool) -> CaseResult:
    image, expected, max_shown = test_image(), case.expect.split(";"), MAX_SHOWN if text else 0
    for part in expected:
        if part.startswith("no_side_effect:"):
            with contextlib.suppress(OSError):
                os.unlink(part.split(":", 1)[1])
    case = replace(case, code=around.victim.code_for(case))
    pixels, reached, restarts = image.tobytes(), around.listener.reached, sandbox.stats.get("restarts", 0)
    tracer, peak_kb, begun = _tracer(), _peak_kb(), time.monotonic()
    result = sandbox.run_sync(image, case.code, owner="self-test", max_shown=max_shown)
    run = _Run(sandbox, case, result, time.monotonic() - begun, around.listener.reached - reached, max_shown)
    unmet = list(filter(None, map(run.fault, expected)))
    harm = {
        "a fork server died": sandbox.stats.get("restarts", 0) > restarts,
        "the secret is in the text": SECRET in "\n".join((result.error, result.text, repr(result.operations))),
        "the secret is in the image": any(SECRET.encode() in made.tobytes() for made in result.made),
        "the text is too long": len(result.text) > MAX_ESCAPE * sandbox.config.max_text_bytes + len(CUT_OUT),
        "control characters are in the text": any(readable(said) != said for said in (result.text, result.error)),
        "this process is traced": _tracer() != tracer,
        "memory of this process has grown": _peak_kb() > peak_kb + MAX_GROWTH_KB,
        "a process of it still runs": bool(strays(sandbox)),
        "the caller's image has changed": image.tobytes() != pixels,
    }
    after = sandbox.run_sync(image, NEXT_JOB)
    is_clean = after.image is not None and after.image.tobytes() == image.rotate(90).tobytes()
    harm[f"the next job failed: {after.status} {after.error[:80]}"] = not is_clean
    harm["a signal reached the victim"] = "victim_alive" in expected and not around.victim.is_alive()
    got = f"{result.status} {result.error_kind} {result.error[:160]}".strip()
    if len(unmet) == 1 and run.hit_another_limit():
        # Contained as well: which of the limits strikes first depends on the machine.
        unmet, got = [], f"(another limit struck first; expected {case.expect}) {got}"
    faults = [*(name for name, holds in harm.items() if holds), *unmet]
    return CaseResult(name=case.name, ok=not faults, got="; ".join([*faults, got]))


def report(sandbox: Sandboxed, results: Iterable[CaseResult]) -> dict[str, Any]:
    """JSON form: layers, passed, failed, cases."""
    rows = list(results)
    return {
        "layers": sandbox.layers,
        "passed": sum(row.ok for row in rows),
        "failed": sum(not row.ok for row in rows),
        "cases": [{"name": row.name, "ok": row.ok, "got": row.got} for row in rows],
    }
