"""One trajectory as a coroutine: the prompt, then turns and tool results, until it ends.

The coroutine waits at two places, for a turn of the engine and for a tool. Both times it hands a step to the driver
(`ask`) and receives the result. It has no threads and does not depend on other trajectories.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Coroutine, Generator, Sequence
from dataclasses import dataclass
from types import coroutine
from typing import Any

from cv_lightning.agent.calls import ToolOutcome, run_call, trajectory_image
from cv_lightning.agent.config import AgentConfig
from cv_lightning.agent.dialogue import Dialogue, DialogueEncoder
from cv_lightning.agent.prompt import cut_said, response_parts, tool_ok_text
from cv_lightning.agent.protocol import parse_turn
from cv_lightning.agent.request import RolloutRequest
from cv_lightning.agent.views import TaskViews
from cv_lightning.engines.base import Completion, Request, SamplingConfig
from cv_lightning.tools import CodeRunner, ToolContext
from cv_lightning.tools.base import missing_image
from cv_lightning.types import (
    DataError,
    EndState,
    EngineError,
    ToolCall,
    ToolStatus,
    Trajectory,
    TrajectoryImage,
    Turn,
)


@dataclass(slots=True)
class RolloutProgress:
    """Progress of a rollout, for displays."""

    total: int
    finished: int = 0
    tokens: int = 0
    tool_calls: int = 0
    elapsed_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Shared:
    """Settings and parts that the episodes of one rollout share."""

    config: AgentConfig
    encoder: DialogueEncoder
    sandbox: CodeRunner
    sampling: SamplingConfig
    banned_ids: tuple[int, ...]
    max_model_len: int
    policy_version: int
    seed_version: int
    """Part of every request's seed: the policy version in training, 0 in evaluations."""
    views: TaskViews
    progress: RolloutProgress


@dataclass(frozen=True, slots=True)
class ToolStep:
    """A tool call to run on the background thread."""

    work: Coroutine[Any, Any, ToolOutcome]


@coroutine
def ask(step: Request | ToolStep) -> Generator[Any, Any, Any]:
    """Hand a step to the driver and wait for its result: the `Completion` of a request or the `ToolOutcome` of a call.

    A failed step has a result with an error.
    """
    return (yield step)


class _End(Exception):
    """Ends the trajectory."""

    def __init__(self, state: EndState, error: str = "") -> None:
        self.state, self.error = state, error


class Episode:
    """One unfinished trajectory: its conversation and its coroutine.

    Args:
        request: The request that it answers.
        order: Number of the request in its rollout.
        shared: Settings and parts of the rollout.
    """

    def __init__(self, request: RolloutRequest, order: int, shared: Shared) -> None:
        self.request, self.order, self.shared, self.config = request, order, shared, shared.config
        self.id = f"{request.task.id}/{request.sample_index}/{order}"
        self.dialogue = Dialogue(encoder=shared.encoder)
        self.trajectory = Trajectory(
            task=request.task,
            sample=request.sample_index,
            token_ids=self.dialogue.token_ids,
            loss_mask=self.dialogue.loss_mask,
            logprobs=self.dialogue.logprobs,
            num_prompt_tokens=0,
            policy_version=shared.policy_version,
            dialect=shared.encoder.dialect.name,
        )
        self.parse_errors = 0
        self.started = time.perf_counter()
        self.steps = self._run()
        """Coroutine that yields `Request` and `ToolStep`, receives `Completion` and `ToolOutcome`, and returns when the
        trajectory ends."""

    def end(self, state: EndState, error: str = "") -> Trajectory:
        """End the trajectory in its current state.

        Args:
            state: The end state.
            error: The failure or the limit that was reached.
        """
        self.steps.close()
        self.trajectory.end_state, self.trajectory.error = state, error
        self.trajectory.total_s = time.perf_counter() - self.started
        return self.trajectory

    async def _run(self) -> tuple[EndState, str]:
        try:
            self._open()
            while True:
                turn = await self._generate()
                await self._act(turn)
        except _End as end:
            return end.state, end.error

    def _open(self) -> None:
        """Put the prompt into the dialogue."""
        task, config, trajectory = self.request.task, self.config, self.trajectory
        try:
            views = self.shared.views.of(self.request)
            seen = [view.model_image for view in views]
            self.shared.encoder.open(self.dialogue, task, seen, config.prompt, config.offered)
            self.dialogue.append_context(self.shared.encoder.assistant_ids(config.answer_prefix)[:-1])
        except DataError as error:
            raise _End(EndState.ERROR_TASK, str(error)) from error
        trajectory.images += views
        trajectory.num_prompt_tokens = length = len(self.dialogue.token_ids)
        if length > config.max_prompt_tokens:
            limit = f"agent.max_prompt_tokens is {config.max_prompt_tokens}"
            raise _End(EndState.OVER_LENGTH, f"a prompt of {length} tokens, {limit}")
        if len(views) > config.max_images:
            limit = f"agent.max_images is {config.max_images}"
            raise _End(EndState.MAX_IMAGES, f"the task has {len(views)} images, {limit}")

    async def _generate(self) -> Turn:
        """Sample the next turn and append it."""
        length, began = len(self.dialogue.token_ids), time.perf_counter()
        budget = min(
            self.config.max_turn_tokens,
            self.config.max_response_tokens - (length - self.trajectory.num_prompt_tokens),
            self.shared.max_model_len - length - 1,
        )
        if budget < 1:
            raise _End(EndState.OVER_LENGTH, f"no room for another turn after {length} tokens")
        completion: Completion = await ask(self._engine_request(budget))
        expanded = completion.prompt_ids
        if completion.error:
            raise _End(EndState.ERROR_ENGINE, completion.error)
        if expanded is not None and expanded != self.dialogue.token_ids:
            raise _End(EndState.ERROR_ENGINE, f"the engine expanded {len(expanded)} ids, training {length}")
        try:
            self.dialogue.append_sampled(completion.token_ids, completion.logprobs)
        except EngineError as error:
            raise _End(EndState.ERROR_ENGINE, str(error)) from error
        text = self.config.answer_prefix + self.shared.encoder.decode(completion.token_ids)
        turn = Turn(text=text, num_tokens=len(completion.token_ids))
        turn.generate_s = time.perf_counter() - began
        self.trajectory.turns.append(turn)
        self.shared.progress.tokens += turn.num_tokens
        if not completion.stopped:
            raise _End(EndState.OVER_LENGTH, f"a turn was cut at {turn.num_tokens} tokens")
        return turn

    def _engine_request(self, budget: int) -> Request:
        """The next turn's request; it has copies, because the dialogue grows while the engine keeps the request."""
        return Request(
            id=self.id,
            prompt_ids=tuple(self.dialogue.engine_ids),
            images=tuple(self.dialogue.images),
            max_tokens=budget,
            temperature=self.shared.sampling.temperature,
            top_p=self.shared.sampling.top_p,
            seed=self._seed(),
            banned_ids=self.shared.banned_ids,
        )

    def _seed(self) -> int:
        """Seed of the next turn, from run seed, task, sample, repeat, turn and, in training, policy version only."""
        request = self.request
        parts: tuple[object, ...] = (self.shared.sampling.seed, request.task.id, request.sample_index)
        parts += (len(self.trajectory.turns), self.shared.seed_version)
        parts += (request.repeat,) if request.repeat else ()  # a repeated task gets new samples
        digest = hashlib.blake2b("|".join(map(str, parts)).encode(), digest_size=4)
        return int.from_bytes(digest.digest(), "big")

    async def _act(self, turn: Turn) -> None:
        """Act on a turn: end, run its tool call, or report what is wrong with the call."""
        config, prompt = self.config, self.config.prompt
        parsed = parse_turn(turn.text, config.offered, self.shared.encoder.dialect)
        if parsed.answer is not None:
            raise _End(EndState.ANSWERED)
        if not config.tool or (parsed.call is None and parsed.error is None):
            raise _End(EndState.NO_ANSWER)
        if len(self.trajectory.turns) >= config.max_turns:
            raise _End(EndState.MAX_TURNS)
        if parsed.call is None:
            turn.parse_error = parsed.error
            self.parse_errors += 1
            if self.parse_errors > config.max_parse_errors:
                raise _End(EndState.PARSE_ERRORS)
            return self._respond(turn, prompt.parse_error.format(error=parsed.error))
        turn.tool_call = parsed.call
        outcome = await self._call_tool(parsed.call)
        note = prompt.one_call.format(count=parsed.num_calls) if parsed.num_calls > 1 else ""
        self._take_result(turn, outcome, note)

    async def _call_tool(self, call: ToolCall) -> ToolOutcome:
        self.shared.progress.tool_calls += 1
        images = tuple(self.trajectory.images)
        refused = missing_image(call.arguments, len(images))
        if refused is not None:
            return ToolOutcome(result=refused)
        tool = next(tool for tool in self.config.offered if tool.name == call.name)
        coordinates = self.config.prompt.coordinates
        context = ToolContext(images=images, owner=self.id, sandbox=self.shared.sandbox, coordinates=coordinates)
        outcome: ToolOutcome = await ask(ToolStep(run_call(tool, call, context, self.shared.encoder)))
        return outcome

    def _take_result(self, turn: Turn, outcome: ToolOutcome, note: str) -> None:
        """Add a call's result to the trajectory, and append the tool response."""
        result, prompt = outcome.result, self.config.prompt
        turn.tool_s, turn.result = outcome.elapsed_s, result
        if result.status is ToolStatus.INFRASTRUCTURE_ERROR:
            raise _End(EndState.ERROR_SANDBOX, result.error)
        said = self._fitting(result.text, turn)
        if result.status is not ToolStatus.OK or outcome.not_shown:
            note = prompt.tool_error.format(error=result.error or outcome.not_shown) + note
        images = self.trajectory.images
        if outcome.views and len(images) + len(outcome.views) > self.config.max_images:
            raise _End(EndState.MAX_IMAGES, f"agent.max_images is {self.config.max_images}")
        pairs = zip(result.images, outcome.views, strict=True)
        views = [trajectory_image(images, made, model_image) for made, model_image in pairs]
        texts = [
            tool_ok_text(prompt, index, view.original.size, view.model_image.size)
            for index, view in enumerate(views, len(images))
        ]
        self._respond(turn, "\n".join(texts) + note, said, views)

    def _fitting(self, said: str, turn: Turn) -> str:
        """A tool's text within the limits of characters and of the tool's tokens."""
        name = turn.tool_call.name if turn.tool_call is not None else ""
        limit = next((tool.max_text_tokens for tool in self.config.offered if tool.name == name), None)
        return self.shared.encoder.fit(cut_said(said, self.config.max_tool_text_chars), limit)

    def _respond(self, turn: Turn, text: str, said: str = "", views: Sequence[TrajectoryImage] = ()) -> None:
        """Append a tool response: text and images together, or neither.

        Args:
            turn: The turn with the call.
            text: The agent's text; it has one `<image>` mark per image.
            said: The tool's own text.
            views: The images.
        """
        encoder, images = self.shared.encoder, [view.model_image for view in views]
        limit = self.config.max_tool_text_chars
        parts, shown = response_parts(text, len(views), limit, said, encoder.literal)
        ids = encoder.tool_ids(parts, after=self.dialogue.engine_ids)
        features = sum(encoder.num_image_tokens(image.size) - 1 for image in images)
        length = len(self.dialogue.token_ids) + len(ids) + features
        response = length - self.trajectory.num_prompt_tokens
        if response >= self.config.max_response_tokens or length >= self.shared.max_model_len - 1:
            raise _End(EndState.OVER_LENGTH, f"no room for the tool's response after {length} tokens")
        self.dialogue.append_context(ids, images)
        turn.response_text = shown
        if views:
            turn.image_index, turn.num_images = len(self.trajectory.images), len(views)
            self.trajectory.images += views
