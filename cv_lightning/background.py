"""An asyncio thread for sandbox calls and judge requests, beside the engine's thread."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")

logger = logging.getLogger(__name__)

CLOSE_S = 10.0
"""Seconds in which cancelled work has to end."""


class Background:
    """An asyncio loop in a daemon thread. Start once, submit coroutines, close."""

    def __init__(self, name: str = "cv-lightning-io") -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.run_forever()

    def submit(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Run a coroutine on the thread; returns the future of its result."""
        return asyncio.run_coroutine_threadsafe(work, self.loop)

    def close(self) -> None:
        """Cancel running work and end the thread; may be called twice."""
        if not self._thread.is_alive():
            return
        try:
            self.submit(_cancel_all()).result(timeout=CLOSE_S)
        except TimeoutError:  # the caller has more to close; the thread is a daemon
            logger.warning("work on the background thread did not end within %g s of being cancelled", CLOSE_S)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(timeout=CLOSE_S)
        if not self._thread.is_alive():
            self.loop.close()


async def _cancel_all() -> None:
    others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
