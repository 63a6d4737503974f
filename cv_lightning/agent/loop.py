"""The agent loop: many trajectories at once through one stepping engine.

No trajectory waits for another (design decision 3): a finished turn's code goes to the sandbox at once and comes
back as the next request while the others decode. The calling thread owns the engine; sandbox and judge run on
the background thread and hand results back by a queue.
"""

from __future__ import annotations

import hashlib
import queue
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol

from PIL import Image

from cv_lightning.agent.background import Background
from cv_lightning.agent.config import AgentConfig
from cv_lightning.agent.dialogue import Dialogue, DialogueEncoder
from cv_lightning.agent.prompt import split_marks, text_part, tool_ok_text
from cv_lightning.agent.protocol import ParsedTurn, parse_turn
from cv_lightning.engine.base import Completion, Engine, Request, SamplingConfig
from cv_lightning.images import compose, content_hash
from cv_lightning.types import (
    IDENTITY,
    EndState,
    ImageError,
    SandboxResult,
    Task,
    ToolCall,
    ToolStatus,
    Trajectory,
    TrajectoryImage,
    Turn,
)

Score = Callable[[Trajectory], Awaitable[None]]
"""Judges a finished trajectory while others still run."""


class CodeRunner(Protocol):
    """What the loop asks of a sandbox."""

    async def run(self, image: Image.Image, code: str, *, owner: str = "") -> SandboxResult:
        """Run a snippet on an image."""


@dataclass(frozen=True, slots=True)
class Job:
    """One trajectory to make."""

    task: Task
    sample: int


@dataclass(slots=True)
class RolloutProgress:
    """What a progress display shows."""

    total: int
    finished: int = 0
    tokens: int = 0
    tool_calls: int = 0
    elapsed_s: float = 0.0


@dataclass(slots=True, eq=False)
class _Run:
    """A trajectory in the making."""

    order: int
    job: Job
    dialogue: Dialogue
    trajectory: Trajectory
    hashes: list[str]
    started: float
    turn_started: float = 0.0
    parse_errors: int = 0
    text_suffix: str = ""

    @property
    def id(self) -> str:
        return f"{self.job.task.id}/{self.job.sample}/{self.order}"


@dataclass
class Rollout:
    """Runs jobs to trajectories. One object serves many rollouts; it owns none of its parts."""

    engine: Engine
    sandbox: CodeRunner
    encoder: DialogueEncoder
    background: Background
    config: AgentConfig
    banned_ids: tuple[int, ...]
    """Vision tokens, and `<tool_call>` where the tool is off."""
    score: Score | None = None
    window: int = 256
    """Trajectories under way at once."""

    def run(
        self,
        jobs: Sequence[Job],
        sampling: SamplingConfig,
        progress: Callable[[RolloutProgress], None] | None = None,
    ) -> list[Trajectory]:
        """One trajectory per job, in the order of the jobs.

        Args:
            jobs: what to roll out; jobs of one task share its resized images.
            sampling: temperature, top_p, run seed.
            progress: called after every engine step.

        Returns:
            Trajectories; a failed part is an end state of its trajectory, not an exception.
        """
        return _Pass(self, jobs, sampling, progress).run()


class _Pass:
    """State of one call of `Rollout.run`."""

    def __init__(
        self,
        owner: Rollout,
        jobs: Sequence[Job],
        sampling: SamplingConfig,
        progress: Callable[[RolloutProgress], None] | None,
    ) -> None:
        self.owner, self.sampling = owner, sampling
        self.engine, self.encoder, self.config = owner.engine, owner.encoder, owner.config
        self.results: queue.SimpleQueue[tuple[_Run, SandboxResult]] = queue.SimpleQueue()
        self.waiting = deque(enumerate(jobs))
        self.generating: dict[str, _Run] = {}
        self.in_sandbox: dict[str, tuple[_Run, Future[SandboxResult]]] = {}
        self.scoring: list[tuple[Trajectory, Future[None]]] = []
        self.done: dict[int, Trajectory] = {}
        self.seen_images: dict[int, tuple[list[TrajectoryImage], list[str]]] = {}
        self.state = RolloutProgress(total=len(jobs))
        self.report = progress
        self.started = time.perf_counter()

    # ------------------------------------------------------------------ main loop
    def run(self) -> list[Trajectory]:
        try:
            while len(self.done) < self.state.total:
                if time.perf_counter() - self.started > self.config.deadline_s:
                    self._stop_all()
                    break
                self._admit_jobs()
                self._admit_tool_results()
                if self.engine.has_unfinished():
                    for completion in self.engine.step():
                        self._finish_turn(self.generating.pop(completion.id), completion)
                self._show()
        except BaseException:
            self._abort()
            raise
        self._await_scores()
        return [self.done[order] for order in sorted(self.done)]

    def _admit_jobs(self) -> None:
        while self.waiting and len(self.generating) + len(self.in_sandbox) < self.owner.window:
            order, job = self.waiting.popleft()
            self._start(order, job)

    def _admit_tool_results(self) -> None:
        """Hand finished tool calls back; wait for one only where the engine has nothing to do."""
        if self.config.deterministic:
            if self.in_sandbox and not self.engine.has_unfinished():
                arrived = [self._next_result(self.config.tool_deadline_s) for _ in range(len(self.in_sandbox))]
                for run, result in sorted((r for r in arrived if r is not None), key=lambda pair: pair[0].order):
                    self._continue(run, result)
            return
        while self.in_sandbox:
            item = self._next_result(0.0 if self.engine.has_unfinished() else self.config.tool_deadline_s)
            if item is None:
                return
            self._continue(*item)

    def _next_result(self, timeout: float) -> tuple[_Run, SandboxResult] | None:
        try:
            item = self.results.get(timeout=timeout) if timeout > 0 else self.results.get_nowait()
        except queue.Empty:
            if timeout > 0:
                for run, future in list(self.in_sandbox.values()):
                    future.cancel()
                    self._end(run, EndState.ERROR_SANDBOX, f"no answer from the sandbox within {timeout:.0f} s")
                self.in_sandbox.clear()
            return None
        return item if self.in_sandbox.pop(item[0].id, None) is not None else None

    def _show(self) -> None:
        if self.report is not None:
            self.state.elapsed_s = time.perf_counter() - self.started
            self.report(self.state)

    def _await_scores(self) -> None:
        for trajectory, future in self.scoring:
            try:
                future.result(timeout=self.config.deadline_s)
            except TimeoutError:
                trajectory.end_state, trajectory.error = EndState.ERROR_JUDGE, "no verdict before the rollout's deadline"

    def _stop_all(self) -> None:
        self.engine.abort(list(self.generating))
        for run in list(self.generating.values()) + [run for run, _ in self.in_sandbox.values()]:
            self._end(run, EndState.STOPPED)
        for order, job in self.waiting:
            run = self._new_run(order, job)
            self._end(run, EndState.STOPPED)

    def _abort(self) -> None:
        """Leave nothing behind in engine and sandbox after an exception or Ctrl-C."""
        self.engine.abort(list(self.generating))
        for _, future in [*self.in_sandbox.values(), *self.scoring]:
            future.cancel()

    # ------------------------------------------------------------------ one trajectory
    def _start(self, order: int, job: Job) -> None:
        run = self._new_run(order, job)
        if run.trajectory.num_prompt_tokens > self.config.max_prompt_tokens:
            return self._end(run, EndState.OVER_LENGTH, f"prompt of {run.trajectory.num_prompt_tokens} tokens")
        self._generate(run)

    def _new_run(self, order: int, job: Job) -> _Run:
        if id(job.task) not in self.seen_images:
            views = [
                TrajectoryImage(original=image, model_image=self.encoder.model_image(image), source=i, to_source=IDENTITY)
                for i, image in enumerate(job.task.images)
            ]
            self.seen_images[id(job.task)] = views, [content_hash(view.model_image) for view in views]
        views, hashes = self.seen_images[id(job.task)]
        dialogue = self.encoder.start(
            job.task, [view.model_image for view in views], self.config.prompt, self.config.tool
        )
        trajectory = Trajectory(
            task=job.task,
            sample=job.sample,
            token_ids=dialogue.token_ids,
            loss_mask=dialogue.loss_mask,
            logprobs=dialogue.logprobs,
            num_prompt_tokens=len(dialogue.token_ids),
            images=list(views),
            weight_version=self.engine.weight_version,
        )
        return _Run(order, job, dialogue, trajectory, list(hashes), started=time.perf_counter())

    def _generate(self, run: _Run) -> None:
        length = len(run.dialogue.token_ids)
        budget = min(
            self.config.max_turn_tokens,
            self.config.max_response_tokens - (length - run.trajectory.num_prompt_tokens),
            self.engine.max_model_len - length - 1,
        )
        if budget < 1:
            return self._end(run, EndState.OVER_LENGTH, f"no room for another turn after {length} tokens")
        seed = f"{self.sampling.seed}|{run.job.task.id}|{run.job.sample}|{len(run.trajectory.turns)}|{self.engine.weight_version}"
        run.turn_started = time.perf_counter()
        self.generating[run.id] = run
        self.engine.add_request(
            Request(
                id=run.id,
                prompt_ids=run.dialogue.engine_ids,
                images=run.dialogue.images,
                image_hashes=run.hashes,
                max_tokens=budget,
                temperature=self.sampling.temperature,
                top_p=self.sampling.top_p,
                seed=int.from_bytes(hashlib.blake2b(seed.encode(), digest_size=4).digest(), "big"),
                banned_ids=self.owner.banned_ids,
            )
        )

    def _finish_turn(self, run: _Run, completion: Completion) -> None:
        if completion.prompt_ids is not None and completion.prompt_ids != run.dialogue.token_ids:
            message = f"the engine expanded {len(completion.prompt_ids)} ids, training {len(run.dialogue.token_ids)}"
            return self._end(run, EndState.ERROR_ENGINE, message)
        if self.encoder.image_pad_id in completion.token_ids:
            return self._end(run, EndState.ERROR_ENGINE, "an image token was sampled although it is banned")
        run.dialogue.append_sampled(completion.token_ids, completion.logprobs)
        turn = Turn(text=self.encoder.decode(completion.token_ids), num_tokens=len(completion.token_ids))
        turn.generate_s = time.perf_counter() - run.turn_started
        run.trajectory.turns.append(turn)
        self.state.tokens += turn.num_tokens
        if not completion.stopped:
            return self._end(run, EndState.OVER_LENGTH, f"a turn was cut at {turn.num_tokens} tokens")
        self._act(run, turn, parse_turn(turn.text))

    def _act(self, run: _Run, turn: Turn, parsed: ParsedTurn) -> None:
        """Decide what a finished turn leads to: the end, the sandbox, or a parse error for the model."""
        if parsed.answer is not None:
            return self._end(run, EndState.ANSWERED)
        if not self.config.tool or (parsed.call is None and parsed.error is None):
            return self._end(run, EndState.NO_ANSWER)
        if len(run.trajectory.turns) >= self.config.max_turns:
            return self._end(run, EndState.MAX_TURNS)
        prompt = self.config.prompt
        if parsed.call is None:
            turn.parse_error = parsed.error
            run.parse_errors += 1
            if run.parse_errors > self.config.max_parse_errors:
                return self._end(run, EndState.PARSE_ERRORS)
            return self._respond(run, turn, prompt.parse_error.format(error=parsed.error))
        turn.tool_call = parsed.call
        run.text_suffix = prompt.one_call.format(count=parsed.num_calls) if parsed.num_calls > 1 else ""
        run.turn_started = time.perf_counter()
        self.state.tool_calls += 1
        if not 0 <= parsed.call.image_index < len(run.trajectory.images):
            return self._continue(run, _no_such_image(parsed.call, len(run.trajectory.images)))
        self._to_sandbox(run, parsed.call)

    def _to_sandbox(self, run: _Run, call: ToolCall) -> None:
        image = run.trajectory.images[call.image_index].original
        future = self.owner.background.submit(self.owner.sandbox.run(image, call.code, owner=run.id))
        self.in_sandbox[run.id] = run, future

        def hand_back(finished: Future[SandboxResult]) -> None:
            if finished.cancelled():
                return
            error = finished.exception()
            lost = SandboxResult(status=ToolStatus.LOST, error=str(error), error_kind=type(error).__name__)
            self.results.put((run, finished.result() if error is None else lost))

        future.add_done_callback(hand_back)

    def _continue(self, run: _Run, result: SandboxResult) -> None:
        """Take a tool's result into the trajectory and go on."""
        turn = run.trajectory.turns[-1]
        turn.tool_s = time.perf_counter() - run.turn_started
        turn.result = result
        if result.status is ToolStatus.LOST:
            return self._end(run, EndState.ERROR_SANDBOX, result.error)
        if result.image is None:
            return self._respond(run, turn, self.config.prompt.tool_error.format(error=result.error))
        if len(run.trajectory.images) >= self.config.max_images:
            return self._end(run, EndState.MAX_IMAGES)
        assert turn.tool_call is not None
        try:
            view = self._derived_image(run.trajectory, turn.tool_call.image_index, result)
        except ImageError as error:
            return self._respond(run, turn, self.config.prompt.tool_error.format(error=error))
        sizes = view.original.size, view.model_image.size
        self._respond(run, turn, tool_ok_text(self.config.prompt, len(run.trajectory.images), *sizes), view)

    def _derived_image(self, trajectory: Trajectory, parent_index: int, result: SandboxResult) -> TrajectoryImage:
        assert result.image is not None
        parent = trajectory.images[parent_index]
        to_input = result.effect.to_input if result.effect is not None else None
        known = parent.to_source is not None and to_input is not None
        return TrajectoryImage(
            original=result.image,
            model_image=self.encoder.model_image(result.image),
            source=parent.source,
            parent=parent_index,
            to_source=compose(parent.to_source, to_input) if known else None,  # type: ignore[arg-type]
        )

    def _respond(self, run: _Run, turn: Turn, text: str, view: TrajectoryImage | None = None) -> None:
        """Append a tool response (text and image together, or neither) and ask for the next turn."""
        text = cut_middle(text.strip() + run.text_suffix, self.config.max_tool_text_chars)
        run.text_suffix = ""
        # Only our own mark stands for an image; one in a snippet's error text is text.
        parts = split_marks(text) if view is not None else [text_part(text)]
        ids = self.encoder.tool_ids(parts)
        num_image_tokens = self.encoder.num_image_tokens(view.model_image.size) if view is not None else 0
        length = len(run.dialogue.token_ids) + len(ids) + num_image_tokens
        if length - run.trajectory.num_prompt_tokens >= self.config.max_response_tokens or length >= self.engine.max_model_len - 1:
            return self._end(run, EndState.OVER_LENGTH, f"no room for the tool's response after {length} tokens")
        run.dialogue.append_given(ids, [view.model_image] if view is not None else [])
        turn.response_text = text
        if view is not None:
            turn.image_index = len(run.trajectory.images)
            run.trajectory.images.append(view)
            run.hashes.append(content_hash(view.model_image))
        self._generate(run)

    def _end(self, run: _Run, state: EndState, error: str = "") -> None:
        run.trajectory.end_state = state
        run.trajectory.error = error
        run.trajectory.total_s = time.perf_counter() - run.started
        self.done[run.order] = run.trajectory
        self.state.finished += 1
        if self.owner.score is not None and not state.is_error:
            self.scoring.append((run.trajectory, self.owner.background.submit(self.owner.score(run.trajectory))))


def _no_such_image(call: ToolCall, num_images: int) -> SandboxResult:
    return SandboxResult(
        status=ToolStatus.REFUSED,
        error=f"image_index {call.image_index} does not exist; there are {num_images} images, numbered from 0",
        error_kind="image_index",
    )


def cut_middle(text: str, limit: int) -> str:
    """At most `limit` characters; the middle of a longer text is replaced by a mark."""
    if len(text) <= limit:
        return text
    mark = " ... "
    head = (limit - len(mark)) // 2
    return text[:head] + mark + text[len(text) - (limit - len(mark) - head) :]


def jobs_of(tasks: Iterable[Task], num_samples: int) -> list[Job]:
    """`num_samples` jobs per task, the samples of one task next to each other so that they share the prompt's cache."""
    return [Job(task, sample) for task in tasks for sample in range(num_samples)]
