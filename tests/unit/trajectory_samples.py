"""Trajectories of a pretended policy on real handwritten digits: real images and geometry, no model."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from cv_lightning.images import compose, dihedral_affine, map_box
from cv_lightning.types import (
    IDENTITY,
    Affine,
    Box,
    Effect,
    EndState,
    Group,
    Operation,
    RewardBreakdown,
    SandboxResult,
    Task,
    ToolCall,
    ToolStatus,
    Trajectory,
    TrajectoryImage,
    Turn,
)

DIGITS = load_digits()
TURNS = {
    "rotate_90": Image.Transpose.ROTATE_90,
    "rotate_180": Image.Transpose.ROTATE_180,
    "rotate_270": Image.Transpose.ROTATE_270,
    "flip_horizontal": Image.Transpose.FLIP_LEFT_RIGHT,
    "flip_vertical": Image.Transpose.FLIP_TOP_BOTTOM,
}
INVERSE = {"rotate_90": "rotate_270", "rotate_270": "rotate_90"}
KINDS = ("upright", "turned", "small", "turned_small")


def digit_task(index: int, kind: str, *, seed: int = 0) -> Task:
    """A number of two digits on a card with an upright cue; small kinds on a large original."""
    rng = random.Random(f"{seed}/{index}/{kind}")
    side = 384 if "small" in kind else 96
    image = Image.new("RGB", (side, side), "white")
    scale = side // 96
    image.paste("black", (6 * scale, 88 * scale, 90 * scale, 93 * scale))
    pair = [rng.randrange(len(DIGITS.target)) for _ in range(2)]
    x, y = (rng.randrange(300), rng.randrange(250)) if "small" in kind else (12, 20)
    for place, which in enumerate(pair):
        digit = Image.fromarray((255 - DIGITS.images[which] * 255 / 16).astype(np.uint8)).resize((28, 28))
        image.paste(digit.convert("RGB"), (x + 30 * place, y))
    box: Box = (float(x), float(y), float(x + 58), float(y + 28))
    required: tuple[str, ...] = ()
    if "turned" in kind:
        name = rng.choice(sorted(TURNS))
        box = _turn_box(name, box, image.size)
        image = image.transpose(TURNS[name])
        required += (name,)
    if "small" in kind:
        required += ("crop",)
    return Task(
        id=f"digits-{kind}-{index}",
        question="What number is written?",
        images=(image,),
        ground_truth="".join(str(DIGITS.target[which]) for which in pair),
        data_source="digits",
        required_transforms=required,
        box=box,
        metadata={"kind": kind},
    )


def _turn_box(name: str, box: Box, size: tuple[int, int]) -> Box:
    back = dihedral_affine(name, *size)
    corners = [(back.a, back.b, back.c), (back.d, back.e, back.f)]
    inverse = np.linalg.inv(np.array([*corners, (0, 0, 1)], float))
    return map_box(Affine(*inverse[:2].ravel()), box)


@dataclass
class Policy:
    """How often the pretended policy does each thing."""

    turn: float = 0.9
    crop: float = 0.9
    needless: float = 0.05
    error: float = 0.05
    read: float = 0.85


def rollout(task: Task, sample: int, policy: Policy, rng: random.Random) -> Trajectory:
    """One pretended rollout: undo the turn, crop around the box, answer."""
    trajectory = Trajectory(
        task=task, sample=sample, token_ids=[], loss_mask=[], logprobs=[], num_prompt_tokens=40, weight_version=3
    )
    trajectory.images.append(_image(task.images[0], None, IDENTITY))
    undo = [name for name in task.required_transforms if name in TURNS]
    if rng.random() < policy.error:
        broken = SandboxResult(
            status=ToolStatus.ERROR, error="NameError: name 'imge' is not defined", error_kind="NameError"
        )
        trajectory.turns.append(_turn("result = imge.rotate(90)", 0, broken, None, rng))
    if undo and rng.random() < policy.turn:
        _orient(trajectory, INVERSE.get(undo[0], undo[0]), rng)
    elif not undo and rng.random() < policy.needless:
        _orient(trajectory, rng.choice(sorted(TURNS)), rng)
    if "crop" in task.required_transforms and rng.random() < policy.crop:
        _crop(trajectory, rng)
    saw = all(rng.random() < policy.read for _ in range(1)) and len(trajectory.images) > len(task.required_transforms)
    answer = task.ground_truth if saw else f"{rng.randrange(100):02d}"
    trajectory.turns.append(Turn(text=f"<answer>{answer}</answer>", num_tokens=6, generate_s=0.01))
    trajectory.end_state = EndState.ANSWERED
    for turn in trajectory.turns:
        trajectory.token_ids += [7] * (turn.num_tokens + 20)
        trajectory.loss_mask += [False] * 20 + [True] * turn.num_tokens
        trajectory.logprobs += [0.0] * 20 + [-rng.random() for _ in range(turn.num_tokens)]
    correct = answer == task.ground_truth
    components = {"accuracy": float(correct), "format": 1.0, "mandatory": rng.random(), "usage": 0.0, "spurious": 0.0}
    total = components["accuracy"] + 0.1 + components["mandatory"]
    trajectory.reward = RewardBreakdown(components=components, total=total, correct=correct, answer=answer)
    trajectory.total_s = 0.1
    return trajectory


def group(task: Task, size: int = 1, policy: Policy | None = None, *, iteration: int = 0, seed: int = 0) -> Group:
    """A group with standardised advantages."""
    rng = random.Random(f"{seed}/{task.id}/{iteration}")
    found = [rollout(task, sample, policy or Policy(), rng) for sample in range(size)]
    rewards = np.array([trajectory.reward.total for trajectory in found if trajectory.reward])
    for trajectory, reward in zip(found, rewards, strict=True):
        trajectory.advantage = float((reward - rewards.mean()) / (rewards.std() + 1e-4))
    return Group(task=task, trajectories=found, iteration=iteration)


def _image(image: Image.Image, parent: int | None, to_source: Affine) -> TrajectoryImage:
    return TrajectoryImage(original=image, model_image=image.resize((96, 96)), parent=parent, to_source=to_source)


def _turn(code: str, on: int, result: SandboxResult, made: int | None, rng: random.Random) -> Turn:
    call = json.dumps({"name": "code_image_tool", "arguments": {"code": code, "image_index": on}})
    text = f"<think>Let me look.</think>\n<tool_call>\n{call}\n</tool_call>"
    return Turn(
        text=text,
        num_tokens=30,
        tool_call=ToolCall(name="code_image_tool", code=code, image_index=on),
        result=result,
        image_index=made,
        response_text="Look at the result." if made is not None else result.error,
        generate_s=0.02 + rng.random() / 100,
        tool_s=0.005,
    )


def _orient(trajectory: Trajectory, name: str, rng: random.Random) -> None:
    before = trajectory.images[-1]
    after = before.original.transpose(TURNS[name])
    back = dihedral_affine(name, *before.original.size)
    code = f"result = image.transpose(Image.{TURNS[name].name})"
    op = Operation(name=name, call="PIL.Image.transpose", input_size=before.original.size, output_size=after.size)
    _derive(trajectory, after, back, code, op, Effect(to_input=back, core=(name,)), rng)


def _crop(trajectory: Trajectory, rng: random.Random) -> None:
    before = trajectory.images[-1]
    assert trajectory.task.box is not None and before.to_source is not None
    inverse = np.linalg.inv(np.array([before.to_source[:3], before.to_source[3:], (0, 0, 1)], float))
    x1, y1, x2, y2 = map_box(Affine(*inverse[:2].ravel()), trajectory.task.box)
    margin = rng.choice([4, 10, 14])
    box = tuple(
        int(v) for v in (max(0, x1 - margin), max(0, y1 - margin), min(384, x2 + margin), min(384, y2 + margin))
    )
    back = Affine(1, 0, box[0], 0, 1, box[1])
    op = Operation(
        name="crop",
        call="PIL.Image.crop",
        arguments={"box": list(box)},
        input_size=before.original.size,
        output_size=(box[2] - box[0], box[3] - box[1]),
    )
    effect = Effect(
        to_input=back, core=("crop",), crop_box=(float(box[0]), float(box[1]), float(box[2]), float(box[3]))
    )
    _derive(trajectory, before.original.crop(box), back, f"result = image.crop({box})", op, effect, rng)


def _derive(
    trajectory: Trajectory,
    after: Image.Image,
    back: Affine,
    code: str,
    op: Operation,
    effect: Effect,
    rng: random.Random,
) -> None:
    parent = len(trajectory.images) - 1
    to_source = trajectory.images[parent].to_source
    assert to_source is not None
    result = SandboxResult(
        status=ToolStatus.OK, image=after, operations=(op,), effect=effect, tier="plan", elapsed_s=0.003
    )
    trajectory.images.append(_image(after, parent, compose(to_source, back)))
    trajectory.turns.append(_turn(code, parent, result, len(trajectory.images) - 1, rng))
