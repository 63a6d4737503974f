"""From stored records back to what a reward module scores."""

from __future__ import annotations

from functools import lru_cache

from PIL import Image

from cv_lightning.trajectory.record import GroupRecord, ImageRecord, TaskRecord, TrajectoryRecord
from cv_lightning.types import EndState, Group, Task, Trajectory, TrajectoryImage


def to_group(record: GroupRecord, *, pixels: bool = False) -> Group:
    """A group that can be scored anew; it has no rewards and no advantages.

    A trajectory that only the judge failed is as it was before the judge was asked.

    Args:
        record: read from a store.
        pixels: load the pictures; else they have their sizes and are black, which is all that the built-in components
            look at.

    Raises:
        DataError: `pixels`, and a picture is missing.
    """
    task = _task(record.task, pixels)
    trajectories = [_trajectory(task, trajectory, pixels) for trajectory in record.trajectories]
    return Group(task=task, trajectories=trajectories, iteration=record.iteration)


def _task(record: TaskRecord, pixels: bool) -> Task:
    return Task(
        id=record.id,
        question=record.question,
        images=tuple(_picture(image, image.size, pixels) for image in record.images),
        ground_truth=record.ground_truth,
        data_source=record.data_source,
        required_transforms=record.required_transforms,
        box=record.box,
        metadata=record.metadata,
    )


def _trajectory(task: Task, record: TrajectoryRecord, pixels: bool) -> Trajectory:
    judge_failed = record.end_state is EndState.ERROR_JUDGE
    return Trajectory(
        task=task,
        sample=record.sample,
        token_ids=record.token_ids or [],
        loss_mask=record.loss_mask or [],
        logprobs=record.logprobs or [],
        num_prompt_tokens=record.num_prompt_tokens,
        images=[
            TrajectoryImage(
                original=_picture(image, image.size, pixels),
                model_image=_picture(image, image.model_size, pixels),
                source=image.source,
                parent=image.parent,
                to_source=image.to_source,
            )
            for image in record.images
        ],
        turns=record.turns,
        end_state=EndState.ANSWERED if judge_failed else record.end_state,
        error="" if judge_failed else record.error,
        policy_version=record.policy_version,
        total_s=record.total_s,
    )


@lru_cache(maxsize=64)
def _black(size: tuple[int, int]) -> Image.Image:
    """One for all that ask: nobody looks at its pixels, and thousands of large ones would fill the memory."""
    return Image.new("1", size)


def _picture(image: ImageRecord, size: tuple[int, int], pixels: bool) -> Image.Image:
    if not pixels:
        return _black(size)
    picture = image.load()
    return picture if picture.size == size else picture.resize(size)
