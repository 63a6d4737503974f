"""The agent loop: many trajectories at once through one stepping engine.

No trajectory waits for another (design decision 3): a finished turn's code goes to the sandbox at once and comes
back as the next request while the others decode. The calling thread owns the engine; sandbox and judge run on
the background thread and hand results back by a queue.
"""

from __future__ import annotations

import hashlib
import logging
import queue
import time
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from PIL import Image

from cv_lightning.agent.calls import ToolOutcome, lost, run_call, trajectory_image
from cv_lightning.agent.config import AgentConfig
from cv_lightning.agent.dialogue import Dialogue, DialogueEncoder
from cv_lightning.agent.job import Job, jobs_of
from cv_lightning.agent.prompt import cut_middle, response_parts, tool_ok_text
from cv_lightning.agent.protocol import ParsedTurn, parse_turn
from cv_lightning.agent.views import TaskViews
from cv_lightning.background import Background
from cv_lightning.engines.base import Completion, Engine, Request, SamplingConfig
from cv_lightning.tools import CodeRunner, ToolContext
from cv_lightning.tools.base import missing_image
from cv_lightning.types import (
    DataError,
    EndState,
    EngineError,
    JudgeError,
    ToolCall,
    ToolStatus,
    Trajectory,
    TrajectoryImage,
    Turn,
)

__all__ = ["CodeRunner", "Job", "Rollout", "RolloutProgress", "Score", "cut_middle", "jobs_of"]

logger = logging.getLogger(__name__)

Score = Callable[[Trajectory], Coroutine[Any, Any, None]]
"""Judges a finished trajectory while others still run."""
Settled = Callable[[int, Trajectory], None]
"""Told of a trajectory that is finished and judged: number of its job, and itself. On the thread that called `run`."""

POLL_S = 0.5
"""With nothing else to do the loop looks at its deadlines this often, in seconds."""


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


@dataclass(slots=True)
class _Call:
    """A tool call under way."""

    run: _Run
    future: Future[ToolOutcome]
    since: float
    """When it was handed over, or a call handed over before it last came back: the queue before it moves."""


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
    new_samples: bool = True
    """Every policy version draws samples of its own. An evaluation says no: wherever weights come from, the same ones
    say the same."""

    def run(
        self,
        jobs: Sequence[Job],
        sampling: SamplingConfig,
        progress: Callable[[RolloutProgress], None] | None = None,
        settled: Settled | None = None,
    ) -> list[Trajectory]:
        """One trajectory per job, in the order of the jobs.

        Args:
            jobs: what to roll out; jobs of one task share its resized images.
            sampling: temperature, top_p, run seed.
            progress: called after every engine step.
            settled: called once for every trajectory, as soon as nothing about it changes any more.

        Returns:
            As many trajectories as jobs; a failed part is an end state of its trajectory, not an exception.

        Raises:
            EngineError: the engine itself failed in a step. Like any other exception, Ctrl-C included, it leaves no
                request in the engine and no snippet in the sandbox.
        """
        return _Pass(self, jobs, sampling, progress, settled).run()


class _Pass:
    """State of one call of `Rollout.run`."""

    def __init__(
        self,
        owner: Rollout,
        jobs: Sequence[Job],
        sampling: SamplingConfig,
        progress: Callable[[RolloutProgress], None] | None,
        settled: Settled | None,
    ) -> None:
        self.owner, self.sampling = owner, sampling
        self.engine, self.encoder, self.config = owner.engine, owner.encoder, owner.config
        self.results: queue.SimpleQueue[tuple[_Call, ToolOutcome]] = queue.SimpleQueue()
        self.waiting = deque(enumerate(jobs))
        self.generating: dict[str, _Run] = {}
        self.in_sandbox: dict[str, _Call] = {}
        self.scoring: list[tuple[int, Trajectory, Future[None] | None]] = []  # ended; None: no verdict is asked for
        self.done: dict[int, Trajectory] = {}
        self.task_views = TaskViews(self.encoder, (job.task for job in jobs))
        self.views: dict[str, Image.Image] = {}
        """By hash: trajectories that made the same image share one object, which training then processes and encodes
        once."""
        self.state = RolloutProgress(total=len(jobs))
        self.report = progress
        self.settled = settled
        self.started = time.perf_counter()

    # ------------------------------------------------------------------ main loop
    def run(self) -> list[Trajectory]:
        try:
            while len(self.done) < self.state.total:
                if reason := self._reason_to_stop():
                    self._stop_all(reason)
                    break
                self._admit_jobs()
                self._admit_tool_results()
                self._step()
                self._settle()
                self._show()
            self._show()
            self._settle(wait_until=time.perf_counter() + self.config.deadline_s)
        except BaseException:
            self._abort()
            raise
        finally:
            self.task_views.close()
        return [self.done[order] for order in range(self.state.total)]

    def _admit_jobs(self) -> None:
        while self.waiting and len(self.generating) + len(self.in_sandbox) < self.owner.window:
            self._start(*self.waiting.popleft())

    def _step(self) -> None:
        if self.engine.has_unfinished():
            for completion in self.engine.step():
                self._finish_turn(self.generating.pop(completion.id), completion)
        elif self.generating:
            for run in list(self.generating.values()):
                self._end(run, EndState.ERROR_ENGINE, "the engine forgot this request")
            self.generating.clear()

    def _admit_tool_results(self) -> None:
        """Hand finished tool calls back; wait for one only where the engine has nothing to do."""
        while self.in_sandbox:
            busy = self.engine.has_unfinished()
            if self.config.deterministic and busy:
                return
            arrived = [self._next_result(0.0 if busy else self._patience())]
            if self.config.deterministic:  # all, so that their order is the jobs' and not their speed's
                while self.in_sandbox and self._elapsed() <= self.config.deadline_s:
                    arrived.append(self._next_result(self._patience()))
            for run, outcome in sorted((pair for pair in arrived if pair is not None), key=lambda pair: pair[0].order):
                self._continue(run, outcome)
            if arrived[-1] is None:
                return

    def _patience(self) -> float:
        """Seconds that the loop may block on the queue."""
        return max(0.0, min(POLL_S, self.config.tool_deadline_s, self.config.deadline_s - self._elapsed()))

    def _next_result(self, timeout: float) -> tuple[_Run, ToolOutcome] | None:
        """The next tool call that came back, or one that is given up; None if there is neither within `timeout` s."""
        try:
            call, outcome = self.results.get(timeout=timeout) if timeout > 0 else self.results.get_nowait()
        except queue.Empty:
            return self._late_call()
        if self.in_sandbox.get(call.run.id) is not call:
            return None  # given up meanwhile
        del self.in_sandbox[call.run.id]
        now = time.perf_counter()
        for other in self.in_sandbox.values():  # in the order of their hand-over
            if other.run.turn_started >= call.run.turn_started:
                other.since = now
        return call.run, outcome

    def _late_call(self) -> tuple[_Run, ToolOutcome] | None:
        """Give up the first call that is past its deadline; the others go on waiting."""
        limit = self.config.tool_deadline_s
        for call in self.in_sandbox.values():
            if time.perf_counter() - call.since > limit and not call.future.done():
                call.future.cancel()
                del self.in_sandbox[call.run.id]
                return call.run, lost(f"no answer from the sandbox within {limit:g} s (agent.tool_deadline_s)")
        return None

    def _elapsed(self) -> float:
        return time.perf_counter() - self.started

    def _show(self) -> None:
        if self.report is not None:
            self.state.elapsed_s = self._elapsed()
            self.report(self.state)

    def _settle(self, wait_until: float | None = None) -> None:
        """Tell of what is finished and judged; with a time, wait for the other verdicts until then."""
        under_way = []
        for order, trajectory, future in self.scoring:
            if future is not None and wait_until is None and not future.done():
                under_way.append((order, trajectory, future))
                continue
            if future is not None:
                self._take_verdict(trajectory, future, wait_until or 0.0)
            if self.settled is not None:
                self.settled(order, trajectory)
        self.scoring[:] = under_way

    def _take_verdict(self, trajectory: Trajectory, future: Future[None], wait_until: float) -> None:
        try:
            future.result(timeout=max(0.0, wait_until - time.perf_counter()))
        except (TimeoutError, JudgeError) as error:
            trajectory.end_state = EndState.ERROR_JUDGE
            trajectory.error = str(error) or f"no verdict within {self.config.deadline_s:g} s (agent.deadline_s)"
            future.cancel()

    def _reason_to_stop(self) -> str:
        """Why what is unfinished is to end now; empty: it is not."""
        deadline_s, share = self.config.deadline_s, self.config.finish_share
        if self._elapsed() > deadline_s:
            return f"agent.deadline_s ({deadline_s:g} s) was over"
        if len(self.done) >= share * self.state.total:
            return f"{len(self.done)} of {self.state.total} trajectories had finished (agent.finish_share {share:g})"
        return ""

    def _stop_all(self, reason: str) -> None:
        """End everything that is under way or waiting as `stopped`: unfinished, not wrong."""
        self.engine.abort(list(self.generating))
        for call in self.in_sandbox.values():
            call.future.cancel()
        for run in [*self.generating.values(), *(call.run for call in self.in_sandbox.values())]:
            self._end(run, EndState.STOPPED, reason)
        for order, job in self.waiting:
            self._end(self._new_run(order, job), EndState.STOPPED, reason)
        self.generating.clear()
        self.in_sandbox.clear()
        self.waiting.clear()

    def _abort(self) -> None:
        """Leave nothing behind in engine and sandbox after an exception or Ctrl-C."""
        futures: list[Future[ToolOutcome] | Future[None]] = [call.future for call in self.in_sandbox.values()]
        for future in [*futures, *(future for *_, future in self.scoring if future is not None)]:
            future.cancel()
        try:
            self.engine.abort(list(self.generating))
        except Exception:  # an engine that broke in its step may not answer; the first exception is the one to show
            logger.exception("the engine could not forget its requests")

    # ------------------------------------------------------------------ one trajectory
    def _start(self, order: int, job: Job) -> None:
        run = self._new_run(order, job)
        try:
            self._open(run)
        except DataError as error:
            return self._end(run, EndState.ERROR_TASK, str(error))
        trajectory, config = run.trajectory, self.config
        if trajectory.num_prompt_tokens > config.max_prompt_tokens:
            limit = f"agent.max_prompt_tokens is {config.max_prompt_tokens}"
            return self._end(run, EndState.OVER_LENGTH, f"a prompt of {trajectory.num_prompt_tokens} tokens, {limit}")
        if len(trajectory.images) > config.max_images:
            images = f"the task has {len(trajectory.images)} images, agent.max_images is {config.max_images}"
            return self._end(run, EndState.MAX_IMAGES, images)
        self._generate(run)

    def _new_run(self, order: int, job: Job) -> _Run:
        """A trajectory of which nothing has happened yet."""
        dialogue = Dialogue(encoder=self.encoder)
        trajectory = Trajectory(
            task=job.task,
            sample=job.sample,
            token_ids=dialogue.token_ids,
            loss_mask=dialogue.loss_mask,
            logprobs=dialogue.logprobs,
            num_prompt_tokens=0,
            weight_version=self.engine.weight_version,
        )
        return _Run(order, job, dialogue, trajectory, [], started=time.perf_counter())

    def _open(self, run: _Run) -> None:
        """Build the prompt.

        Raises:
            DataError: it cannot be built.
        """
        task = run.job.task
        views, hashes = self.task_views.of(task)
        seen = [view.model_image for view in views]
        self.encoder.open(run.dialogue, task, seen, self.config.prompt, self.config.offered)
        run.trajectory.images += views
        run.hashes += hashes
        run.trajectory.num_prompt_tokens = len(run.dialogue.token_ids)

    def _generate(self, run: _Run) -> None:
        """Ask the engine for the next turn."""
        length = len(run.dialogue.token_ids)
        budget = min(
            self.config.max_turn_tokens,
            self.config.max_response_tokens - (length - run.trajectory.num_prompt_tokens),
            self.engine.max_model_len - length - 1,
        )
        if budget < 1:
            return self._end(run, EndState.OVER_LENGTH, f"no room for another turn after {length} tokens")
        run.turn_started = time.perf_counter()
        # Copies: the engine may look at a request again, and the dialogue grows on.
        request = Request(
            id=run.id,
            prompt_ids=tuple(run.dialogue.engine_ids),
            images=tuple(run.dialogue.images),
            image_hashes=tuple(run.hashes),
            max_tokens=budget,
            temperature=self.sampling.temperature,
            top_p=self.sampling.top_p,
            seed=self._seed(run),
            banned_ids=self.owner.banned_ids,
        )
        self.generating[run.id] = run
        try:
            self.engine.add_request(request)
        except EngineError as error:
            del self.generating[run.id]
            self._end(run, EndState.ERROR_ENGINE, str(error))

    def _seed(self, run: _Run) -> int:
        """Of one request: a function of run seed, task, sample, turn and, training, policy version; of nothing else."""
        parts: tuple[object, ...] = (
            self.sampling.seed,
            run.job.task.id,
            run.job.sample,
            len(run.trajectory.turns),
            self.engine.weight_version if self.owner.new_samples else 0,
        )
        parts += (run.job.occurrence,) if run.job.occurrence else ()  # again the same words would teach nothing new
        digest = hashlib.blake2b("|".join(map(str, parts)).encode(), digest_size=4)
        return int.from_bytes(digest.digest(), "big")

    def _finish_turn(self, run: _Run, completion: Completion) -> None:
        """Take a finished turn into the trajectory and do what it asks for."""
        if completion.error:
            return self._end(run, EndState.ERROR_ENGINE, completion.error)
        if completion.prompt_ids is not None and completion.prompt_ids != run.dialogue.token_ids:
            message = f"the engine expanded {len(completion.prompt_ids)} ids, training {len(run.dialogue.token_ids)}"
            return self._end(run, EndState.ERROR_ENGINE, message)
        try:
            run.dialogue.append_sampled(completion.token_ids, completion.logprobs)
        except EngineError as error:
            return self._end(run, EndState.ERROR_ENGINE, str(error))
        turn = Turn(text=self.encoder.decode(completion.token_ids), num_tokens=len(completion.token_ids))
        turn.generate_s = time.perf_counter() - run.turn_started
        run.trajectory.turns.append(turn)
        self.state.tokens += turn.num_tokens
        if not completion.stopped:
            return self._end(run, EndState.OVER_LENGTH, f"a turn was cut at {turn.num_tokens} tokens")
        self._act(run, turn, parse_turn(turn.text, self.config.offered))

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
        refused = missing_image(parsed.call.arguments, len(run.trajectory.images))
        if refused is not None:
            return self._continue(run, ToolOutcome(result=refused))
        self._to_sandbox(run, parsed.call)

    def _to_sandbox(self, run: _Run, call: ToolCall) -> None:
        context = ToolContext(
            images=tuple(run.trajectory.images),
            owner=run.id,
            sandbox=self.owner.sandbox,
            coordinates=self.config.prompt.coordinates,
        )
        tool = next(tool for tool in self.config.offered if tool.name == call.name)
        work = run_call(tool, call, context, self.encoder)
        under_way = _Call(run, self.owner.background.submit(work), since=run.turn_started)
        self.in_sandbox[run.id] = under_way

        def hand_back(finished: Future[ToolOutcome]) -> None:
            error = "the background thread was closed" if finished.cancelled() else finished.exception()
            self.results.put((under_way, finished.result() if error is None else lost(error)))

        under_way.future.add_done_callback(hand_back)

    def _continue(self, run: _Run, outcome: ToolOutcome) -> None:
        """Take a tool's result into the trajectory and go on."""
        turn, result, prompt = run.trajectory.turns[-1], outcome.result, self.config.prompt
        turn.tool_s = outcome.elapsed_s
        turn.result = result
        if result.status is ToolStatus.LOST:
            return self._end(run, EndState.ERROR_SANDBOX, result.error)
        if result.status is not ToolStatus.OK or outcome.not_shown:
            return self._respond(run, turn, prompt.tool_error.format(error=result.error or outcome.not_shown))
        if outcome.model_image is None:
            return self._respond(run, turn, result.text)
        if len(run.trajectory.images) >= self.config.max_images:
            return self._end(run, EndState.MAX_IMAGES, f"agent.max_images is {self.config.max_images}")
        seen = self.views.setdefault(outcome.image_hash, outcome.model_image)
        view = trajectory_image(run.trajectory.images, result.images[0], seen)
        text = tool_ok_text(prompt, len(run.trajectory.images), view.original.size, view.model_image.size)
        self._respond(run, turn, text, view, outcome.image_hash)

    def _respond(
        self, run: _Run, turn: Turn, text: str, view: TrajectoryImage | None = None, image_hash: str = ""
    ) -> None:
        """Append a tool response (text and image together, or neither) and ask for the next turn."""
        said = turn.result.text if turn.result is not None and view is not None else ""
        limit = self.config.max_tool_text_chars
        parts, shown = response_parts(text + run.text_suffix, view is not None, limit, said)
        run.text_suffix = ""
        ids = self.encoder.tool_ids(parts, after=run.dialogue.engine_ids)
        num_image_tokens = self.encoder.num_image_tokens(view.model_image.size) if view is not None else 0
        length = len(run.dialogue.token_ids) + len(ids) + num_image_tokens - (view is not None)
        response = length - run.trajectory.num_prompt_tokens
        if response >= self.config.max_response_tokens or length >= self.engine.max_model_len - 1:
            return self._end(run, EndState.OVER_LENGTH, f"no room for the tool's response after {length} tokens")
        run.dialogue.append_given(ids, [view.model_image] if view is not None else [])
        turn.response_text = shown
        if view is not None:
            turn.image_index = len(run.trajectory.images)
            run.trajectory.images.append(view)
            run.hashes.append(image_hash)
        self._generate(run)

    def _end(self, run: _Run, state: EndState, error: str = "") -> None:
        run.trajectory.end_state = state
        run.trajectory.error = error
        run.trajectory.total_s = time.perf_counter() - run.started
        self.done[run.order] = run.trajectory
        self.state.finished += 1
        verdict = None
        if self.owner.score is not None and not state.is_error:
            verdict = self.owner.background.submit(self.owner.score(run.trajectory))
        self.scoring.append((run.order, run.trajectory, verdict))
