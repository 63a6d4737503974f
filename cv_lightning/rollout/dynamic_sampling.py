"""Dynamic sampling: tasks in order until enough groups have rewards that differ; the rest comes first next time.

DAPO (2503.14476): a group of equal rewards has no gradient, and an iteration full of them a noisy one. The data module
yields `max_oversample` times the tasks of an iteration; that bounds what an iteration may roll out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import lightning.pytorch as pl

from cv_lightning.distributed import gather_lists
from cv_lightning.types import Group, Iteration, Task

RollOut = Callable[[Sequence[Task]], list[Group]]


class TaskQueue:
    """The tasks that this rank has not rolled out yet, oldest first.

    A batch is a pure function of its number, so a task is kept in a checkpoint as (number of its batch, position).
    """

    def __init__(self) -> None:
        self.waiting: list[tuple[int, int, Task]] = []
        self.places: list[list[tuple[int, int]]] = []
        """Of every rank's waiting tasks, at the end of the last iteration."""
        self._restored: list[list[tuple[int, int]]] | None = None

    def add(self, batch: Iteration, trainer: pl.Trainer) -> None:
        """Put an iteration's tasks at the end."""
        if self._restored is not None:
            self._rebuild(self._restored, trainer)
            self._restored = None
        self.waiting += [(batch.index, position, task) for position, task in enumerate(batch.tasks)]

    def take(self, count: int) -> list[Task]:
        """The next `count` tasks, or as many as there are."""
        taken, self.waiting = self.waiting[: max(count, 0)], self.waiting[max(count, 0) :]
        return [task for _, _, task in taken]

    def close_iteration(self, limit: int) -> int:
        """Keep the oldest `limit` tasks and drop the rest; call it on all ranks.

        Returns:
            How many were dropped.
        """
        dropped = max(0, len(self.waiting) - limit)
        self.waiting = self.waiting[:limit]
        self.places = gather_lists([[(index, position) for index, position, _ in self.waiting]])
        return dropped

    def state_dict(self) -> dict[str, Any]:
        """The same on every rank, as a checkpoint keeps one."""
        return {"places": self.places} if any(self.places) else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Remember what to rebuild once there is a loader."""
        self._restored = state.get("places")

    def _rebuild(self, places: list[list[tuple[int, int]]], trainer: pl.Trainer) -> None:
        if len(places) != trainer.world_size:
            return  # another number of ranks shares tasks out differently
        loader: Any = trainer.train_dataloader
        build = loader.build
        batches: dict[int, Iteration] = {}
        for index, position in places[trainer.global_rank]:
            if index not in batches:
                batches[index] = build(index)
            self.waiting.append((index, position, batches[index].tasks[position]))


def sample_groups(
    queue: TaskQueue,
    num_groups: int,
    roll_out: RollOut,
    has_reward_variance: Callable[[Group], bool],
    reduce_max: Callable[[float], float],
) -> tuple[list[Group], int]:
    """Roll tasks out in rounds, each of as many as groups are missing.

    Ends when every rank has the groups that it needs or no tasks.

    Args:
        queue: Tasks in order; what is rolled out leaves it.
        num_groups: Groups with reward variance that this rank needs.
        roll_out: Makes a group of each task.
        has_reward_variance: Tells which groups can be learned from.
        reduce_max: Over ranks.

    Returns:
        All groups that were rolled out, at most `num_groups` of which have reward variance, and the number of rounds.
    """
    groups: list[Group] = []
    rounds = 0
    while True:
        tasks = queue.take(num_groups - sum(has_reward_variance(group) for group in groups))
        if not int(reduce_max(len(tasks))):
            break
        groups += roll_out(tasks)
        rounds += 1
    return groups, rounds
