"""Dynamic sampling (DAPO, 2503.14476): roll out tasks in order until enough groups have rewards that differ.

A group of equal rewards has no gradient, and an iteration full of them a noisy one. The data module yields
`max_oversample` times the tasks of an iteration, which bounds its rollouts; unused tasks come first in the next one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import lightning.pytorch as pl

from cv_lightning.distributed import gather_lists
from cv_lightning.types import Group, Iteration, Task

RollOut = Callable[[Sequence[Task]], list[Group]]


class TaskQueue:
    """Tasks that this rank has not rolled out yet, oldest first.

    A checkpoint stores a task as (number of its batch, position), because a batch is a function of its number alone.
    """

    def __init__(self) -> None:
        self.waiting: list[tuple[int, int, Task]] = []
        self.places: list[list[tuple[int, int]]] = []
        """(batch, position) of every rank's waiting tasks at the end of the last iteration."""
        self._restored: list[list[tuple[int, int]]] | None = None

    def add(self, batch: Iteration, trainer: pl.Trainer) -> None:
        """Append an iteration's tasks."""
        if self._restored is not None:
            self._rebuild(self._restored, trainer)
            self._restored = None
        self.waiting += [(batch.index, position, task) for position, task in enumerate(batch.tasks)]

    def take(self, count: int) -> list[Task]:
        """Remove and return the next `count` tasks, or all if there are fewer."""
        count = max(count, 0)
        taken, self.waiting = self.waiting[:count], self.waiting[count:]
        return [task for _, _, task in taken]

    def close_iteration(self, limit: int) -> int:
        """Drop all but the oldest `limit` tasks and return how many; call this on all ranks."""
        dropped = max(0, len(self.waiting) - limit)
        self.waiting = self.waiting[:limit]
        self.places = gather_lists([[(index, position) for index, position, _ in self.waiting]])
        return dropped

    def state_dict(self) -> dict[str, Any]:
        """State of all ranks, equal on each of them."""
        return {"places": self.places} if any(self.places) else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Keep the state until there is a loader to rebuild the tasks from."""
        self._restored = state.get("places")

    def _rebuild(self, places: list[list[tuple[int, int]]], trainer: pl.Trainer) -> None:
        if len(places) != trainer.world_size:
            return  # another number of ranks distributes tasks differently
        loader: Any = trainer.train_dataloader
        build = cache(loader.build)
        for index, position in places[trainer.global_rank]:
            self.waiting.append((index, position, build(index).tasks[position]))


def sample_groups(
    queue: TaskQueue,
    num_groups: int,
    roll_out: RollOut,
    has_reward_variance: Callable[[Group], bool],
    reduce_max: Callable[[float], float],
) -> tuple[list[Group], int]:
    """Roll tasks out in rounds of as many tasks as groups are missing.

    Ends when each rank has the groups that it needs, or no more tasks.

    Args:
        queue: Tasks in order; those that are rolled out leave it.
        num_groups: Groups with reward variance that this rank needs.
        roll_out: Makes a group of each task.
        has_reward_variance: True for groups that can be learned from.
        reduce_max: Maximum over ranks.

    Returns:
        All groups that were rolled out, at most `num_groups` of them with reward variance, and the number of rounds.
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
