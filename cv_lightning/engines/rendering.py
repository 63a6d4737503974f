"""Prompts with images are prepared on a thread of their own while the engine decodes.

Processing one image of 6.4 megapixels takes a third of a second; on the engine's thread every request would wait.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple


class Rendered(NamedTuple):
    """A request whose prompt is prepared, or was refused."""

    id: str
    params: Any
    """Sampling parameters, as they were submitted."""
    prompt: Any
    """What the engine takes; None if `error` is set."""
    error: str = ""
    """Why the prompt was refused."""
    dropped: bool = False
    """The request was aborted after its preparation had begun."""


@dataclass(slots=True)
class _Waiting:
    id: str
    params: Any
    future: Future[Any]
    dropped: bool = False


class RenderQueue:
    """Prepares prompts one after another and hands them out in the order in which they were submitted.

    There is one thread and one order because vLLM keeps two caches of processed images, one that is filled by rendering
    and one by adding requests; they stay equal only if both see the same images in the same order. For the same reason
    an aborted request that was begun is handed out too, marked as dropped.

    Args:
        render: Prepares one prompt; raises ValueError for one that it refuses.
    """

    def __init__(self, render: Callable[[Any], Any]) -> None:
        self._render = render
        self._waiting: deque[_Waiting] = deque()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="rendering")

    def __len__(self) -> int:
        """Number of prompts that were not handed out yet, without dropped ones."""
        return sum(not item.dropped for item in self._waiting)

    def submit(self, id: str, prompt: Any, params: Any) -> None:
        """Queue a prompt."""
        self._waiting.append(_Waiting(id, params, self._thread.submit(self._render, prompt)))

    def take(self, *, wait: bool) -> list[Rendered]:
        """Hand out what is ready, in order.

        Args:
            wait: Wait for the first prompt if it is not ready.
        """
        ready: list[Rendered] = []
        while self._waiting and (self._waiting[0].future.done() or (wait and not ready)):
            ready.append(_result(self._waiting.popleft()))
        return ready

    def take_all(self) -> list[Rendered]:
        """Wait for everything and hand it out, in order."""
        return [_result(self._waiting.popleft()) for _ in range(len(self._waiting))]

    def drop(self, ids: Sequence[str]) -> None:
        """Forget prompts; one whose preparation has begun is handed out as dropped."""
        wanted = set(ids)
        kept: deque[_Waiting] = deque()
        for item in self._waiting:
            item.dropped = item.dropped or item.id in wanted
            if not (item.dropped and item.future.cancel()):
                kept.append(item)
        self._waiting = kept

    def close(self) -> None:
        """Forget everything and end the thread."""
        self._waiting.clear()
        self._thread.shutdown(wait=True, cancel_futures=True)


def _result(item: _Waiting) -> Rendered:
    try:
        return Rendered(item.id, item.params, item.future.result(), dropped=item.dropped)
    except ValueError as error:
        return Rendered(item.id, item.params, None, str(error) or type(error).__name__, item.dropped)
