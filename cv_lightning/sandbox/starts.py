"""Pauses between failed starts of fork servers, and evidence of who killed a child."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
from dataclasses import dataclass
from pathlib import Path

log = logging.getLogger(__name__)

FREE_FAILURES = 3
"""Number of failed starts in a row from which the pauses grow."""
SHORT_PAUSE_S, FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.05, 0.5, 30.0
FROM_OUTSIDE = frozenset(
    (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
)
"""Signals that a sealed snippet cannot cause: it cannot send any, and its faults and limits raise others. The CPU limit
also sends SIGKILL; the fork server recognises that one by the time used."""


@dataclass(slots=True)
class Starts:
    """Start attempts for one kind of fork server, with growing pauses while they fail."""

    kind: str
    failures: int = 0
    """Fork servers in a row that died before they were ready."""
    not_before: float = 0.0
    """Monotonic time before which no further one is started."""
    working_at: float = 0.0
    """Monotonic time at which one was last known to work, or was first needed."""

    def failed(self, now: float, why: str) -> None:
        """Count a failed start, and set the pause."""
        self.failures += 1
        if self.failures < FREE_FAILURES:
            self.not_before = now + SHORT_PAUSE_S
            return
        pause = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2.0 ** (self.failures - FREE_FAILURES))
        self.not_before = now + pause
        log.error(
            "sandbox: %d %s fork servers in a row died while starting (%s); the next starts in %.1f s, snippets wait",
            self.failures, self.kind, why, pause,
        )  # fmt: skip

    def worked(self) -> None:
        """Reset the failures once a fork server is ready."""
        if self.failures >= FREE_FAILURES:
            log.warning("sandbox: %s fork servers work again, after %d failed starts", self.kind, self.failures)
        self.failures, self.not_before = 0, 0.0


class KillEvidence:
    """Distinguishes children that their snippet ended from those that were killed from outside.

    Args:
        memory_mb: Memory limit of a snippet.
    """

    def __init__(self, memory_mb: int) -> None:
        self._own_bytes = memory_mb * 2**20 // 2
        self._out_of_memory_kills = _out_of_memory_kills()

    def is_from_outside(self, wait_status: int, peak_bytes: int) -> bool:
        """True if the child was killed, and not for the memory that its snippet used.

        Args:
            wait_status: As `wait` gives it; the deadline and the CPU limit are ruled out already.
            peak_bytes: Peak memory of the child beyond that of its fork server.
        """
        if not os.WIFSIGNALED(wait_status) or os.WTERMSIG(wait_status) not in FROM_OUTSIDE:
            return False
        before, self._out_of_memory_kills = self._out_of_memory_kills, _out_of_memory_kills()
        ran_out = self._out_of_memory_kills > before
        return not (ran_out and peak_bytes >= self._own_bytes)


def _out_of_memory_kills() -> int:
    """Number of processes that the kernel has killed because memory ran out; 0 if unknown."""
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/vmstat").read_text(encoding="ascii").splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return 0
