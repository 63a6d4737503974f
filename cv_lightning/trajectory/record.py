"""What is stored of a group: typed records, their JSON form, and the adapter from live trajectories.

A line says all that the evaluation's figures are made of: question, ground truth, what was done to the image and the
ground-truth box in pixels of the given image; of each trajectory the answer and whether it is right, every operation
that ran, and of every image the map to the source and what it shows of it (`source_box`, in source pixels).

A record holds everything but pixels and (unless asked for) tokens. Metrics, report, notebooks and tables
read records only; live groups become records by `to_record`, which copies nothing heavy.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from cv_lightning.images import decode_image, map_box
from cv_lightning.types import (
    SCHEMA_VERSION,
    Affine,
    Box,
    DataError,
    Effect,
    EndState,
    Group,
    Operation,
    RewardBreakdown,
    Task,
    ToolCall,
    ToolResult,
    ToolStatus,
    Trajectory,
    Turn,
)

OLDEST_SCHEMA = 1
"""Lines of an older one cannot be read; they are skipped and counted."""

ImageNamer = Callable[[Image.Image], str]
"""Gives the file name under which an image is stored; empty where nothing is stored."""


@dataclass(slots=True, kw_only=True)
class ImageRecord:
    """One image by reference; the pixels are read when `load` is called."""

    file: str
    """`<content hash>.png`, inside the store's `images` folder; empty for a record that was never stored."""
    size: tuple[int, int]
    """(width, height) of the original, in pixels."""
    model_size: tuple[int, int]
    """(width, height) at which the model saw it."""
    source: int = 0
    parent: int | None = None
    to_source: Affine | None = None
    """Maps pixels of the original to pixels of the source image; None: not an affine image of it."""
    folder: Path | None = field(default=None, repr=False, compare=False)
    """The store's `images` folder."""

    @property
    def source_box(self) -> Box | None:
        """What it shows of the source image: bounding box in pixels of that; None: not an affine image of it."""
        if self.to_source is None:
            return None
        return map_box(self.to_source, (0.0, 0.0, float(self.size[0]), float(self.size[1])))

    @property
    def path(self) -> Path | None:
        """Where the pixels are; None for a record that was never stored."""
        return self.folder / self.file if self.folder is not None and self.file else None

    def load(self) -> Image.Image:
        """The original image, RGB.

        Raises:
            DataError: the image was not stored, is missing or cannot be decoded.
        """
        if self.path is None:
            raise DataError("this image was never stored: read the groups from a run folder to get pixels")
        if not self.path.is_file():
            raise DataError(f"{self.path}: missing; was the `images` folder moved away from `trajectories`?")
        return decode_image(self.path)


@dataclass(slots=True, kw_only=True)
class TaskRecord:
    """One question, its images by reference."""

    id: str
    question: str
    ground_truth: str
    data_source: str
    required_transforms: tuple[str, ...]
    box: Box | None
    """Ground-truth box in pixels of the first image as given."""
    metadata: dict[str, Any]
    images: list[ImageRecord]
    digest: str = ""
    """Of all that was asked but the pixels: see `Task.digest`. Empty in stores of earlier versions."""

    @property
    def needs_tool(self) -> bool:
        """True if something was done to the image that a tool call has to undo."""
        return bool(self.required_transforms)

    @property
    def kind(self) -> str:
        """What metrics are split by: `metadata["kind"]`, else the data source."""
        return str(self.metadata.get("kind", self.data_source))


class LogprobSummary(NamedTuple):
    """Statistics of the engine's log-probabilities over the sampled tokens."""

    mean: float
    min: float
    sum: float


@dataclass(slots=True, kw_only=True)
class TrajectoryRecord:
    """One trajectory. `turns[i].result.images` is empty when read from disk: see `images[turn.image_index]`."""

    sample: int
    end_state: EndState
    error: str
    policy_version: int
    turns: list[Turn]
    images: list[ImageRecord]
    reward: RewardBreakdown | None
    advantage: float | None
    logprob: LogprobSummary | None
    """None where nothing was sampled."""
    num_prompt_tokens: int
    num_tokens: int
    """Whole sequence: prompt, images expanded, tool responses."""
    num_sampled_tokens: int
    total_s: float
    token_ids: list[int] | None = None
    """Only where the store was asked to keep tokens; so the next two."""
    loss_mask: list[bool] | None = None
    logprobs: list[float] | None = None

    @property
    def operations(self) -> list[Operation]:
        """All operations that ran, in order."""
        return [op for turn in self.turns if turn.result for op in turn.result.operations]

    @property
    def num_tool_calls(self) -> int:
        """Calls that were handed to the sandbox, failed ones too."""
        return sum(turn.result is not None for turn in self.turns)

    @property
    def answer(self) -> str | None:
        """The extracted answer; None where there is none or the trajectory is unscored."""
        return self.reward.answer if self.reward else None


@dataclass(slots=True, kw_only=True)
class GroupRecord:
    """The stored trajectories of one task."""

    iteration: int
    task: TaskRecord
    trajectories: list[TrajectoryRecord]

    @property
    def policy_version(self) -> int:
        """Version of the weights that the group's first trajectory was sampled with."""
        return self.trajectories[0].policy_version if self.trajectories else 0


# ------------------------------------------------------------------------------------------------ live -> record
def to_record(
    group: Group, iteration: int | None = None, *, name_image: ImageNamer = lambda _: "", tokens: bool = False
) -> GroupRecord:
    """Turn a live group into a record.

    Args:
        group: scored or not.
        iteration: overrides the group's own.
        name_image: gives each original its file name (the writer stores it on the way).
        tokens: keep token ids, loss mask and log-probabilities.
    """
    return GroupRecord(
        iteration=group.iteration if iteration is None else iteration,
        task=_task_record(group.task, name_image),
        trajectories=[_trajectory_record(trajectory, name_image, tokens) for trajectory in group.trajectories],
    )


def _task_record(task: Task, name_image: ImageNamer) -> TaskRecord:
    return TaskRecord(
        id=task.id,
        question=task.question,
        ground_truth=task.ground_truth,
        data_source=task.data_source,
        required_transforms=task.required_transforms,
        box=task.box,
        metadata=task.metadata,
        images=[
            ImageRecord(file=name_image(image), size=image.size, model_size=image.size, source=index)
            for index, image in enumerate(task.images)
        ],
        digest=task.digest,
    )


def _trajectory_record(trajectory: Trajectory, name_image: ImageNamer, tokens: bool) -> TrajectoryRecord:
    sampled = [value for value, kept in zip(trajectory.logprobs, trajectory.loss_mask, strict=True) if kept]
    total = math.fsum(sampled) if sampled else 0.0
    return TrajectoryRecord(
        sample=trajectory.sample,
        end_state=trajectory.end_state,
        error=trajectory.error,
        policy_version=trajectory.policy_version,
        turns=trajectory.turns,
        images=[
            ImageRecord(
                file=name_image(image.original),
                size=image.original.size,
                model_size=image.model_image.size,
                source=image.source,
                parent=image.parent,
                to_source=image.to_source,
            )
            for image in trajectory.images
        ],
        reward=trajectory.reward,
        advantage=trajectory.advantage,
        logprob=LogprobSummary(total / len(sampled), min(sampled), total) if sampled else None,
        num_prompt_tokens=trajectory.num_prompt_tokens,
        num_tokens=len(trajectory.token_ids),
        num_sampled_tokens=len(sampled) or sum(turn.num_tokens for turn in trajectory.turns),  # of a served model
        total_s=trajectory.total_s,
        token_ids=trajectory.token_ids if tokens else None,
        loss_mask=trajectory.loss_mask if tokens else None,
        logprobs=trajectory.logprobs if tokens else None,
    )


# ------------------------------------------------------------------------------------------------ record -> JSON
def group_to_json(group: GroupRecord) -> dict[str, Any]:
    """The record as JSON values, with the schema version in front."""
    task = group.task
    return {
        "schema": SCHEMA_VERSION,
        "iteration": group.iteration,
        "weight_version": group.policy_version,
        "task": {
            "id": task.id,
            "question": task.question,
            "ground_truth": task.ground_truth,
            "data_source": task.data_source,
            "required_transforms": task.required_transforms,
            "box": task.box,
            "metadata": task.metadata,
            "images": [_image_to_json(image) for image in task.images],
            "digest": task.digest,
        },
        "trajectories": [_trajectory_to_json(trajectory) for trajectory in group.trajectories],
    }


def _image_to_json(image: ImageRecord) -> dict[str, Any]:
    return {
        "file": image.file,
        "size": image.size,
        "model_size": image.model_size,
        "source": image.source,
        "parent": image.parent,
        "to_source": image.to_source,
        "source_box": image.source_box,
    }


def _trajectory_to_json(record: TrajectoryRecord) -> dict[str, Any]:
    data: dict[str, Any] = {
        "sample": record.sample,
        "end_state": record.end_state.value,
        "error": record.error,
        "weight_version": record.policy_version,
        "turns": [_turn_to_json(turn) for turn in record.turns],
        "images": [_image_to_json(image) for image in record.images],
        "reward": _reward_to_json(record.reward) if record.reward else None,
        "advantage": record.advantage,
        "logprob": record.logprob._asdict() if record.logprob else None,
        "num_prompt_tokens": record.num_prompt_tokens,
        "num_tokens": record.num_tokens,
        "num_sampled_tokens": record.num_sampled_tokens,
        "total_s": round(record.total_s, 6),
    }
    if record.token_ids is not None and record.loss_mask is not None:
        data["token_ids"] = record.token_ids
        data["loss_mask"] = [int(kept) for kept in record.loss_mask]
        data["logprobs"] = record.logprobs
    return data


def _reward_to_json(reward: RewardBreakdown) -> dict[str, Any]:
    return {
        "total": reward.total,
        "correct": reward.correct,
        "answer": reward.answer,
        "scored_by": reward.scored_by,
        "components": reward.components,
    }


def _turn_to_json(turn: Turn) -> dict[str, Any]:
    call, result = turn.tool_call, turn.result
    return {
        "text": turn.text,
        "num_tokens": turn.num_tokens,
        "tool_call": None if call is None else asdict(call),
        "parse_error": turn.parse_error,
        "result": None if result is None else _result_to_json(result),
        "image_index": turn.image_index,
        "response_text": turn.response_text,
        "generate_s": round(turn.generate_s, 6),
        "tool_s": round(turn.tool_s, 6),
    }


def _result_to_json(result: ToolResult) -> dict[str, Any]:
    effect = result.effect
    return {
        "status": result.status.value,
        "error": result.error,
        "error_kind": result.error_kind,
        "tier": result.tier,
        "elapsed_s": round(result.elapsed_s, 6),
        "operations": [
            {
                "name": op.name,
                "call": op.call,
                "arguments": op.arguments,
                "input_size": op.input_size,
                "output_size": op.output_size,
                "used": op.used,
            }
            for op in result.operations
        ],
        "effect": None if effect is None else asdict(effect),
    }


# ------------------------------------------------------------------------------------------------ JSON -> record
def group_from_json(data: dict[str, Any], folder: Path | None = None) -> GroupRecord:
    """The inverse of `group_to_json`; keys that this version does not know are ignored.

    Args:
        data: one parsed line.
        folder: the store's `images` folder, from which images are loaded when asked for.

    Raises:
        DataError: the line was written by a newer version.
        KeyError, TypeError, ValueError: the line is not a group.
    """
    schema = data["schema"]
    if schema < OLDEST_SCHEMA:
        raise ValueError(f"of schema {schema}, older than {OLDEST_SCHEMA}, the oldest that is read")
    if schema > SCHEMA_VERSION:
        raise DataError(
            f"trajectories of schema {schema}, but this cv_lightning reads up to {SCHEMA_VERSION}: update cv_lightning"
        )
    task = data["task"]
    return GroupRecord(
        iteration=data["iteration"],
        task=TaskRecord(
            id=task["id"],
            question=task["question"],
            ground_truth=task["ground_truth"],
            data_source=task["data_source"],
            required_transforms=tuple(task["required_transforms"]),
            box=_box(task["box"]),
            metadata=task["metadata"],
            images=[_image_from_json(image, folder) for image in task["images"]],
            digest=task.get("digest", ""),
        ),
        trajectories=[_trajectory_from_json(trajectory, folder) for trajectory in data["trajectories"]],
    )


def _box(values: list[float] | None) -> Box | None:
    return None if values is None else (values[0], values[1], values[2], values[3])


def _pair(values: list[int]) -> tuple[int, int]:
    return values[0], values[1]


def _affine(values: list[float] | None) -> Affine | None:
    return None if values is None else Affine(*values)


def _number(value: float | None) -> float:
    """JSON has no NaN: it is stored as null."""
    return math.nan if value is None else value


def _image_from_json(data: dict[str, Any], folder: Path | None) -> ImageRecord:
    return ImageRecord(
        file=data["file"],
        size=_pair(data["size"]),
        model_size=_pair(data["model_size"]),
        source=data["source"],
        parent=data["parent"],
        to_source=_affine(data["to_source"]),
        folder=folder,
    )


def _trajectory_from_json(data: dict[str, Any], folder: Path | None) -> TrajectoryRecord:
    reward, logprob, mask = data["reward"], data["logprob"], data.get("loss_mask")
    return TrajectoryRecord(
        sample=data["sample"],
        end_state=EndState(data["end_state"]),
        error=data["error"],
        policy_version=data["weight_version"],
        turns=[_turn_from_json(turn) for turn in data["turns"]],
        images=[_image_from_json(image, folder) for image in data["images"]],
        reward=None if reward is None else _reward_from_json(reward),
        advantage=data["advantage"],
        logprob=None if logprob is None else LogprobSummary(*(_number(logprob[key]) for key in LogprobSummary._fields)),
        num_prompt_tokens=data["num_prompt_tokens"],
        num_tokens=data["num_tokens"],
        num_sampled_tokens=data["num_sampled_tokens"],
        total_s=data["total_s"],
        token_ids=data.get("token_ids"),
        loss_mask=None if mask is None else [bool(kept) for kept in mask],
        logprobs=data.get("logprobs"),
    )


def _reward_from_json(data: dict[str, Any]) -> RewardBreakdown:
    return RewardBreakdown(
        components={name: _number(value) for name, value in data["components"].items()},
        total=_number(data["total"]),
        correct=data["correct"],
        answer=data["answer"],
        scored_by=data["scored_by"],
    )


def _turn_from_json(data: dict[str, Any]) -> Turn:
    call, result = data["tool_call"], data["result"]
    return Turn(
        text=data["text"],
        num_tokens=data["num_tokens"],
        tool_call=None if call is None else _call_from_json(call),
        parse_error=data["parse_error"],
        result=None if result is None else _result_from_json(result),
        image_index=data["image_index"],
        response_text=data["response_text"],
        generate_s=data["generate_s"],
        tool_s=data["tool_s"],
    )


def _call_from_json(data: dict[str, Any]) -> ToolCall:
    """A call; files written before tools had schemas have the code tool's arguments beside the name."""
    arguments = data["arguments"] if "arguments" in data else {key: data[key] for key in data if key != "name"}
    return ToolCall(name=data["name"], arguments=arguments)


def _result_from_json(data: dict[str, Any]) -> ToolResult:
    effect = data["effect"]
    return ToolResult(
        status=ToolStatus(data["status"]),
        error=data["error"],
        error_kind=data["error_kind"],
        tier=data["tier"],
        elapsed_s=data["elapsed_s"],
        operations=tuple(_operation_from_json(op) for op in data["operations"]),
        effect=None
        if effect is None
        else Effect(
            to_input=_affine(effect["to_input"]),
            core=tuple(effect["core"]),
            crop_box=_box(effect["crop_box"]),
            fidelity=effect.get("fidelity", 1.0),
            shown=_box(effect.get("shown")),
            turned=tuple(effect.get("turned", ())),
        ),
    )


def _operation_from_json(data: dict[str, Any]) -> Operation:
    return Operation(
        name=data["name"],
        call=data["call"],
        arguments=data["arguments"],
        input_size=None if data["input_size"] is None else _pair(data["input_size"]),
        output_size=None if data["output_size"] is None else _pair(data["output_size"]),
        used=data["used"],
    )
