"""What a rollout is asked for."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from cv_lightning.types import Task


@dataclass(frozen=True, slots=True)
class Job:
    """One trajectory to make."""

    task: Task
    sample: int


def jobs_of(tasks: Iterable[Task], num_samples: int) -> list[Job]:
    """`num_samples` jobs per task, the samples of one task next to each other so that they share the prompt's cache."""
    return [Job(task, sample) for task in tasks for sample in range(num_samples)]
