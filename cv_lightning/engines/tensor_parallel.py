"""One engine shared by several ranks: a leader runs the agent, and the followers repeat its engine commands.

vLLM's external launcher has an engine object on each rank, whose steps are collectives of the ranks that share it. All
of them must get the same requests in the same order before the same step. Agent loops on several ranks, with tools of
different speed, would not ensure that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from cv_lightning.engines.base import Completion, Engine, Request

if TYPE_CHECKING:
    import torch


class EngineCommands(NamedTuple):
    """What every rank does before its next step."""

    changes: list[Request | list[str]]
    """Requests to add and ids to abort, in order."""
    is_last: bool = False
    """True: the rollout has ended; there is no step."""


class LeaderEngine:
    """The engine of the leading rank, as the agent loop sees it.

    Args:
        engine: This rank's engine.
        broadcast: Sends commands to the followers.
    """

    def __init__(self, engine: Engine, broadcast: Callable[[EngineCommands], object]) -> None:
        self.engine, self.broadcast = engine, broadcast
        self.policy_version, self.max_model_len = engine.policy_version, engine.max_model_len
        self._changes: list[Request | list[str]] = []

    def add_request(self, request: Request) -> None:
        """Queue a request here and, once it is accepted, on the followers."""
        self.engine.add_request(request)
        self._changes.append(request)

    def abort(self, ids: Sequence[str]) -> None:
        """Forget requests."""
        self.engine.abort(ids)
        self._changes.append(list(ids))

    def step(self) -> list[Completion]:
        """Advance all ranks by one step."""
        self._send(is_last=False)
        return self.engine.step()

    def has_unfinished(self) -> bool:
        """True while any request is queued or running."""
        return self.engine.has_unfinished()

    def finish(self) -> None:
        """End `run_follower` on the other ranks."""
        self._send(is_last=True)

    def update_weights(self, named_tensors: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """Refused: every rank updates its own engine."""
        raise NotImplementedError("update the engine of each rank, not the leading one")

    def sleep(self) -> bool:
        """Refused: every rank puts its own engine to sleep."""
        raise NotImplementedError("put the engine of each rank to sleep, not the leading one")

    def close(self) -> None:
        """Do nothing: the engine itself stays open."""

    def _send(self, is_last: bool) -> None:
        changes, self._changes = self._changes, []
        self.broadcast(EngineCommands(changes, is_last))


def run_follower(
    engine: Engine, receive: Callable[[], EngineCommands], note_progress: Callable[[], None] = lambda: None
) -> None:
    """Repeat what the leading rank does until its rollout ends.

    Args:
        engine: This rank's engine.
        receive: Waits for the leader's next commands.
        note_progress: Called after every step.
    """
    while True:
        commands = receive()
        for change in commands.changes:
            if isinstance(change, Request):
                engine.add_request(change)
            else:
                engine.abort(change)
        if commands.is_last:
            return
        engine.step()
        note_progress()
