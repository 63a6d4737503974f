"""From tasks to scored groups: roll out, score. No algorithm, no Lightning, no disk."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from statistics import fmean

from cv_lightning.agent.driver import Rollout, RolloutProgress
from cv_lightning.agent.request import requests_of
from cv_lightning.engines.base import SamplingConfig
from cv_lightning.rewards import RewardModule
from cv_lightning.rewards.judge.config import JUDGE_COUNTS
from cv_lightning.rewards.module import TermValues
from cv_lightning.rl.groups import has_advantage
from cv_lightning.types import EndState, Group, Task, Trajectory

ADDED_METRICS = frozenset(
    [
        *(f"rollout/{name}" for name in ("trajectories", "tasks_waiting", "tasks_dropped")),
        *(f"judge/{name}" for name in JUDGE_COUNTS),
    ]
)
"""Metrics that are sums over ranks."""


@dataclass
class Collector:
    """Rolls tasks out to scored groups."""

    rollout: Rollout
    rewards: RewardModule
    on_group: Callable[[Group], None] | None = None
    """Told of every group as soon as it is complete and scored, while others still roll out."""

    def roll_out(
        self,
        tasks: Sequence[Task],
        num_samples: int,
        sampling: SamplingConfig,
        iteration: int = 0,
        progress: Callable[[RolloutProgress], None] | None = None,
    ) -> list[Group]:
        """One group of `num_samples` trajectories per task, in the order of the tasks.

        Every trajectory that can be scored gets a reward.
        """
        groups = [Group(task=task, trajectories=[], iteration=iteration) for task in tasks]
        waiting: list[tuple[Group, Future[TermValues]]] = []

        def scored(group: Group, *terms: TermValues) -> None:
            self.rewards.score_group(group, *terms)
            if self.on_group is not None:
                self.on_group(group)

        def score_answered(*, wait: bool) -> None:
            while waiting and (wait or waiting[0][1].done()):
                group, asked = waiting.pop(0)
                scored(group, asked.result())

        def on_complete(number: int, trajectory: Trajectory) -> None:
            group = groups[number // num_samples]
            group.trajectories.append(trajectory)
            if len(group.trajectories) == num_samples:
                group.trajectories.sort(key=lambda member: member.sample)
                if self.rewards.waits_for_terms:
                    waiting.append((group, self.rollout.background.submit(self.rewards.ask_terms(group))))
                else:
                    scored(group)
            score_answered(wait=False)

        self.rollout.run(requests_of(tasks, num_samples), sampling, progress, on_complete)
        score_answered(wait=True)
        return groups


def rollout_metrics(groups: Sequence[Group], elapsed_s: float) -> dict[str, float]:
    """`rollout/*` numbers of one iteration on this rank: lengths, end states, signal, speed.

    What evaluations measure too (accuracy, tool use, turns, sampled tokens) is `EvalSummary`'s, under the same words.
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
        "rollout/masked_frac": fmean(t.reward is not None and t.advantage is None for t in trajectories),
        "rollout/tokens_per_s": sampled / max(elapsed_s, 1e-9),
        "rollout/tool_calls_per_s": len(results) / max(elapsed_s, 1e-9),
    }
    for state in EndState:
        metrics[end_state_metric(state)] = fmean(t.end_state is state for t in trajectories)
    return metrics


def end_state_metric(state: EndState) -> str:
    """Name of the metric that gives the share of trajectories which ended so."""
    return f"rollout/end_{state.value.replace(':', '_')}_frac"


def merge_metrics(parts: Sequence[dict[str, float]]) -> dict[str, float]:
    """One number per name from those of all ranks, which need not have the same names.

    Counts and speeds are added, `*_max` and `*_max_s` are the largest, times are means over the ranks; what is a mean
    over trajectories (`rollout/*`) weighs each rank by how many it has. NaN says that a rank has none.
    """
    merged = {}
    for name in dict.fromkeys(name for part in parts for name in part):
        having = [part for part in parts if name in part and not math.isnan(part[name])]
        values = [float(part[name]) for part in having]
        weights = [part.get("rollout/trajectories", 1.0) if name.startswith("rollout/") else 1.0 for part in having]
        if not values:
            merged[name] = math.nan
        elif name in ADDED_METRICS or name.endswith("_per_s"):
            merged[name] = sum(values)
        elif name.endswith(("_max", "_max_s")):
            merged[name] = max(values)
        else:
            merged[name] = fmean(values, weights if sum(weights) else None)
    return merged
