"""The start-up self-test of training: do engine and trainer agree on the log-probabilities of sampled tokens?

It rolls out the first tasks of the run and compares log-probabilities (`mismatch.py`). The engine answers the same
tasks under other weights first. A weight that the next sync does not replace, or a prefix or vision embedding that
survives it, then makes engine and trainer disagree at any learning rate. Without the other weights, one step moves
weights too little to show it, and the difference grows over the run.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Protocol

import lightning.pytorch as pl
import torch
from PIL import ImageOps

from cv_lightning.agent.config import AgentConfig
from cv_lightning.engines import Engine, EngineConfig, SamplingConfig, engine_kind
from cv_lightning.models.adapters.base import ModelAdapter
from cv_lightning.modules.base import PolicyModule
from cv_lightning.rollout.collector import Collector
from cv_lightning.rollout.mismatch import MismatchReport, check_mismatch
from cv_lightning.types import MismatchError, Task, Trajectory

logger = logging.getLogger(__name__)
NUM_TASKS, NUM_SAMPLES = 4, 2
"""Compared tasks of each rank, and trajectories of each task."""
FILLING_TOKENS = 4
"""Tokens sampled under the other weights, where only the prompts matter."""
ADVICE = {
    "sglang": "SGLang keeps its vision embeddings over weight updates and cache flushes: start the server with "
    "SGLANG_VLM_CACHE_SIZE_MB=0 in its environment",
}
"""Advice of the error message, by the kind of the engine."""
NUM_PAIRS = 2
"""Prompts with two images that a rank makes if its tasks have one image each."""


class Rollouts(Protocol):
    """The part of `RolloutCallback` that the self-test uses."""

    agent: AgentConfig
    engine_config: EngineConfig
    sampling: SamplingConfig
    mismatch_tolerance: float

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
            MismatchError: Engine and trainer disagree, or nothing could be compared.
        """
        for after in ("the first sync", "sleeping and waking"):
            report, slept = self._compare(self.tasks)
            if isinstance(report, MismatchError):
                raise self._explained(report)
            if self.trainer.is_global_zero:
                message = "engine and trainer agree after %s: max |difference| of log-probabilities %.1e over %d tokens"
                logger.info(message, after, *report)
            # A sync also clears the engine's caches.
            self.rollout.sync(self.module, version=self.module.iteration)
            if not slept:
                break

    def _compare(self, tasks: Sequence[Task]) -> tuple[MismatchReport | MismatchError, bool]:
        """Result of the comparison, and whether the engine sleeps now."""
        trajectories = self._roll_out(tasks, NUM_SAMPLES, self.rollout.agent)
        slept = self.engine.sleep()  # the trainer's forward pass may need the memory
        settings = self.rollout.sampling.temperature, self.rollout.mismatch_tolerance
        try:
            return check_mismatch(self.module, trajectories, *settings), slept
        except MismatchError as error:
            return error, slept

    def _explained(self, error: MismatchError) -> MismatchError:
        """The error, or a more precise one if a second sync or other images make engine and trainer agree."""
        assert self.module.policy is not None
        self.rollout.sync(self.module, version=self.module.iteration)  # it wakes the engine
        report, _ = self._compare(self.tasks)
        if not isinstance(report, MismatchError):
            return MismatchError(
                f"the engine has some weights only after a second sync of the same ones. Before: {error}"
            )
        if not trained_vision(self.module.policy, self.module.adapter):
            return error
        self.rollout.sync(self.module, version=self.module.iteration)
        report, _ = self._compare(unseen(self.tasks))
        if isinstance(report, MismatchError):
            return error
        return MismatchError(stale_images_message(engine_kind(self.rollout.engine_config), str(error)))

    def _roll_out(self, tasks: Sequence[Task], num_samples: int, agent: AgentConfig) -> list[Trajectory]:
        collector = self.rollout.collector(self.trainer, self.module, agent)
        groups = collector.roll_out(tasks, num_samples, self.rollout.sampling, self.module.iteration)
        return [trajectory for group in groups for trajectory in group.trajectories]


# ------------------------------------------------------------------------------------------------ other weights
def stale_images_message(kind: str, seen: str) -> str:
    """Message about an engine that agrees with the trainer on new images only; `seen` is the error on others."""
    advice = ADVICE.get(kind, "the engine has to drop every cache of images in update_weights")
    return (
        "the engine answers images that it has seen before a weight update from a cache of the old weights; on images "
        f"that it has not seen, engine and trainer agree. {advice}, or freeze vision tower and projector "
        f"(policy.freeze_vision and policy.freeze_projector). On repeated images: {seen}"
    )


def trained_vision(policy: torch.nn.Module, adapter: ModelAdapter) -> frozenset[str]:
    """Names of the vision parameters that training changes; empty if vision tower and projector are frozen."""
    return frozenset(
        name for name, parameter in policy.named_parameters() if parameter.requires_grad and _is_vision(name, adapter)
    )


def _is_vision(name: str, adapter: ModelAdapter) -> bool:
    return adapter.part_of(name) in ("vision", "projector")


def with_other_weights(
    tensors: Iterable[tuple[str, torch.Tensor]], trained: Collection[str], adapter: ModelAdapter
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield tensors rolled by one output, which gives other features of the same size without overflow.

    Args:
        tensors: Unsharded tensors by name.
        trained: `trained_vision`. Other vision tensors are unchanged, because an engine may cache their embeddings.
        adapter: The policy's adapter.
    """
    for name, tensor in tensors:
        yield name, tensor.roll(1, 0) if name in trained or not _is_vision(name, adapter) else tensor


@contextmanager
def other_vision_in_place(policy: torch.nn.Module, names: Collection[str]) -> Iterator[None]:
    """Context manager that rolls the policy's own parameters, for an engine that generates with the policy."""
    parameters = [parameter for name, parameter in policy.named_parameters() if name in names]
    _roll(parameters, 1)
    try:
        yield
    finally:
        _roll(parameters, -1)


def with_two_images(tasks: Sequence[Task], max_images: int) -> list[Task]:
    """Add tasks with two images if no task has several, because only those show images in a wrong order.

    The second image is the first one inverted, rotated and darkened, so that mid-grey parts differ, too. Both have half
    the original width and height, so that their prompt is not longer than the task's own.

    Args:
        tasks: Tasks of one rank.
        max_images: Largest number of images of a trajectory.
    """
    if max_images < 2 or any(len(task.images) > 1 for task in tasks):
        return list(tasks)
    pairs = []
    for task in [task for task in tasks if task.images][:NUM_PAIRS]:
        width, height = task.images[0].size
        half = task.images[0].resize((max(1, width // 2), max(1, height // 2)))
        images = half, ImageOps.invert(half).rotate(180).point(lambda value: value // 4)
        pairs.append(replace(task, id=f"{task.id}-pair", images=images, messages=(), box=None, required_transforms=()))
    return [*tasks, *pairs]


def unseen(tasks: Sequence[Task]) -> list[Task]:
    """The tasks with inverted images, which give prompts of the same length that no cache contains."""
    return [replace(task, images=tuple(ImageOps.invert(image) for image in task.images)) for task in tasks]


@torch.no_grad()
def _roll(parameters: Iterable[torch.nn.Parameter], by: int) -> None:
    for parameter in parameters:
        parameter.copy_(parameter.roll(by, 0))
