"""Task images at model size, made ahead on threads beside the engine's."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor

from cv_lightning.agent.dialogue import DialogueEncoder
from cv_lightning.agent.request import RolloutRequest
from cv_lightning.images import content_hash
from cv_lightning.types import Task, TrajectoryImage

AHEAD = 64
"""Number of tasks whose images are made before they are requested."""
MAX_THREADS = 8


class TaskViews:
    """Task images in the order of the requests. Resizing and hashing release the GIL.

    Args:
        encoder: Resizes images for the model.
        requests: Requests of the rollout; those of one task share its images.

    Raises:
        ValueError: Two tasks have the same id.
    """

    def __init__(self, encoder: DialogueEncoder, requests: Iterable[RolloutRequest]) -> None:
        self._encoder = encoder
        tasks: dict[tuple[str, int], Task] = {}
        for request in requests:
            if tasks.setdefault(_key(request), request.task) is not request.task:
                raise ValueError(
                    f"two tasks of a rollout have the id {request.task.id!r}; `requests_of` tells them apart"
                )
        self._ahead = deque(tasks.items())
        self._made: dict[tuple[str, int], Future[list[TrajectoryImage]]] = {}
        self._opened: set[tuple[str, int]] = set()
        threads = min(MAX_THREADS, max(1, len(os.sched_getaffinity(0)) - 1))
        self._threads = ThreadPoolExecutor(threads, "views")
        self._make_ahead()

    def of(self, request: RolloutRequest) -> list[TrajectoryImage]:
        """The images of a request's task; its trajectories share them.

        Raises:
            DataError: An image cannot be shown to the model.
        """
        self._opened.add(_key(request))
        self._make_ahead()
        return self._made[_key(request)].result()

    def close(self) -> None:
        """Stop making images."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _make_ahead(self) -> None:
        while self._ahead and len(self._made) < len(self._opened) + AHEAD:
            key, task = self._ahead.popleft()
            self._made[key] = self._threads.submit(_views_of, self._encoder, task)


def _key(request: RolloutRequest) -> tuple[str, int]:
    """Key of a request's task; `requests_of` counts tasks of the same id as repeats."""
    return request.task.id, request.repeat


def _views_of(encoder: DialogueEncoder, task: Task) -> list[TrajectoryImage]:
    images = [
        TrajectoryImage(original=image, model_image=encoder.model_image(image), source=index)
        for index, image in enumerate(task.images)
    ]
    for image in images:
        content_hash(image.model_image)  # computed here, known to the thread that owns the engine
    return images
