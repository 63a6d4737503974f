"""Trajectories built by really applying operations to real images, as agent and sandbox would record them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from cv_lightning.images import compose, dihedral_affine
from cv_lightning.rewards.transforms import ORIENTATION, orientation_label
from cv_lightning.tools.code_image import code_call
from cv_lightning.types import (
    IDENTITY,
    Affine,
    Box,
    Effect,
    EndState,
    Group,
    Operation,
    SandboxResult,
    Task,
    ToolStatus,
    Trajectory,
    TrajectoryImage,
    Turn,
)

WIDTH, HEIGHT = 400, 300
BOX: Box = (40.0, 30.0, 200.0, 150.0)


def task(*required: str, box: Box | None = BOX, truth: str = "42", question: str = "What number is written?") -> Task:
    """A task on a random image of 400 x 300 pixels."""
    pixels = np.random.default_rng(0).integers(0, 255, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    return Task(
        id="t",
        question=question,
        images=(Image.fromarray(pixels),),
        ground_truth=truth,
        data_source="digits",
        required_transforms=required,
        box=box,
    )


@dataclass
class Recorder:
    """Makes a trajectory call by call."""

    task: Task
    images: list[TrajectoryImage] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.images = [TrajectoryImage(original=i, model_image=i, source=n) for n, i in enumerate(self.task.images)]

    def call(
        self, *steps: str | Box, on: int = -1, unused: Sequence[str] = (), code: str = "result = image"
    ) -> Recorder:
        """One successful call: each step is an orientation, another label (changes no geometry), or a crop box."""
        index = on % len(self.images)
        image, to_input, operations = self.images[index].original, IDENTITY, []
        for step in steps:
            name = step if isinstance(step, str) else "crop"
            moved = image
            if not isinstance(step, str):
                x1, y1, x2, y2 = (round(edge) for edge in step)
                moved = image.crop((x1, y1, x2, y2))
                to_input = compose(to_input, Affine(1, 0, x1, 0, 1, y1))
            elif step in ORIENTATION:
                to_input = compose(to_input, dihedral_affine(step, *image.size))
                turned = step in ("rotate_90", "rotate_270")
                moved = image.resize(image.size[::-1] if turned else image.size)
            operations.append(Operation(name=name, call=name, input_size=image.size, output_size=moved.size))
            image = moved
        operations += [Operation(name=name, call=name, used=False) for name in unused]
        result = SandboxResult(
            status=ToolStatus.OK,
            image=image,
            operations=tuple(operations),
            effect=_effect(to_input, image.size, self.images[index].original.size),
        )
        parent = self.images[index]
        assert parent.to_source is not None
        self._turn(code, result, index, len(self.images))
        self.images.append(
            TrajectoryImage(
                original=image,
                model_image=image,
                source=parent.source,
                parent=index,
                to_source=compose(parent.to_source, to_input),
            )
        )
        return self

    def fail(self, *ran: str, status: ToolStatus = ToolStatus.ERROR) -> Recorder:
        """One call that ran some operations and failed."""
        operations = tuple(Operation(name=name, call=name) for name in ran)
        self._turn("boom", SandboxResult(status=status, error="boom", operations=operations), 0, None)
        return self

    def _turn(self, code: str, result: SandboxResult, index: int, made: int | None) -> None:
        call = code_call(code, index)
        text = "<think>t</think><tool_call>{}</tool_call>"
        self.turns.append(Turn(text=text, num_tokens=5, tool_call=call, result=result, image_index=made))

    def answer(
        self, text: str | None = "42", *, end: EndState = EndState.ANSWERED, raw: str | None = None
    ) -> Trajectory:
        """The finished trajectory; `raw` is the whole last turn."""
        last = raw if raw is not None else f"<think>t</think><answer>{text}</answer>"
        return Trajectory(
            task=self.task,
            sample=0,
            token_ids=[],
            loss_mask=[],
            logprobs=[],
            num_prompt_tokens=0,
            images=self.images,
            turns=[*self.turns, Turn(text=last, num_tokens=5)],
            end_state=end,
        )


def _effect(to_input: Affine, size: tuple[int, int], before: tuple[int, int]) -> Effect:
    from cv_lightning.images import area, map_box

    shown = map_box(to_input, (0.0, 0.0, float(size[0]), float(size[1])))
    cropped = area(shown) < before[0] * before[1]
    label = orientation_label(to_input)
    core = ({label} if label in ORIENTATION else set()) | ({"crop"} if cropped else set())
    return Effect(to_input=to_input, core=tuple(sorted(core)), crop_box=shown if cropped else None)


def group(*trajectories: Trajectory) -> Group:
    """A group of trajectories of one task."""
    return Group(task=trajectories[0].task, trajectories=list(trajectories))
