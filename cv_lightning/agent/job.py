"""What a rollout is asked for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from cv_lightning.types import Task


@dataclass(frozen=True, slots=True)
class Job:
    """One trajectory to make."""

    task: Task
    sample: int
    occurrence: int = 0
    """How often the same task came before among the jobs: a data set smaller than an iteration brings it again."""


def jobs_of(tasks: Iterable[Task], num_samples: int) -> list[Job]:
    """`num_samples` jobs per task, the samples of one task next to each other so that they share the prompt's cache."""
    jobs: list[Job] = []
    seen = Counter[str]()
    for task in tasks:
        jobs += [Job(task, sample, seen[task.id]) for sample in range(num_samples)]
        seen[task.id] += 1
    return jobs
