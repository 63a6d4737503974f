"""One engine shared by several ranks: one of them leads, the others repeat what it does.

vLLM's external launcher has an engine object on each rank, whose steps are collectives of the ranks that share it. All
of them must see the same requests in the same order before the same step; an agent loop on each, with tools of its own
speed, would not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from cv_lightning.engines.base import Completion, Engine, Request

if TYPE_CHECKING:
    import torch


class Orders(NamedTuple):
    """What happens before the next step."""

    changes: list[Request | list[str]]
    """Requests to add and ids to abort, in order."""
    over: bool = False
    """True: the rollout has ended, and there is no step."""


class LeadingEngine:
    """The engine as the agent loop of the leading rank sees it.

    Args:
        engine: this rank's.
        tell: hands orders to the other ranks.
    """

    def __init__(self, engine: Engine, tell: Callable[[Orders], None]) -> None:
        self.engine, self.tell = engine, tell
        self.policy_version, self.max_model_len = engine.policy_version, engine.max_model_len
        self._changes: list[Request | list[str]] = []

    def add_request(self, request: Request) -> None:
        """Queue a request here and, once it is accepted, there."""
        self.engine.add_request(request)
        self._changes.append(request)

    def abort(self, ids: Sequence[str]) -> None:
        """Forget requests."""
        self.engine.abort(ids)
        self._changes.append(list(ids))

    def step(self) -> list[Completion]:
        """Advance all ranks by one step."""
        self._send(over=False)
        return self.engine.step()

    def has_unfinished(self) -> bool:
        """True while any request is queued or running."""
        return self.engine.has_unfinished()

    def finish(self) -> None:
        """Release the other ranks."""
        self._send(over=True)

    def update_weights(self, named_tensors: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """Not here: every rank updates its own engine."""
        raise NotImplementedError("update the engine of each rank, not the leading one")

    def sleep(self) -> bool:
        """Not here, likewise."""
        raise NotImplementedError("put the engine of each rank to sleep, not the leading one")

    def close(self) -> None:
        """The engine itself stays open."""

    def _send(self, over: bool) -> None:
        changes, self._changes = self._changes, []
        self.tell(Orders(changes, over))


def follow(engine: Engine, hear: Callable[[], Orders], get_on: Callable[[], None] = lambda: None) -> None:
    """Repeat what the leading rank does until its rollout ends.

    Args:
        engine: this rank's.
        hear: waits for the next orders.
        get_on: called after every step.
    """
    while True:
        orders = hear()
        for change in orders.changes:
            if isinstance(change, Request):
                engine.add_request(change)
            else:
                engine.abort(change)
        if orders.over:
            return
        engine.step()
        get_on()
