"""Does an engine take every weight of a sync, and forget with its old weights what it has computed from images?

The start-up self-test lets the engine answer its prompts under other weights first. A weight that the sync which
follows does not replace, or a prefix or vision embedding that survives it, then makes engine and trainer disagree,
whatever the learning rate. Without that, weights move too little in one step to tell, and the difference grows over
the run.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from PIL import ImageOps

from cv_lightning.models.adapters.base import ModelAdapter
from cv_lightning.types import Task

ADVICE = {
    "sglang": "SGLang keeps its vision embeddings over weight updates and cache flushes: start the server with "
    "SGLANG_VLM_CACHE_SIZE_MB=0 in its environment",
}
"""What to change, by the kind of the engine."""
NUM_PAIRS = 2
"""Prompts of two images that a rank makes of its tasks if they have one each."""


def stale_images_message(kind: str, seen: str) -> str:
    """The error for an engine that agrees with the trainer on new images only.

    Args:
        kind: `engine_kind`.
        seen: What the comparison on repeated images found.
    """
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
    """Yield tensors rolled by one output: other features of the same size, without overflow.

    Args:
        tensors: Whole tensors by name.
        trained: `trained_vision`. Other vision tensors stay, because an engine may keep what it has computed from them.
        adapter: Of the policy.
    """
    for name, tensor in tensors:
        yield name, tensor.roll(1, 0) if name in trained or not _is_vision(name, adapter) else tensor


@contextmanager
def other_vision_in_place(policy: torch.nn.Module, names: Collection[str]) -> Iterator[None]:
    """Roll the policy's own parameters, and roll them back bit for bit: for an engine that generates with the policy.

    Args:
        policy: It holds whole tensors.
        names: `trained_vision` of it.
    """
    parameters = [parameter for name, parameter in policy.named_parameters() if name in names]
    _roll(parameters, 1)
    try:
        yield
    finally:
        _roll(parameters, -1)


def with_two_images(tasks: Sequence[Task], max_images: int) -> list[Task]:
    """The tasks, and more of two images each if none of them has several: only those show images in the wrong order.

    The second image is the first one inverted, turned and darkened, which differs from it also where it is mid-grey.
    Both have half its width and height, so that a prompt of both is no longer than the task's own.

    Args:
        tasks: Of one rank.
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
    """The tasks with inverted images: prompts of the same length that no cache can hold."""
    return [replace(task, images=tuple(ImageOps.invert(image) for image in task.images)) for task in tasks]


@torch.no_grad()
def _roll(parameters: Iterable[torch.nn.Parameter], by: int) -> None:
    for parameter in parameters:
        parameter.copy_(parameter.roll(by, 0))
