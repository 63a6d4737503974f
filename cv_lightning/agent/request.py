"""Requests to a rollout."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from cv_lightning.types import Task


@dataclass(frozen=True, slots=True)
class RolloutRequest:
    """One trajectory to make."""

    task: Task
    sample_index: int
    """Index within the task's group, from 0."""
    repeat: int = 0
    """Number of earlier occurrences of the task in the rollout; a data set smaller than an iteration repeats tasks."""


def requests_of(tasks: Iterable[Task], num_samples: int) -> list[RolloutRequest]:
    """`num_samples` requests per task, those of one task next to each other so that they share the prompt's cache."""
    requests: list[RolloutRequest] = []
    seen = Counter[str]()
    for task in tasks:
        requests += [RolloutRequest(task, index, seen[task.id]) for index in range(num_samples)]
        seen[task.id] += 1
    return requests
