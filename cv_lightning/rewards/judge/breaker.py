"""A circuit breaker for one event loop: after many failures in a row nothing is sent for a while, then one request."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

LOOK_EVERY_S = 0.1


class CircuitBreaker:
    """Lets requests through while the other side works.

    Waiting costs no request: callers bound it with a time limit of their own.
    """

    def __init__(self, failures: int, pause_s: float) -> None:
        """Create it closed.

        Args:
            failures: failures in a row that open it.
            pause_s: seconds that it stays open before one request probes the other side.
        """
        self.limit, self.pause_s = failures, pause_s
        self.failures = 0
        self._open_until: float | None = None
        self._probing = False

    @property
    def is_open(self) -> bool:
        """True while nothing but a probe goes through."""
        return self._open_until is not None

    @asynccontextmanager
    async def admitted(self) -> AsyncIterator[None]:
        """Wait for admission; report the outcome with `succeeded` or `failed` inside."""
        probe = await self._admit()
        try:
            yield
        finally:
            if probe:
                self._probing = False

    async def _admit(self) -> bool:
        loop = asyncio.get_running_loop()
        while self._open_until is not None:
            left = self._open_until - loop.time()
            if left <= 0 and not self._probing:
                self._probing = True
                return True
            await asyncio.sleep(min(max(left, 0.01), LOOK_EVERY_S))
        return False

    def succeeded(self) -> None:
        """The other side answered: close."""
        self.failures, self._open_until = 0, None

    def failed(self) -> None:
        """The other side did not answer; open after too many in a row."""
        self.failures += 1
        if self.failures >= self.limit:
            self._open_until = asyncio.get_running_loop().time() + self.pause_s
