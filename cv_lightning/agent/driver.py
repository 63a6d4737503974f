"""Runs many episodes at once through one stepping engine.

No trajectory waits for another: a finished turn's call goes to its tool at once, and the result becomes the next
request while others decode. The calling thread owns the engine and runs the episodes; tools and judge run on the
background thread and return results through a queue.
"""

from __future__ import annotations

import logging
import queue
import time
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import Any

from cv_lightning.agent.calls import ToolOutcome, failed_call
from cv_lightning.agent.config import AgentConfig
from cv_lightning.agent.conversation import Episode, RolloutProgress, Shared, ToolStep
from cv_lightning.agent.dialogue import DialogueEncoder
from cv_lightning.agent.request import RolloutRequest
from cv_lightning.agent.views import TaskViews
from cv_lightning.background import Background
from cv_lightning.engines.base import Completion, Engine, SamplingConfig, failed
from cv_lightning.tools import CodeRunner
from cv_lightning.types import EndState, EngineError, JudgeError, Trajectory

__all__ = ["OnComplete", "Rollout", "RolloutProgress", "Score"]

logger = logging.getLogger(__name__)

Score = Callable[[Trajectory], Coroutine[Any, Any, None]]
"""Scores a finished trajectory while others still run."""
OnComplete = Callable[[int, Trajectory], None]
"""Called with a finished and scored trajectory and the number of its request, on the thread that called `run`."""

POLL_S = 0.5
"""How often a rollout that waits checks its deadlines and shows that it is alive, in seconds."""


@dataclass(slots=True)
class _Call:
    """A running tool call."""

    episode: Episode
    future: Future[ToolOutcome]
    handed_over: float
    since: float
    """Start of the timeout clock; reset whenever an earlier call returns, so that queueing does not count."""


@dataclass
class Rollout:
    """Makes trajectories. One object serves many rollouts; it does not own its parts."""

    engine: Engine
    sandbox: CodeRunner
    encoder: DialogueEncoder
    background: Background
    config: AgentConfig
    banned_ids: tuple[int, ...]
    """Vision tokens, and the token that begins a call where the tools are off."""
    score: Score | None = None
    window: int = 256
    """Maximum number of trajectories that run at once."""
    new_samples: bool = True
    """Include the policy version in the sampling seed. Off in evaluations, so that equal weights give equal samples."""

    def run(
        self,
        requests: Sequence[RolloutRequest],
        sampling: SamplingConfig,
        progress: Callable[[RolloutProgress], None] | None = None,
        on_complete: OnComplete | None = None,
    ) -> list[Trajectory]:
        """One trajectory per request, in the order of the requests.

        Args:
            requests: What to roll out; requests of one task share its resized images.
            sampling: Temperature, top_p and run seed.
            progress: Called after every engine step.
            on_complete: Called once per trajectory, when it is final.

        Returns:
            A trajectory for each request; a failure is the end state of its trajectory, not an exception.

        Raises:
            EngineError: The engine failed in a step. After any exception, Ctrl-C included, no request is left in the
                engine and no snippet in the sandbox.
        """
        return _Pass(self, requests, sampling, progress, on_complete).run()


class _Pass:
    """State of one call of `Rollout.run`."""

    def __init__(
        self,
        owner: Rollout,
        requests: Sequence[RolloutRequest],
        sampling: SamplingConfig,
        progress: Callable[[RolloutProgress], None] | None,
        on_complete: OnComplete | None,
    ) -> None:
        self.owner, self.engine, self.config = owner, owner.engine, owner.config
        self.report, self.on_complete = progress, on_complete
        self.progress = RolloutProgress(total=len(requests))
        self.shared = Shared(
            config=owner.config,
            encoder=owner.encoder,
            sandbox=owner.sandbox,
            sampling=sampling,
            banned_ids=owner.banned_ids,
            max_model_len=self.engine.max_model_len,
            policy_version=self.engine.policy_version,
            seed_version=self.engine.policy_version if owner.new_samples else 0,
            views=TaskViews(owner.encoder, requests),
            progress=self.progress,
        )
        self.waiting = deque(enumerate(requests))
        self.generating: dict[str, Episode] = {}
        self.in_tool: dict[str, _Call] = {}
        """Running calls, the earliest first."""
        self.results: queue.SimpleQueue[tuple[_Call, ToolOutcome]] = queue.SimpleQueue()
        self.judging: list[tuple[int, Trajectory, Future[None] | None]] = []
        """Finished trajectories that wait for their score; None: the trajectory is not scored."""
        self.done: dict[int, Trajectory] = {}
        self.started = time.perf_counter()

    def run(self) -> list[Trajectory]:
        try:
            while len(self.done) < self.progress.total:
                if reason := self._reason_to_stop():
                    self._stop_all(reason)
                    break
                self._admit_requests()
                self._admit_tool_results()
                self._step()
                self._complete()
                self._show()
            self._show()
            self._complete(wait_until=time.perf_counter() + self.config.deadline_s)  # within config.longest_s in all
        except BaseException:
            self._abort()
            raise
        finally:
            self.shared.views.close()
        return [self.done[order] for order in range(self.progress.total)]

    def _elapsed(self) -> float:
        return time.perf_counter() - self.started

    def _show(self) -> None:
        if self.report is not None:
            self.progress.elapsed_s = self._elapsed()
            self.report(self.progress)

    # ------------------------------------------------------------------ episodes
    def _admit_requests(self) -> None:
        while self.waiting and len(self.generating) + len(self.in_tool) < self.owner.window:
            order, request = self.waiting.popleft()
            self._continue(Episode(request, order, self.shared), None)

    def _continue(self, episode: Episode, answer: Completion | ToolOutcome | None) -> None:
        """Run an episode to its next step or its end.

        Args:
            episode: The episode that waits for `answer`.
            answer: The result of its last step; None at its start.
        """
        while True:
            try:
                step = episode.steps.send(answer)
            except StopIteration as end:
                return self._end(episode, *end.value)
            if isinstance(step, ToolStep):
                return self._to_tool(episode, step)
            self.generating[episode.id] = episode
            try:
                return self.engine.add_request(step)
            except EngineError as error:
                del self.generating[episode.id]
                answer = failed(step.id, str(error))

    def _end(self, episode: Episode, state: EndState, error: str) -> None:
        self.done[episode.order] = trajectory = episode.end(state, error)
        self.progress.finished += 1
        verdict = None
        if self.owner.score is not None and not state.is_error:
            verdict = self.owner.background.submit(self.owner.score(trajectory))
        self.judging.append((episode.order, trajectory, verdict))

    # ------------------------------------------------------------------ engine
    def _step(self) -> None:
        if self.engine.has_unfinished():
            for completion in self.engine.step():
                self._continue(self.generating.pop(completion.id), completion)
        elif self.generating:
            forgotten = list(self.generating.values())
            self.generating.clear()
            for episode in forgotten:
                self._end(episode, EndState.ERROR_ENGINE, "the engine forgot this request")

    # ------------------------------------------------------------------ tools
    def _to_tool(self, episode: Episode, step: ToolStep) -> None:
        now = time.perf_counter()
        call = _Call(episode, self.owner.background.submit(step.work), handed_over=now, since=now)
        self.in_tool[episode.id] = call

        def hand_back(finished: Future[ToolOutcome]) -> None:
            error = "the background thread was closed" if finished.cancelled() else finished.exception()
            self.results.put((call, finished.result() if error is None else failed_call(error)))

        call.future.add_done_callback(hand_back)

    def _admit_tool_results(self) -> None:
        """Return finished tool calls to their episodes; wait for one only if the engine is idle."""
        while self.in_tool:
            busy = self.engine.has_unfinished()
            if self.config.deterministic and busy:
                return
            arrived = [self._next_result(0.0 if busy else self._patience())]
            if self.config.deterministic:  # all, so that their order is the requests' and not their speed's
                while self.in_tool and self._elapsed() <= self.config.deadline_s:
                    arrived.append(self._next_result(self._patience()))
            for episode, outcome in sorted(filter(None, arrived), key=lambda pair: pair[0].order):
                self._continue(episode, outcome)
            if arrived[-1] is None:
                return

    def _patience(self) -> float:
        """Time in seconds that the rollout may wait at the queue."""
        return max(0.0, min(POLL_S, self.config.tool_deadline_s, self.config.deadline_s - self._elapsed()))

    def _next_result(self, timeout: float) -> tuple[Episode, ToolOutcome] | None:
        """The next finished or timed-out tool call; None if there is none within `timeout` seconds."""
        try:
            call, outcome = self.results.get(timeout=timeout) if timeout > 0 else self.results.get_nowait()
        except queue.Empty:
            return self._late_call()
        if self.in_tool.get(call.episode.id) is not call:
            return None  # timed out meanwhile
        del self.in_tool[call.episode.id]
        now = time.perf_counter()
        for other in self.in_tool.values():
            if other.handed_over >= call.handed_over:
                other.since = now
        return call.episode, outcome

    def _late_call(self) -> tuple[Episode, ToolOutcome] | None:
        """Cancel the first call that is past its time limit; the others continue to wait."""
        limit = self.config.tool_deadline_s
        for call in self.in_tool.values():
            if time.perf_counter() - call.since > limit and not call.future.done():
                call.future.cancel()
                del self.in_tool[call.episode.id]
                return call.episode, failed_call(
                    f"no answer from the sandbox within {limit:g} s (agent.tool_deadline_s)"
                )
        return None

    # ------------------------------------------------------------------ verdicts
    def _complete(self, wait_until: float | None = None) -> None:
        """Report finished and scored trajectories; with a time, wait for the other scores until then."""
        under_way = []
        for order, trajectory, verdict in self.judging:
            if verdict is not None and wait_until is None and not verdict.done():
                under_way.append((order, trajectory, verdict))
                continue
            if verdict is not None:
                self._take_verdict(trajectory, verdict, wait_until or 0.0)
            if self.on_complete is not None:
                self.on_complete(order, trajectory)
        self.judging[:] = under_way

    def _take_verdict(self, trajectory: Trajectory, verdict: Future[None], wait_until: float) -> None:
        while not verdict.done() and (left := wait_until - time.perf_counter()) > 0:
            wait([verdict], timeout=min(POLL_S, left))
            self._show()  # the run is not hung, and may be stopped
        try:
            verdict.result(timeout=0.0)
        except (TimeoutError, JudgeError) as error:
            verdict.cancel()
            if trajectory.end_state is EndState.ANSWERED:  # without an answer the rule alone decides, with the group
                trajectory.end_state = EndState.ERROR_JUDGE
                trajectory.error = str(error) or f"no verdict within {self.config.deadline_s:g} s (agent.deadline_s)"

    # ------------------------------------------------------------------ stopping
    def _reason_to_stop(self) -> str:
        """Reason to end all unfinished trajectories now; empty for none."""
        deadline_s, fraction = self.config.deadline_s, self.config.early_stop_fraction
        if self._elapsed() > deadline_s:
            return f"agent.deadline_s ({deadline_s:g} s) was over"
        if len(self.done) >= fraction * self.progress.total:
            finished = f"{len(self.done)} of {self.progress.total} trajectories had finished"
            return f"{finished} (agent.early_stop_fraction {fraction:g})"
        return ""

    def _stop_all(self, reason: str) -> None:
        """End everything that runs or waits as `stopped`: unfinished, not wrong."""
        self.engine.abort(list(self.generating))
        for call in self.in_tool.values():
            call.future.cancel()
        unfinished = [*self.generating.values(), *(call.episode for call in self.in_tool.values())]
        unfinished += [Episode(request, order, self.shared) for order, request in self.waiting]
        for episode in unfinished:
            self._end(episode, EndState.TRUNCATED, reason)
        self.generating.clear()
        self.in_tool.clear()
        self.waiting.clear()

    def _abort(self) -> None:
        """Remove everything from engine and sandbox after an exception or Ctrl-C."""
        futures: list[Future[ToolOutcome] | Future[None]] = [call.future for call in self.in_tool.values()]
        for future in [*futures, *(verdict for *_, verdict in self.judging if verdict is not None)]:
            future.cancel()
        try:
            self.engine.abort(list(self.generating))
        except Exception:  # an engine that broke in its step may not answer; the first exception is the one to show
            logger.exception("the engine could not forget its requests")
