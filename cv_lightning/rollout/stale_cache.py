"""Check for stale engine state: does a weight sync replace every weight and every cached image embedding?

The start-up self-test first lets the engine answer its prompts under other weights. A weight that the next sync does
not replace, or a prefix or vision embedding that survives it, then makes engine and trainer disagree at any learning
rate. Without the other weights, one step moves weights too little to show it, and the difference grows over the run.
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
"""Advice of the error message, by the kind of the engine."""
NUM_PAIRS = 2
"""Prompts with two images that a rank makes if its tasks have one image each."""


def stale_images_message(kind: str, seen: str) -> str:
    """Message about an engine that agrees with the trainer on new images only; `seen` is the error on repeated ones."""
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
    """Context manager that rolls parameters of the policy itself, which an engine generates with; not under ZeRO-3."""
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
