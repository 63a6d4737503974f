"""A queue in which the owners of waiting items take turns."""

from __future__ import annotations

from collections import OrderedDict, deque
from typing import Generic, TypeVar

Item = TypeVar("Item")


class FairQueue(Generic[Item]):
    """First in, first out for one owner; round robin between owners. Used by one thread."""

    def __init__(self) -> None:
        self._queues: OrderedDict[str, deque[Item]] = OrderedDict()
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def push(self, owner: str, item: Item, *, front: bool = False) -> None:
        """Add an item at the end of its owner's line, or in front of it."""
        queue = self._queues.setdefault(owner, deque())
        (queue.appendleft if front else queue.append)(item)
        self._length += 1

    def peek(self) -> Item:
        """The item whose turn it is; the queue must not be empty."""
        return next(iter(self._queues.values()))[0]

    def pop(self) -> Item:
        """Take that item; its owner goes to the end of the line."""
        owner, queue = self._queues.popitem(last=False)
        item = queue.popleft()
        if queue:
            self._queues[owner] = queue
        self._length -= 1
        return item

    def clear(self) -> list[Item]:
        """Empty the queue; returns what was in it."""
        items = [item for queue in self._queues.values() for item in queue]
        self._queues.clear()
        self._length = 0
        return items
