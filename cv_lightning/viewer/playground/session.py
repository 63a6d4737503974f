"""The playground without its display: questions to one model, which can be watched, edited and saved."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from PIL import Image

from cv_lightning.agent.config import AgentConfig
from cv_lightning.agent.dialogue import DialogueEncoder
from cv_lightning.agent.driver import Rollout
from cv_lightning.agent.protocol import ParsedTurn, parse_turn
from cv_lightning.agent.request import RolloutRequest
from cv_lightning.background import Background
from cv_lightning.engines import Completion, EngineConfig, SamplingConfig, build_engine, engine_kind
from cv_lightning.files import whole_file
from cv_lightning.images import content_hash
from cv_lightning.models.loading import PolicyConfig, load_adapter, load_policy
from cv_lightning.sandbox import Sandbox, SandboxConfig
from cv_lightning.tools import DEFAULT_TOOLS
from cv_lightning.trajectory.store import IMAGES, StoreConfig, TrajectoryWriter, encode_image
from cv_lightning.types import CVLightningError, EndState, Group, SandboxResult, Task, Trajectory
from cv_lightning.viewer.playground.turns import WatchedEngine, WatchedSandbox, edited_turns, with_code

DATA_SOURCE = "playground"


@dataclass(slots=True, eq=False)
class WatchedTurn:
    """One assistant turn of an exchange."""

    text: str
    parsed: ParsedTurn
    edited: bool
    """True if the user wrote it."""
    running: bool = False
    """True while its code runs in the sandbox."""
    result: SandboxResult | None = None


@dataclass(slots=True, eq=False)
class Exchange:
    """A question with its turns, which are added while it is answered."""

    task: Task
    sampling: SamplingConfig
    given: Sequence[Completion] = ()
    """Turns that it begins with, the edited one last."""
    edited: frozenset[int] = frozenset()
    """Numbers of the turns that the user wrote."""
    turns: list[WatchedTurn] = field(default_factory=list)
    completions: list[Completion] = field(default_factory=list)
    """Completions of the turns, with which another attempt can begin."""
    trajectory: Trajectory | None = None
    """The trajectory once the exchange has ended."""
    stop: Callable[[], None] = lambda: None
    """Ends the exchange after the engine's next step; may be called from any thread."""

    @property
    def answer(self) -> str | None:
        """The answer, once there is one."""
        return self.turns[-1].parsed.answer if self.turns else None

    @property
    def status(self) -> str:
        """The state of the exchange, for people."""
        if self.trajectory is not None:
            state = self.trajectory.end_state.value.replace("_", " ")
            return f"{state}: {self.trajectory.error}" if self.trajectory.error else state
        return "running the code" if self.turns and self.turns[-1].running else "thinking"


Watch = Callable[[Exchange], None]
"""Called on every change of an exchange, from the engine's or the sandbox's thread."""


class Playground:
    """A model with its sandbox, and the store of saved trajectories. Answers one question at a time.

    `model` is the name that is stored with the trajectories; the folder `out` is made when something is saved.
    """

    def __init__(self, rollout: Rollout, model: str, out: Path) -> None:
        self.rollout, self.model, self.out = rollout, model, out
        self._busy = threading.Lock()
        self._count = 0

    def ask(self, image: Image.Image, question: str, sampling: SamplingConfig, watch: Watch) -> Exchange:
        """Answer a question about an image; returns when it is answered or stopped. Raises as `try_code`."""
        self._count += 1
        name = f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}-{self._count}"
        metadata = {"kind": DATA_SOURCE, "model": self.model}
        task = Task(
            id=name, question=question, images=(image,), ground_truth="", data_source=DATA_SOURCE, metadata=metadata
        )
        return self._run(Exchange(task=task, sampling=sampling), watch)

    def try_code(self, exchange: Exchange, index: int, code: str, watch: Watch) -> Exchange:
        """Run edited code in place of that of turn `index`, and let the model continue from its result.

        Raises:
            CVLightningError: The turn has no call, another question is being answered, or the engine failed.
        """
        call = exchange.turns[index].parsed.call
        if call is None:
            raise CVLightningError(f"turn {index + 1} holds no code that could be edited")
        text = with_code(exchange.turns[index].text, code, call.image_index, self.rollout.encoder.dialect)
        self._count += 1
        edited = frozenset(number for number in (*exchange.edited, index) if number <= index)
        metadata = {**exchange.task.metadata, "edited_turns": sorted(edited)}
        return self._run(
            Exchange(
                task=replace(exchange.task, id=f"{exchange.task.id}-{self._count}", metadata=metadata),
                sampling=exchange.sampling,
                given=edited_turns(exchange.completions, index, text, self.rollout.encoder.assistant_ids),
                edited=edited,
            ),
            watch,
        )

    def _run(self, exchange: Exchange, watch: Watch) -> Exchange:
        if not self._busy.acquire(blocking=False):
            raise CVLightningError("another question is being answered; stop it or wait for its answer")
        try:
            on_turn = partial(self._add_turn, exchange, watch)
            engine = WatchedEngine(self.rollout.engine, exchange.given, on_turn)
            sandbox = WatchedSandbox(self.rollout.sandbox, partial(_set_result, exchange, watch))
            exchange.stop = engine.stopped.set
            watch(exchange)
            rollout = replace(self.rollout, engine=engine, sandbox=sandbox)
            [trajectory] = rollout.run([RolloutRequest(exchange.task, 0)], exchange.sampling)
            if engine.stopped.is_set() and trajectory.end_state is EndState.ERROR_ENGINE:
                trajectory.end_state, trajectory.error = EndState.TRUNCATED, "by the user"
            _mask_edited(trajectory, exchange)
            exchange.trajectory = trajectory
            watch(exchange)
            return exchange
        finally:
            self._busy.release()

    def _add_turn(self, exchange: Exchange, watch: Watch, completion: Completion) -> None:
        text = self.rollout.encoder.decode(completion.token_ids)
        exchange.completions.append(completion)
        parsed = parse_turn(text, self.rollout.config.offered or DEFAULT_TOOLS, self.rollout.encoder.dialect)
        exchange.turns.append(WatchedTurn(text, parsed, edited=len(exchange.turns) in exchange.edited))
        watch(exchange)

    def save(self, exchange: Exchange) -> Path:
        """Append the trajectory to the store and return the store's file; an error while it runs."""
        if exchange.trajectory is None:
            raise CVLightningError("this question is still being answered; save it afterwards")
        with TrajectoryWriter(self.out, StoreConfig(tokens=True), name="chat") as writer:
            writer.write_group(Group(task=exchange.task, trajectories=[exchange.trajectory]), 0)
            return writer.path

    def image_file(self, image: Image.Image) -> Path:
        """Write an image to the store, where a saved trajectory will find it; returns its file."""
        path = self.out / IMAGES / f"{content_hash(image)}.png"
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            with whole_file(path) as temporary:
                temporary.write_bytes(encode_image(image))
        return path


def _set_result(exchange: Exchange, watch: Watch, result: SandboxResult | None) -> None:
    turn = exchange.turns[-1]
    turn.running, turn.result = result is None, result
    watch(exchange)


def _mask_edited(trajectory: Trajectory, exchange: Exchange) -> None:
    """Remove the user's tokens from the loss mask, because the policy did not sample them."""
    position = trajectory.num_prompt_tokens
    for index, completion in enumerate(exchange.completions[: len(trajectory.turns)]):
        if True not in trajectory.loss_mask[position:]:  # a served model's tokens are all masked
            return
        position = trajectory.loss_mask.index(True, position)
        end = position + len(completion.token_ids)
        if index in exchange.edited:
            trajectory.loss_mask[position:end] = [False] * (end - position)
        position = end


@contextmanager
def open_playground(
    policy: PolicyConfig, agent: AgentConfig, engine_config: EngineConfig, sandbox_config: SandboxConfig, out: Path
) -> Iterator[Playground]:
    """Load the model and start the sandbox; both are closed afterwards. `out` is for saved trajectories.

    Raises:
        CVLightningError: Model, engine or sandbox is not available.
    """
    adapter = load_adapter(policy)
    model = load_policy(policy) if engine_kind(engine_config) == "transformers" else None
    with Sandbox(sandbox_config) as sandbox, ExitStack() as stack:
        engine = build_engine(engine_config, policy.path, dtype=policy.dtype, seed=0, model=model, adapter=adapter)
        stack.callback(engine.close)
        background = Background("playground-io")
        stack.callback(background.close)
        encoder = DialogueEncoder(adapter, agent.dialect)
        encoder.dialect.check_tools(agent.offered)
        banned = encoder.banned_ids(agent.tool)
        yield Playground(Rollout(engine, sandbox, encoder, background, agent, banned), policy.path, out)
