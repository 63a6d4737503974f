"""The start-up self-test of training: do engine and trainer agree on the log-probabilities of sampled tokens?

It rolls out the first tasks of the run and compares log-probabilities (`mismatch.py`). The engine answers the same
tasks under other weights first (`stale_cache.py`), which exposes weights that a sync misses and caches that outlive it.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

from cv_lightning.agent.config import AgentConfig
from cv_lightning.engines import Engine, EngineConfig, SamplingConfig, engine_kind
from cv_lightning.rollout.collector import Collector
from cv_lightning.rollout.mismatch import MismatchReport, check_mismatch
from cv_lightning.rollout.stale_cache import (
    other_vision_in_place,
    stale_images_message,
    trained_vision,
    unseen,
    with_two_images,
)
from cv_lightning.types import ParityError, Task, Trajectory

if TYPE_CHECKING:
    import lightning.pytorch as pl

    from cv_lightning.modules.base import PolicyModule

logger = logging.getLogger(__name__)
NUM_TASKS, NUM_SAMPLES = 4, 2
"""Compared tasks of each rank, and trajectories of each task."""
FILLING_TOKENS = 4
"""Tokens sampled under the other weights, where only the prompts matter."""


class Rollouts(Protocol):
    """The part of `RolloutCallback` that the self-test uses."""

    agent: AgentConfig
    engine_config: EngineConfig
    sampling: SamplingConfig
    parity_tolerance: float

    def sync(self, module: PolicyModule, version: int, spoiled: Collection[str] | None = None) -> None:
        """Give the policy's weights to the engine."""

    def collector(self, trainer: pl.Trainer, module: PolicyModule, agent: AgentConfig) -> Collector:
        """A collector that rolls tasks out."""


@dataclass
class SelfTest:
    """One self-test. All ranks run it; either all raise or none."""

    rollout: Rollouts
    engine: Engine
    trainer: pl.Trainer
    module: PolicyModule
    tasks: Sequence[Task]
    """This rank's tasks of the first iteration, of which `__post_init__` keeps those to compare."""

    def __post_init__(self) -> None:
        self.tasks = with_two_images(self.tasks[:NUM_TASKS], self.rollout.agent.max_images)

    def fill_caches(self) -> None:
        """Let the engine answer the test's images under other weights; call this before the first sync."""
        policy = self.module.policy
        assert policy is not None
        names = trained_vision(policy, self.module.adapter)
        in_place = engine_kind(self.rollout.engine_config) == "transformers"
        with other_vision_in_place(policy, names) if in_place else nullcontext():
            self.rollout.sync(self.module, version=self.module.iteration - 1, spoiled=names)
            if not names:  # embeddings of a frozen vision tower stay valid
                return
            limit = min(FILLING_TOKENS, self.rollout.agent.max_turn_tokens)
            self._roll_out(self.tasks, 1, replace(self.rollout.agent, max_turns=1, max_turn_tokens=limit))

    def run(self) -> None:
        """Compare after the first sync and, if the engine can sleep, again after sleeping and waking.

        Raises:
            ParityError: Engine and trainer disagree, or nothing could be compared.
        """
        for after in ("the first sync", "sleeping and waking"):
            report, slept = self._compare(self.tasks)
            if isinstance(report, ParityError):
                raise self._explained(report)
            if self.trainer.is_global_zero:
                message = "engine and trainer agree after %s: max |difference| of log-probabilities %.1e over %d tokens"
                logger.info(message, after, *report)
            # A sync also clears the engine's caches.
            self.rollout.sync(self.module, version=self.module.iteration)
            if not slept:
                break

    def _compare(self, tasks: Sequence[Task]) -> tuple[MismatchReport | ParityError, bool]:
        """Result of the comparison, and whether the engine sleeps now."""
        trajectories = self._roll_out(tasks, NUM_SAMPLES, self.rollout.agent)
        slept = self.engine.sleep()  # the trainer's forward pass may need the memory
        settings = self.rollout.sampling.temperature, self.rollout.parity_tolerance
        try:
            return check_mismatch(self.module, trajectories, *settings), slept
        except ParityError as error:
            return error, slept

    def _explained(self, error: ParityError) -> ParityError:
        """The error, or a more precise one if engine and trainer agree after a second sync or on other images."""
        assert self.module.policy is not None
        self.rollout.sync(self.module, version=self.module.iteration)  # it wakes the engine
        report, _ = self._compare(self.tasks)
        if not isinstance(report, ParityError):
            return ParityError(
                f"the engine has some weights only after a second sync of the same ones. Before: {error}"
            )
        if not trained_vision(self.module.policy, self.module.adapter):
            return error
        self.rollout.sync(self.module, version=self.module.iteration)
        report, _ = self._compare(unseen(self.tasks))
        if isinstance(report, ParityError):
            return error
        return ParityError(stale_images_message(engine_kind(self.rollout.engine_config), str(error)))

    def _roll_out(self, tasks: Sequence[Task], num_samples: int, agent: AgentConfig) -> list[Trajectory]:
        collector = self.rollout.collector(self.trainer, self.module, agent)
        groups = collector.roll_out(tasks, num_samples, self.rollout.sampling, self.module.iteration)
        return [trajectory for group in groups for trajectory in group.trajectories]
