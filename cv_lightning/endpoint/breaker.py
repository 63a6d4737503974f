"""A circuit breaker for one event loop: after many failures in a row nothing is sent for a while, then one request."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

LOOK_EVERY_S = 0.1


class OtherSideDownError(Exception):
    """Nothing has been answered for longer than the breaker's patience."""


class CircuitBreaker:
    """Lets requests through while the other side works.

    Waiting costs no request. It ends with `OtherSideDownError` once the other side has been down for long, so that a
    long queue behind a dead server is told at once and not by one time limit after another.
    """

    def __init__(self, failures: int, pause_s: float, patience_s: float = math.inf) -> None:
        """Create it closed.

        Args:
            failures: failures in a row that open it.
            pause_s: seconds that it stays open before one request probes the other side.
            patience_s: seconds after opening from which on nobody is made to wait.
        """
        self.limit, self.pause_s, self.patience_s = failures, pause_s, patience_s
        self.failures = 0
        self._open_until: float | None = None
        self._down_since = math.inf
        self._quiet_until = -math.inf
        self._probing = False

    @asynccontextmanager
    async def admitted(self) -> AsyncIterator[None]:
        """Wait for admission; report the outcome with `succeeded` or `failed` inside.

        Raises:
            OtherSideDownError: the other side has been down for longer than the patience.
        """
        probe = await self._admit()
        try:
            yield
        finally:
            if probe:
                self._probing = False

    async def _admit(self) -> bool:
        loop = asyncio.get_running_loop()
        while (quiet := self._quiet_until - loop.time()) > 0:
            await asyncio.sleep(quiet)
        while self._open_until is not None:
            left = self._open_until - loop.time()
            if left <= 0 and not self._probing:
                self._probing = True
                return True
            if loop.time() - self._down_since > self.patience_s:
                raise OtherSideDownError(f"nothing answered for {loop.time() - self._down_since:.0f} s")
            await asyncio.sleep(min(max(left, 0.01), LOOK_EVERY_S))
        return False

    def succeeded(self) -> None:
        """The other side answered: close."""
        self.failures, self._open_until, self._down_since = 0, None, math.inf

    def failed(self) -> None:
        """The other side did not answer; open after too many in a row."""
        self.failures += 1
        if self.failures >= self.limit:
            now = asyncio.get_running_loop().time()
            self._open_until, self._down_since = now + self.pause_s, min(self._down_since, now)

    def quiet(self, seconds: float) -> None:
        """The other side asks to be left alone for so long: nobody sends before that."""
        self._quiet_until = max(self._quiet_until, asyncio.get_running_loop().time() + seconds)
