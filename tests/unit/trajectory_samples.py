"""Trajectories of a pretended policy on real handwritten digits: real images and geometry, no model."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass

import numpy as np
from PIL import Image

from cv_lightning.digits import scenes as digits
from cv_lightning.digits.scenes import DigitsConfig, Kind
from cv_lightning.images import compose, dihedral_affine, map_box
from cv_lightning.orientations import TRANSPOSES
from cv_lightning.rewards import RewardConfig, RewardModule
from cv_lightning.rl.advantages import GRPO
from cv_lightning.rl.groups import assign_advantages
from cv_lightning.tools.code_image import code_call
from cv_lightning.types import (
    IDENTITY,
    Affine,
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

KINDS = digits.KINDS
TURNS = TRANSPOSES
QUICKSTART = RewardConfig(emerge=0.0)
INVERSE = {"rotate_90": "rotate_270", "rotate_270": "rotate_90"}


def digit_task(index: int, kind: Kind, *, seed: int = 0) -> Task:
    """A held-out scene of the embedded task."""
    return digits.digit_task(DigitsConfig(seed=seed), "held_out", index, kind)


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
        task=task, sample=sample, token_ids=[], loss_mask=[], logprobs=[], num_prompt_tokens=40, policy_version=3
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
    saw = rng.random() < policy.read and len(trajectory.images) > len(task.required_transforms)
    answer = task.ground_truth if saw else f"{rng.randrange(100):02d}"
    trajectory.turns.append(Turn(text=f"<think>read</think><answer>{answer}</answer>", num_tokens=6, generate_s=0.01))
    trajectory.end_state = EndState.ANSWERED
    for turn in trajectory.turns:
        trajectory.token_ids += [7] * (turn.num_tokens + 20)
        trajectory.loss_mask += [False] * 20 + [True] * turn.num_tokens
        trajectory.logprobs += [0.0] * 20 + [-rng.random() for _ in range(turn.num_tokens)]
    trajectory.total_s = 0.1
    return trajectory


def group(
    task: Task,
    size: int = 1,
    policy: Policy | None = None,
    *,
    iteration: int = 0,
    seed: int = 0,
    reward: RewardConfig = QUICKSTART,
) -> Group:
    """A group, scored by the real reward module, with advantages."""
    rng = random.Random(f"{seed}/{task.id}/{iteration}")
    found = Group(
        task=task,
        trajectories=[rollout(task, sample, policy or Policy(), rng) for sample in range(size)],
        iteration=iteration,
    )
    RewardModule(reward).score_group(found)
    assign_advantages([found], GRPO())
    return found


def _image(image: Image.Image, parent: int | None, to_source: Affine) -> TrajectoryImage:
    return TrajectoryImage(original=image, model_image=image.resize((96, 96)), parent=parent, to_source=to_source)


def _turn(code: str, on: int, result: SandboxResult, made: int | None, rng: random.Random) -> Turn:
    call = json.dumps({"name": "code_image_tool", "arguments": {"code": code, "image_index": on}})
    text = f"<think>Let me look.</think>\n<tool_call>\n{call}\n</tool_call>"
    return Turn(
        text=text,
        num_tokens=30,
        tool_call=code_call(code, on),
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
        status=ToolStatus.OK, image=after, operations=(op,), effect=effect, executor="plan", elapsed_s=0.003
    )
    trajectory.images.append(_image(after, parent, compose(to_source, back)))
    trajectory.turns.append(_turn(code, parent, result, len(trajectory.images) - 1, rng))
