"""One question after another to one model. What is asked, watched, stopped, edited and saved; not how it is shown."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from PIL import Image

from cv_lightning.agent.config import AgentConfig
from cv_lightning.agent.dialogue import DialogueEncoder
from cv_lightning.agent.driver import Rollout
from cv_lightning.agent.protocol import ParsedTurn, parse_turn
from cv_lightning.agent.request import RolloutRequest
from cv_lightning.background import Background
from cv_lightning.engines import Completion, EngineConfig, SamplingConfig, build_engine, engine_kind
from cv_lightning.images import content_hash
from cv_lightning.models.loading import PolicyConfig, load_adapter, load_policy
from cv_lightning.sandbox import Sandbox, SandboxConfig
from cv_lightning.trajectory.store import IMAGES, StoreConfig, TrajectoryWriter, encode_image
from cv_lightning.types import CVLightningError, EndState, Group, SandboxResult, Task, Trajectory
from cv_lightning.viewer.playground.turns import WatchedEngine, WatchedSandbox, edited_turns, with_code

DATA_SOURCE = "playground"


@dataclass(slots=True, eq=False)
class WatchedTurn:
    """One assistant turn as it is seen."""

    text: str
    parsed: ParsedTurn
    edited: bool
    """Written by the user, not sampled."""
    running: bool = False
    """Its code is in the sandbox."""
    result: SandboxResult | None = None


@dataclass(slots=True, eq=False)
class Exchange:
    """A question and what comes of it; grows while it is answered."""

    task: Task
    sampling: SamplingConfig
    given: Sequence[Completion] = ()
    """Turns it begins with, the edited one last."""
    edited: frozenset[int] = frozenset()
    """Turns that the user wrote."""
    turns: list[WatchedTurn] = field(default_factory=list)
    completions: list[Completion] = field(default_factory=list)
    """Of the turns; what another try begins with."""
    trajectory: Trajectory | None = None
    """Once it has ended."""
    stop: Callable[[], None] = lambda: None
    """Ends it after the engine's next step, from any thread."""

    @property
    def answer(self) -> str | None:
        """What was answered, once it was."""
        return self.turns[-1].parsed.answer if self.turns else None

    @property
    def status(self) -> str:
        """What is going on, for people."""
        if self.trajectory is not None:
            state = self.trajectory.end_state.value.replace("_", " ")
            return f"{state}: {self.trajectory.error}" if self.trajectory.error else state
        return "running the code" if self.turns and self.turns[-1].running else "thinking"


Watch = Callable[[Exchange], None]
"""Called whenever something happened, from the engine's or the sandbox's thread."""


class Playground:
    """A model, its sandbox, and the store that saved trajectories go to. One question at a time."""

    def __init__(self, rollout: Rollout, model: str, out: Path) -> None:
        """Use an agent loop.

        Args:
            rollout: with engine and sandbox; it is not changed.
            model: its name, stored with the trajectories.
            out: folder of the store; made when something is saved.
        """
        self.rollout, self.model, self.out = rollout, model, out
        self._busy = threading.Lock()
        self._count = 0

    def ask(self, image: Image.Image, question: str, sampling: SamplingConfig, watch: Watch) -> Exchange:
        """Answer a question about a picture; returns when it is answered or was stopped.

        Raises:
            CVLightningError: another question is being answered; the engine failed.
        """
        self._count += 1
        name = f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}-{self._count}"
        metadata = {"kind": DATA_SOURCE, "model": self.model}
        task = Task(
            id=name, question=question, images=(image,), ground_truth="", data_source=DATA_SOURCE, metadata=metadata
        )
        return self._run(Exchange(task=task, sampling=sampling), watch)

    def try_code(self, exchange: Exchange, index: int, code: str, watch: Watch) -> Exchange:
        """Run edited code in place of a turn's own, and let the model go on from its result.

        Args:
            exchange: that has ended.
            index: of a turn with a call.
            code: the new snippet.
            watch: as in `ask`.

        Raises:
            CVLightningError: as `ask`, or the turn holds no call.
        """
        call = exchange.turns[index].parsed.call
        if call is None:
            raise CVLightningError(f"turn {index + 1} holds no code that could be edited")
        text = with_code(exchange.turns[index].text, code, call.image_index)
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
            engine = WatchedEngine(
                self.rollout.engine, exchange.given, lambda turn: self._turned(exchange, turn, watch)
            )
            sandbox = WatchedSandbox(self.rollout.sandbox, lambda result: _ran(exchange, result, watch))
            exchange.stop = engine.stopped.set
            watch(exchange)
            rollout = replace(self.rollout, engine=engine, sandbox=sandbox)
            [trajectory] = rollout.run([RolloutRequest(exchange.task, 0)], exchange.sampling)
            if engine.stopped.is_set() and trajectory.end_state is EndState.ERROR_ENGINE:
                trajectory.end_state, trajectory.error = EndState.TRUNCATED, "by the user"
            _unlearn(trajectory, exchange)
            exchange.trajectory = trajectory
            watch(exchange)
            return exchange
        finally:
            self._busy.release()

    def _turned(self, exchange: Exchange, completion: Completion, watch: Watch) -> None:
        text = self.rollout.encoder.decode(completion.token_ids)
        exchange.completions.append(completion)
        exchange.turns.append(WatchedTurn(text, parse_turn(text), edited=len(exchange.turns) in exchange.edited))
        watch(exchange)

    def save(self, exchange: Exchange) -> Path:
        """Append the trajectory to the store; returns its file.

        Raises:
            CVLightningError: it has not ended yet.
        """
        if exchange.trajectory is None:
            raise CVLightningError("this question is still being answered; save it afterwards")
        with TrajectoryWriter(self.out, StoreConfig(tokens=True), name="chat") as writer:
            writer.write_group(Group(task=exchange.task, trajectories=[exchange.trajectory]), 0)
            return writer.path

    def image_file(self, image: Image.Image) -> Path:
        """Write a picture to the store, where a saved trajectory will find it; returns its file."""
        path = self.out / IMAGES / f"{content_hash(image)}.png"
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_suffix(f".{os.getpid()}.tmp")
            temporary.write_bytes(encode_image(image))
            temporary.replace(path)
        return path


def _ran(exchange: Exchange, result: SandboxResult | None, watch: Watch) -> None:
    turn = exchange.turns[-1]
    turn.running, turn.result = result is None, result
    watch(exchange)


def _unlearn(trajectory: Trajectory, exchange: Exchange) -> None:
    """Take what the user wrote out of the loss mask: the policy did not sample it."""
    if not exchange.edited:
        return
    position = trajectory.num_prompt_tokens
    for index, completion in enumerate(exchange.completions[: len(trajectory.turns)]):
        if True not in trajectory.loss_mask[position:]:  # a served model's: nothing is learnt anyway
            return
        position = trajectory.loss_mask.index(True, position)
        end = position + len(completion.token_ids)
        if index in exchange.edited:
            trajectory.loss_mask[position:end] = [False] * (end - position)
        position = end


# ------------------------------------------------------------------------------------------------ parts
@dataclass(frozen=True, kw_only=True)
class PlaygroundConfig:
    """Which model is asked, and how."""

    policy: PolicyConfig
    """The model; how large it sees pictures is its processor's say."""
    agent: AgentConfig = field(default_factory=AgentConfig)
    """Limits and words of the agent."""
    engine: EngineConfig = field(default_factory=lambda: EngineConfig(max_num_seqs=1))
    """What generates."""
    sandbox: SandboxConfig = field(default_factory=SandboxConfig)
    """Where the model's code runs."""
    out: Path = Path("runs/chat")
    """Store of saved trajectories and pictures."""


@contextmanager
def open_playground(config: PlaygroundConfig) -> Iterator[Playground]:
    """Load the model and start the sandbox; all of it is closed afterwards.

    Raises:
        CVLightningError: model, engine or sandbox cannot be had.
    """
    policy = config.policy
    adapter = load_adapter(policy)
    banned = adapter.banned_ids(config.agent.tool)
    with Sandbox(config.sandbox) as sandbox:
        engine = build_engine(
            config.engine,
            policy.path,
            dtype=policy.dtype,
            seed=0,
            model=load_policy(policy) if engine_kind(config.engine) == "transformers" else None,
            adapter=adapter,
        )
        background = Background("playground-io")
        try:
            encoder = DialogueEncoder(adapter)
            rollout = Rollout(engine, sandbox, encoder, background, config.agent, banned)
            yield Playground(rollout, policy.path, config.out)
        finally:
            background.close()
            engine.close()
