"""The playground observes rollouts through wrapper Engine and Sandbox objects; the agent loop needs no hooks.

The agent loop is that of training and evaluation, unchanged. To try an edited snippet, the wrapper engine answers with
the earlier turns and the edited one, and then passes on to the real engine.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from PIL import Image

from cv_lightning.dialects import CUT, HERMES, Dialect
from cv_lightning.engines import Completion, Engine, Request
from cv_lightning.rewards.markup import THINK_CLOSE
from cv_lightning.tools import CodeRunner, CodeTool
from cv_lightning.types import EngineError, SandboxResult

if TYPE_CHECKING:
    import torch


class WatchedEngine:
    """Engine of one trajectory: returns given turns first, then those of the real engine. It can be stopped.

    `on_turn` is called with each finished turn, on the thread that steps.
    """

    def __init__(self, engine: Engine, given: Sequence[Completion], on_turn: Callable[[Completion], None]) -> None:
        self.engine, self.on_turn = engine, on_turn
        self.policy_version, self.max_model_len = engine.policy_version, engine.max_model_len
        self.given = deque(given)
        self.ready: list[Completion] = []
        self.stopped = threading.Event()
        """When set, from any thread, the trajectory ends after the engine's next step."""
        self.current = ""

    def add_request(self, request: Request) -> None:
        """Answer with the next given turn, or ask the real engine; EngineError once stopped."""
        if self.stopped.is_set():
            raise EngineError("stopped")
        self.current = request.id
        if self.given:
            self.ready.append(replace(self.given.popleft(), id=request.id, prompt_ids=None))
        else:
            self.engine.add_request(request)

    def step(self) -> list[Completion]:
        """Return given turns, or make a step of the real engine; returns nothing once stopped."""
        if self.stopped.is_set():
            self.abort([self.current])
            return []
        finished, self.ready = (self.ready, []) if self.ready else (self.engine.step(), [])
        for completion in finished:
            self.on_turn(completion)
        return finished

    def has_unfinished(self) -> bool:
        """True while a turn is under way."""
        return bool(self.ready) or self.engine.has_unfinished()

    def abort(self, ids: Sequence[str]) -> None:
        """Forget requests."""
        self.ready = [completion for completion in self.ready if completion.id not in set(ids)]
        self.engine.abort(ids)

    def update_weights(self, named_tensors: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """Update the real engine."""
        self.engine.update_weights(named_tensors, version)
        self.policy_version = version

    def sleep(self) -> bool:
        """Do not sleep, because the next question may come at any time."""
        return False

    def close(self) -> None:
        """Do not close the real engine, which its owner closes."""


class WatchedSandbox:
    """Sandbox that reports its snippets: `on_result` is called with None when one starts, then with its result.

    The calls come from the background thread.
    """

    def __init__(self, sandbox: CodeRunner, on_result: Callable[[SandboxResult | None], None]) -> None:
        self.sandbox, self.on_result = sandbox, on_result

    async def run(self, image: Image.Image, code: str, *, owner: str = "", max_shown: int = 0) -> SandboxResult:
        """Run a snippet; see `CodeRunner`."""
        self.on_result(None)
        result = await self.sandbox.run(image, code, owner=owner, max_shown=max_shown)
        self.on_result(result)
        return result


def with_code(text: str, code: str, image_index: int, dialect: Dialect = HERMES) -> str:
    """Replace the snippet in the call of an assistant turn; the thought before it is kept."""
    thought, close, rest = text.rpartition(THINK_CLOSE)
    spoken = dialect.find(rest).rest.partition(CUT)[0]
    call = dialect.render(CodeTool.name, {"code": code, "image_index": image_index})
    return f"{thought}{close}{spoken}{call}"


def edited_turns(
    turns: Sequence[Completion], index: int, text: str, encode: Callable[[str], Sequence[int]]
) -> list[Completion]:
    """The turns before `index`, and that turn with another text, which `encode` turns into ids."""
    ids = list(encode(text))
    edited = Completion(id="", token_ids=ids, logprobs=[0.0] * len(ids), stopped=True, prompt_ids=None)
    return [*turns[:index], edited]
