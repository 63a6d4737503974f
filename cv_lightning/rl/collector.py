"""From tasks to groups: roll out, score, compute advantages. No Lightning, no disk."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean

from cv_lightning.agent.loop import Rollout, RolloutProgress, jobs_of
from cv_lightning.engine.base import SamplingConfig
from cv_lightning.rewards import RewardModule
from cv_lightning.rl.advantages import AdvantageConfig, batch_advantages
from cv_lightning.types import EndState, Group, Task, ToolStatus, Trajectory


@dataclass
class Collector:
    """Rolls tasks out to scored groups with advantages."""

    rollout: Rollout
    rewards: RewardModule
    advantage: AdvantageConfig
    reduce_sum: Callable[[list[float]], Sequence[float]] | None = None
    """Sums over ranks, for advantages that need the whole batch; None: one rank."""

    def collect(
        self,
        tasks: Sequence[Task],
        num_samples: int,
        sampling: SamplingConfig,
        iteration: int = 0,
        progress: Callable[[RolloutProgress], None] | None = None,
    ) -> list[Group]:
        """One group of `num_samples` trajectories per task, in the order of the tasks.

        Every trajectory that can be scored gets a reward; `advantage` stays None where it cannot, and is 0.0
        throughout a group whose rewards are all equal.
        """
        trajectories = self.rollout.run(jobs_of(tasks, num_samples), sampling, progress)
        groups = []
        for index, task in enumerate(tasks):
            members = trajectories[index * num_samples : (index + 1) * num_samples]
            group = Group(task=task, trajectories=members, iteration=iteration)
            self.rewards.score_group(group)
            groups.append(group)
        assign_advantages(groups, self.advantage, self.reduce_sum)
        return groups


def assign_advantages(
    groups: Sequence[Group],
    config: AdvantageConfig,
    reduce_sum: Callable[[list[float]], Sequence[float]] | None = None,
) -> None:
    """Set `advantage` on the scored trajectories; the unscored ones are left out of their group's statistics.

    Call it on every rank, also on one without groups (see `batch_advantages`).
    """
    scored = [[(t, t.reward.total) for t in group.trajectories if t.reward is not None] for group in groups]
    values = batch_advantages([[reward for _, reward in members] for members in scored], config, reduce_sum)
    for group in groups:
        for trajectory in group.trajectories:
            trajectory.advantage = None
    for members, advantages in zip(scored, values, strict=True):
        for (trajectory, _), advantage in zip(members, advantages, strict=True):
            trajectory.advantage = float(advantage)


def carries_signal(group: Group) -> bool:
    """True if any trajectory of the group has an advantage other than 0."""
    return any(t.advantage for t in group.trajectories)


def rollout_metrics(groups: Sequence[Group], elapsed_s: float) -> dict[str, float]:
    """`rollout/*` numbers of one iteration on this rank: lengths, turns, end states, tools, speed."""
    trajectories = [t for group in groups for t in group.trajectories]
    if not trajectories:
        return {"rollout/trajectories": 0.0}
    results = [turn.result for t in trajectories for turn in t.turns if turn.result is not None]
    sampled = sum(sum(t.loss_mask) for t in trajectories)
    metrics = {
        "rollout/trajectories": float(len(trajectories)),
        "rollout/turns_mean": fmean(len(t.turns) for t in trajectories),
        "rollout/tool_calls_mean": fmean(t.num_tool_calls for t in trajectories),
        "rollout/tool_used_frac": fmean(t.num_tool_calls > 0 for t in trajectories),
        "rollout/sampled_tokens_mean": sampled / len(trajectories),
        "rollout/length_mean": fmean(len(t.token_ids) for t in trajectories),
        "rollout/length_max": float(max(len(t.token_ids) for t in trajectories)),
        "rollout/parse_errors_mean": fmean(sum(turn.parse_error is not None for turn in t.turns) for t in trajectories),
        "rollout/signal_frac": fmean(carries_signal(g) for g in groups),
        "rollout/unscored_frac": fmean(t.reward is None for t in trajectories),
        "rollout/tokens_per_s": sampled / max(elapsed_s, 1e-9),
        "rollout/tool_calls_per_s": len(results) / max(elapsed_s, 1e-9),
    }
    if results:
        metrics["rollout/tool_ok_frac"] = fmean(r.status is ToolStatus.OK for r in results)
    for state in EndState:
        share = fmean(t.end_state is state for t in trajectories)
        if share:
            metrics[f"rollout/end_{state.value.replace(':', '_')}_frac"] = share
    return metrics


def is_trainable(trajectory: Trajectory) -> bool:
    """True if the loss counts it: scored, and some token sampled."""
    return trajectory.advantage is not None and any(trajectory.loss_mask)
