"""Means of the reward's components: over everything, by data source and by required transform. Pure functions.

Ranks add up sums and counts before the mean is taken: their batches hold different data sources, and a mean of means
would weigh a source by rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from cv_lightning.types import Group, RewardBreakdown

Sums = dict[str, tuple[float, int]]
"""(sum, number of trajectories) by metric name."""


def reward_sums(groups: Sequence[Group]) -> Sums:
    """Sums over the scored trajectories, components unweighted.

    Returns:
        `reward/<name>` for every component, for `total`, for `answer_accuracy` (before the gate) and for `judged` (the
        judge decided); the same as `reward/by_source/<data source>/<name>` and as
        `reward/by_transform/<transform>/<name>`, where `none` stands for tasks without transforms. A trajectory of a
        task with several transforms counts for each.
    """
    parts: list[Sums] = []
    for group in groups:
        transforms = dict.fromkeys(group.task.required_transforms) or {"none": None}
        prefixes = ["reward", f"reward/by_source/{group.task.data_source}"]
        prefixes += [f"reward/by_transform/{name}" for name in transforms]
        rows = [_values(trajectory.reward) for trajectory in group.trajectories if trajectory.reward is not None]
        for name in rows[0] if rows else ():
            found = math.fsum(row[name] for row in rows), len(rows)
            parts.append({f"{prefix}/{name}": found for prefix in prefixes})
    return added(parts)


def added(parts: Iterable[Mapping[str, tuple[float, int]]]) -> Sums:
    """The sums of several batches or ranks added up."""
    sums: Sums = {}
    for part in parts:
        for name, (value, number) in part.items():
            total, count = sums.get(name, (0.0, 0))
            sums[name] = total + value, count + number
    return sums


def means(sums: Mapping[str, tuple[float, int]]) -> dict[str, float]:
    """Mean by name."""
    return {name: total / count for name, (total, count) in sums.items()}


def _values(reward: RewardBreakdown) -> dict[str, float]:
    return reward.components | {
        "total": reward.total,
        "answer_accuracy": float(reward.correct),
        "judged": float(reward.scored_by == "judge"),
    }
