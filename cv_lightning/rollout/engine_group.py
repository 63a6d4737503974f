"""Ranks that share a tensor-parallel engine: the first of them rolls out the tasks of all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import lightning.pytorch as pl
import torch

from cv_lightning.engines import Engine
from cv_lightning.engines.process import engine_device_index
from cv_lightning.engines.tensor_parallel import LeaderEngine, run_follower
from cv_lightning.types import CVLightningError, Group, Task


class EngineGroup:
    """A group of `size` consecutive ranks that share an engine. Build it on every rank of the run.

    Raises:
        CVLightningError: The size does not divide the ranks of a node.
    """

    def __init__(self, size: int, trainer: pl.Trainer) -> None:
        if trainer.num_devices % size:
            raise CVLightningError(
                f"engine.tensor_parallel_size {size} does not divide the {trainer.num_devices} rank(s) of a node "
                "(trainer.devices): an engine may not span nodes"
            )
        self.leader = trainer.global_rank - trainer.global_rank % size
        self.position = trainer.global_rank - self.leader
        self.size = size
        # Objects are sent over gloo, also where weights are sent over NCCL. Every rank has to make every group.
        groups = [
            torch.distributed.new_group(list(range(first, first + size)), backend="gloo")
            for first in range(0, trainer.world_size, size)
        ]
        self._group = groups[self.leader // size]

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks of the group."""
        values: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(values, value, group=self._group)
        return values

    def from_leader(self, value: Any = None) -> Any:
        """Broadcast the leader's value; the others give none."""
        box = [value]
        torch.distributed.broadcast_object_list(box, src=self.leader, group=self._group)
        return box[0]

    def share(
        self,
        engine: Engine,
        tasks: Sequence[Task],
        run: Callable[[Engine, Sequence[Task]], list[Group]],
        note_progress: Callable[[], None],
    ) -> list[Group]:
        """Roll out the tasks of all ranks of the group on its leader; returns the groups of this rank's tasks.

        This is a collective. The other ranks follow the engine's commands and call `note_progress` at each.
        """
        by_rank = self.gather(list(tasks))
        groups: list[Group] = []
        if self.position:
            run_follower(engine, self.from_leader, note_progress)
        else:
            leading = LeaderEngine(engine, self.from_leader)
            try:
                groups = run(leading, [task for part in by_rank for task in part])
            finally:
                leading.finish()
        groups = self.from_leader(groups)
        first = sum(map(len, by_rank[: self.position]))
        return groups[first : first + len(tasks)]


def check_engine_device(trainer: pl.Trainer) -> None:
    """Check that the policy is on the GPU that vLLM uses in the same process; else raise CVLightningError."""
    device = trainer.strategy.root_device
    index = engine_device_index(trainer.world_size)
    if device.type == "cuda" and device.index not in (None, index):
        raise CVLightningError(
            f"the policy is on {device}, the engine would be on cuda:{index}. Start with `cv-lightning`, "
            f"which makes the GPUs of --trainer.devices the only visible ones, or set CUDA_VISIBLE_DEVICES to them and "
            f"trainer.devices to their number ({trainer.num_devices})"
        )
