"""Rolls tasks out to scored groups, and merges the metrics of rollouts over ranks."""

from __future__ import annotations

import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from statistics import fmean

from cv_lightning.agent.driver import POLL_S, Rollout, RolloutProgress
from cv_lightning.agent.request import requests_of
from cv_lightning.engines.base import Engine, SamplingConfig
from cv_lightning.rewards import RewardModule
from cv_lightning.rewards.judge.config import JUDGE_COUNTS
from cv_lightning.rewards.module import TermValues
from cv_lightning.rl.groups import has_advantage
from cv_lightning.rollout.engine_group import EngineGroup
from cv_lightning.types import EndState, Group, Task, Trajectory

logger = logging.getLogger(__name__)

ADDED_METRICS = frozenset(
    [
        *(f"rollout/{name}" for name in ("trajectories", "tasks_waiting", "tasks_dropped")),
        *(f"judge/{name}" for name in JUDGE_COUNTS),
    ]
)
"""Metrics that are sums over ranks."""
OF_RANKS = frozenset(["rollout/groups_found_frac"])
"""Metrics of which every rank has one value, whatever its number of trajectories."""


@contextmanager
def _unwatched(name: str) -> Iterator[Callable[[], None]]:
    yield lambda: None


@dataclass
class Collector:
    """Rolls tasks out to scored groups."""

    rollout: Rollout
    rewards: RewardModule
    on_group: Callable[[Group], None] | None = None
    """Called with every group as soon as it is scored, or at the end if ranks share the engine."""
    watch: Callable[[str], AbstractContextManager[Callable[[], None]]] = _unwatched
    """Makes a context manager around one rollout from its name; it yields a function to call on progress."""
    check_stop: Callable[[], None] | None = None
    """Called at every step of the agent loop; raises to end the rollout."""
    ranks: EngineGroup | None = None
    """The ranks that share the engine; None for an engine of this rank alone."""

    def roll_out(
        self,
        tasks: Sequence[Task],
        num_samples: int,
        sampling: SamplingConfig,
        iteration: int = 0,
        progress: Callable[[RolloutProgress], None] | None = None,
    ) -> list[Group]:
        """Make one group of `num_samples` trajectories per task, in the order of the tasks.

        Every trajectory that can be scored gets a reward. This is a collective of the ranks that share the engine.

        Raises:
            Stopped: A signal has stopped an evaluation.
        """
        with self.watch(f"rollout {iteration}" if iteration else "rollout") as note_progress:

            def report(state: RolloutProgress) -> None:
                note_progress()
                if self.check_stop is not None:
                    self.check_stop()
                if progress is not None:
                    progress(state)

            def run_here(engine: Engine, tasks: Sequence[Task]) -> list[Group]:
                here = Collector(replace(self.rollout, engine=engine), self.rewards)
                return here._run(tasks, num_samples, sampling, iteration, report)

            if self.ranks is None:
                return self._run(tasks, num_samples, sampling, iteration, report)
            groups = self.ranks.share(self.rollout.engine, tasks, run_here, note_progress)
        if self.on_group is not None:
            for group in groups:
                self.on_group(group)
        return groups

    def _run(
        self,
        tasks: Sequence[Task],
        num_samples: int,
        sampling: SamplingConfig,
        iteration: int,
        progress: Callable[[RolloutProgress], None],
    ) -> list[Group]:
        groups = [Group(task=task, trajectories=[], iteration=iteration) for task in tasks]
        waiting: list[tuple[Group, Future[TermValues]]] = []
        shown: list[RolloutProgress] = []
        end = time.perf_counter() + self.rollout.config.longest_s

        def scored(group: Group, *terms: TermValues) -> None:
            self.rewards.score_group(group, *terms)
            if self.on_group is not None:
                self.on_group(group)

        def score_answered() -> None:
            while waiting and waiting[0][1].done():
                group, asked = waiting.pop(0)
                scored(group, asked.result())

        def score_rest() -> None:
            pending = {asked for _, asked in waiting}
            while pending and (left := end - time.perf_counter()) > 0:
                _, pending = wait(pending, timeout=min(POLL_S, left))
                progress(shown[-1])  # the run is not hung, and may be stopped
            for group, asked in waiting:
                if asked.done():
                    scored(group, asked.result())
                    continue
                asked.cancel()
                logger.warning("reward.terms gave no values for task %s before the rollout's deadline", group.task.id)
                scored(group, self.rewards.no_terms(group))

        def on_complete(number: int, trajectory: Trajectory) -> None:
            group = groups[number // num_samples]
            group.trajectories.append(trajectory)
            if len(group.trajectories) == num_samples:
                group.trajectories.sort(key=lambda member: member.sample)
                if self.rewards.waits_for_terms:
                    waiting.append((group, self.rollout.background.submit(self.rewards.ask_terms(group))))
                else:
                    scored(group)
            score_answered()

        def show(state: RolloutProgress) -> None:
            shown[:] = [state]
            progress(state)

        self.rollout.run(requests_of(tasks, num_samples), sampling, show, on_complete)
        score_rest()
        return groups


def rollout_metrics(groups: Sequence[Group], elapsed_s: float) -> dict[str, float]:
    """Metrics `rollout/*` of one iteration on this rank: lengths, end states, reward variance, speed.

    `EvalSummary` has the metrics that evaluations measure too: accuracy, tool use, turns, sampled tokens.
    """
    trajectories = [t for group in groups for t in group.trajectories]
    if not trajectories:
        return {"rollout/trajectories": 0.0}
    results = [turn.result for t in trajectories for turn in t.turns if turn.result is not None]
    sampled = sum(sum(t.loss_mask) for t in trajectories)
    metrics = {
        "rollout/trajectories": float(len(trajectories)),
        "rollout/tool_used_frac": fmean(t.num_tool_calls > 0 for t in trajectories),
        "rollout/length_mean": fmean(len(t.token_ids) for t in trajectories),
        "rollout/length_max": float(max(len(t.token_ids) for t in trajectories)),
        "rollout/parse_errors_mean": fmean(sum(turn.parse_error is not None for turn in t.turns) for t in trajectories),
        "rollout/reward_variance_frac": fmean(has_advantage(g) for g in groups),
        "rollout/unscored_frac": fmean(t.reward is None for t in trajectories),
        "rollout/chance_accuracy": chance_accuracy([group.task.ground_truth for group in groups]),
        "rollout/masked_frac": fmean(t.reward is not None and t.advantage is None for t in trajectories),
        "rollout/tokens_per_s": sampled / max(elapsed_s, 1e-9),
        "rollout/tool_calls_per_s": len(results) / max(elapsed_s, 1e-9),
    }
    for state in EndState:
        metrics[end_state_metric(state)] = fmean(t.end_state is state for t in trajectories)
    return metrics


def chance_accuracy(answers: Sequence[str]) -> float:
    """Probability that the answers of two tasks are equal: the accuracy of giving another task's answer; NaN of one."""
    pairs = len(answers) * (len(answers) - 1)
    counts = Counter(answer.strip().casefold() for answer in answers).values()
    return sum(count * (count - 1) for count in counts) / pairs if pairs else math.nan


def end_state_metric(state: EndState) -> str:
    """Name of the metric with the fraction of trajectories that ended in a state."""
    return f"rollout/end_{state.value.replace(':', '_')}_frac"


def merge_metrics(parts: Sequence[dict[str, float]]) -> dict[str, float]:
    """Merge the metrics of all ranks, which may have different names.

    Counts and speeds are added, `*_max` and `*_max_s` take the maximum, times the mean over ranks. Means over
    trajectories (`rollout/*` except `OF_RANKS`) weigh each rank by its number of trajectories. NaN means that a rank
    has no value.
    """
    merged = {}
    for name in dict.fromkeys(name for part in parts for name in part):
        having = [part for part in parts if name in part and not math.isnan(part[name])]
        values = [float(part[name]) for part in having]
        weighted = name.startswith("rollout/") and name not in OF_RANKS
        weights = [part.get("rollout/trajectories", 1.0) if weighted else 1.0 for part in having]
        if not values:
            merged[name] = math.nan
        elif name in ADDED_METRICS or name.endswith("_per_s"):
            merged[name] = sum(values)
        elif name.endswith(("_max", "_max_s")):
            merged[name] = max(values)
        else:
            merged[name] = fmean(values, weights if sum(weights) else None)
    return merged
