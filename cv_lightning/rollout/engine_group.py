"""Rollouts among several ranks: watched, and with a tensor-parallel engine made by one rank for all that share it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import lightning.pytorch as pl
import torch

from cv_lightning.agent.driver import RolloutProgress
from cv_lightning.engines import SamplingConfig
from cv_lightning.engines.process import engine_device_index
from cv_lightning.engines.tensor_parallel import LeadingEngine, follow
from cv_lightning.rollout.collector import Collector
from cv_lightning.types import CVLightningError, Group, Task


class EngineGroup:
    """The ranks that share an engine: `size` neighbours. Build it on every rank of the run.

    Args:
        size: `engine.tensor_parallel_size`.
        trainer: knows this rank's number and how many there are on a node.

    Raises:
        CVLightningError: the ranks of a node cannot be shared out.
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
        # Objects go over gloo, also where weights go over NCCL. Every rank has to make every group.
        groups = [
            torch.distributed.new_group(list(range(first, first + size)), backend="gloo")
            for first in range(0, trainer.world_size, size)
        ]
        self._group = groups[self.leader // size]

    def gather(self, value: Any) -> list[Any]:
        """Of every rank of the group."""
        values: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(values, value, group=self._group)
        return values

    def from_leader(self, value: Any = None) -> Any:
        """What the leader gives; the others give nothing."""
        box = [value]
        torch.distributed.broadcast_object_list(box, src=self.leader, group=self._group)
        return box[0]


@contextmanager
def _unwatched(name: str) -> Iterator[Callable[[], None]]:
    yield lambda: None


@dataclass
class RankCollector(Collector):
    """A collector under a watchdog, which can share an engine with other ranks.

    The ranks that share one bring their tasks to the first of them, which runs the agent, and get the groups back.
    """

    watch: Callable[[str], AbstractContextManager[Callable[[], None]]] = _unwatched
    """Context manager around one rollout, made from its name; gives what is called at every step of the agent loop."""
    check_stop: Callable[[], None] | None = None
    """Called at every step of the agent loop on a rank that runs it; raises to end the rollout."""
    ranks: EngineGroup | None = None
    """None: this rank has an engine of its own."""

    def roll_out(
        self,
        tasks: Sequence[Task],
        num_samples: int,
        sampling: SamplingConfig,
        iteration: int = 0,
        progress: Callable[[RolloutProgress], None] | None = None,
    ) -> list[Group]:
        """As `Collector`; a collective of the ranks that share the engine.

        Raises:
            Stopped: a signal has stopped an evaluation.
        """
        with self.watch(f"rollout {iteration}" if iteration else "rollout") as get_on:

            def report(state: RolloutProgress) -> None:
                get_on()
                if self.check_stop is not None:
                    self.check_stop()
                if progress is not None:
                    progress(state)

            if self.ranks is None:
                return super().roll_out(tasks, num_samples, sampling, iteration, report)
            return self._share(self.ranks, tasks, num_samples, sampling, iteration, report, get_on)

    def _share(
        self,
        ranks: EngineGroup,
        tasks: Sequence[Task],
        num_samples: int,
        sampling: SamplingConfig,
        iteration: int,
        progress: Callable[[RolloutProgress], None],
        get_on: Callable[[], None],
    ) -> list[Group]:
        by_rank = ranks.gather(list(tasks))
        engine = self.rollout.engine
        groups: list[Group] = []
        if ranks.position:
            follow(engine, ranks.from_leader, get_on)
        else:
            leading = LeadingEngine(engine, ranks.from_leader)
            shared = Collector(replace(self.rollout, engine=leading), self.rewards)
            try:
                every = [task for part in by_rank for task in part]
                groups = shared.roll_out(every, num_samples, sampling, iteration, progress)
            finally:
                leading.finish()
        groups = ranks.from_leader(groups)
        first = sum(map(len, by_rank[: ranks.position]))
        return groups[first : first + len(tasks)]


def check_engine_device(trainer: pl.Trainer) -> None:
    """Refuse a trainer whose policy is on another GPU than the one that vLLM takes in the same process.

    Raises:
        CVLightningError: They differ.
    """
    device = trainer.strategy.root_device
    index = engine_device_index(trainer.world_size)
    if device.type == "cuda" and device.index not in (None, index):
        raise CVLightningError(
            f"the policy is on {device}, the engine would be on cuda:{index}. Start with `python -m cv_lightning`, "
            f"which makes the GPUs of --trainer.devices the only visible ones, or set CUDA_VISIBLE_DEVICES to them and "
            f"trainer.devices to their number ({trainer.num_devices})"
        )
