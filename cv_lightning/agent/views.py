"""The pictures of tasks as the model sees them, made ahead, beside the engine's thread."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

from cv_lightning.agent.dialogue import DialogueEncoder
from cv_lightning.images import content_hash
from cv_lightning.types import Task, TrajectoryImage

AHEAD = 64
"""Tasks whose pictures are made before their turn."""
MAX_THREADS = 8


class Views(NamedTuple):
    """The pictures of one task; its trajectories share them."""

    images: list[TrajectoryImage]
    hashes: list[str]
    """Content hash of each as the model sees it."""


class TaskViews:
    """Pictures of tasks, in the order in which they will be asked for. Resizing and hashing let other threads run.

    Args:
        encoder: knows how the model sees images.
        tasks: one after another; the same task may come several times.
    """

    def __init__(self, encoder: DialogueEncoder, tasks: Iterable[Task]) -> None:
        self._encoder = encoder
        self._ahead = deque({id(task): task for task in tasks}.values())
        self._made: dict[int, Future[Views]] = {}
        """By identity of the task."""
        self._opened: set[int] = set()
        threads = min(MAX_THREADS, max(1, len(os.sched_getaffinity(0)) - 1))
        self._threads = ThreadPoolExecutor(threads, "views")
        self._go_on()

    def of(self, task: Task) -> Views:
        """The pictures of a task.

        Raises:
            DataError: one cannot be shown to the model.
        """
        self._opened.add(id(task))
        self._go_on()
        return self._made[id(task)].result()

    def close(self) -> None:
        """Forget what nobody will ask for."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _go_on(self) -> None:
        while self._ahead and len(self._made) < len(self._opened) + AHEAD:
            task = self._ahead.popleft()
            self._made[id(task)] = self._threads.submit(_views_of, self._encoder, task)


def _views_of(encoder: DialogueEncoder, task: Task) -> Views:
    images = [
        TrajectoryImage(original=image, model_image=encoder.model_image(image), source=index)
        for index, image in enumerate(task.images)
    ]
    return Views(images, [content_hash(image.model_image) for image in images])
