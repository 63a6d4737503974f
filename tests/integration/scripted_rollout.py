"""Fixed answers of a scripted policy through the real loop, sandbox, rewards, collector and store."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jsonargparse

sys.path.append(str(Path(__file__).parents[1] / "unit"))

from test_loop import ScriptedEngine

from cv_lightning.agent.config import AgentConfig
from cv_lightning.agent.dialogue import DialogueEncoder
from cv_lightning.agent.driver import Rollout
from cv_lightning.background import Background
from cv_lightning.digits.scenes import KINDS, DigitsConfig, digit_task
from cv_lightning.engines.base import SamplingConfig
from cv_lightning.rewards import RewardConfig, RewardModule
from cv_lightning.rl.advantages import GRPO
from cv_lightning.rl.groups import assign_advantages
from cv_lightning.rollout.collector import Collector
from cv_lightning.sandbox import Sandbox, SandboxConfig
from cv_lightning.tools import CodeTool
from cv_lightning.trajectory import StoreConfig, TrajectoryWriter
from cv_lightning.types import Task

CONFIGS = Path(__file__).parents[2] / "configs"
RECIPES = ("quickstart/reward", "quickstart/reward_accuracy", "reward/default", "reward/paper", "reward/reference")
"""Reward recipes that score the trajectories; the collector uses the first one, the others score afterwards."""
UNDO = {"rotate_90": "ROTATE_270", "rotate_270": "ROTATE_90", "rotate_180": "ROTATE_180"}
UNDO |= {"flip_horizontal": "FLIP_LEFT_RIGHT", "flip_vertical": "FLIP_TOP_BOTTOM"}
CROP = "result = image.crop(({0}, {1}, {2}, {3}))"


def call(code: str, on: int = 0, thought: str = "Let me look closer.") -> str:
    """An assistant turn that runs code on an image."""
    arguments = json.dumps({"name": "code_image_tool", "arguments": {"code": code, "image_index": on}})
    return f"<think>{thought}</think>\n<tool_call>\n{arguments}\n</tool_call>"


def answer(text: str) -> str:
    """An assistant turn that answers."""
    return f"<think>I can read it.</think>\n<answer>{text}</answer>"


def solution(task: Task) -> list[str]:
    """Calls that rotate a turned scene upright and crop a small number."""
    calls = []
    if applied := task.metadata["applied"]:
        calls.append(call(f"result = image.transpose(Image.{UNDO[applied]})"))
    if cell := task.metadata["cell"]:
        calls.append(call(CROP.format(*map(int, cell)), len(calls)))
    return calls


def scripts(task: Task) -> list[list[str]]:
    """Turns of the samples of a task; the last turn is repeated for as long as it is requested."""
    right, wrong = answer(task.ground_truth), answer("999")
    width, height = task.images[0].size
    half = CROP.format(0, 0, width // 2, height)
    numpy = "import numpy as np\nresult = Image.fromarray(np.rot90(np.asarray(image), 2).copy())"
    needless = ["result = image.transpose(Image.FLIP_LEFT_RIGHT)", "result = image.convert('L')"]
    return [
        [*solution(task), right],
        [*solution(task), wrong],
        [right],
        [call("result = image.rotate(90, expand=True)"), right],
        [call(needless[0]), call(needless[1], 1), call(half, 2), right],
        [call(half), call("print(image.size, image.getpixel((3, 4)))\nresult = image", 1), right],
        [call("result = imge.rotate(90)"), *solution(task), right],
        ['<think>a</think><tool_call>{"name": </tool_call>', *solution(task), right],
        [call("result = image", 5), right],
        [call("result = image.rotate(180)")],
        ["I see a number, and I will not say which."],
        [call(numpy), call("import cv2\nimport numpy as np\nresult = cv2.flip(np.asarray(image), 0)", 1), right],
    ]


def rolled_out(encoder: DialogueEncoder, folder: Path) -> dict[str, Any]:
    """The stored lines as JSON values (times left to the caller), and what every recipe made of them.

    Args:
        encoder: of the tiny checkpoint.
        folder: of the store.
    """
    tasks = [digit_task(DigitsConfig(), "train", 7 + at, kind) for at, kind in enumerate(KINDS)]
    said = {task.id: scripts(task) for task in tasks}
    names = {f"{task.id}/{sample}": told for task in tasks for sample, told in enumerate(said[task.id])}

    def script(request: str, turn: int) -> str:
        told = names[request.rpartition("/")[0]]
        return told[min(turn, len(told) - 1)]

    sandbox, background = Sandbox(SandboxConfig(num_zygotes=1)), Background()
    config = AgentConfig(
        max_turns=4, max_turn_tokens=400, max_parse_errors=1, deterministic=True, tools=[CodeTool(text=False)]
    )
    with sandbox:
        rollout = Rollout(ScriptedEngine(encoder, script, 8192), sandbox, encoder, background, config, banned_ids=())
        collector = Collector(rollout, RewardModule(recipe(RECIPES[0])))
        groups = collector.roll_out(tasks, len(said[tasks[0].id]), SamplingConfig(seed=3), iteration=1)
        assign_advantages(groups, GRPO())
    background.close()
    with TrajectoryWriter(folder, StoreConfig(tokens=True)) as writer:
        for group in groups:
            writer.write_group(group, group.iteration)
    (file,) = (folder / "trajectories").iterdir()
    rewards = {}
    for name in RECIPES:
        module = RewardModule(recipe(name))
        for group in groups:
            module.score_group(group)
        assign_advantages(groups, GRPO())
        scored = [(t.reward, t.advantage) for group in groups for t in group.trajectories]
        rewards[name] = [
            {"total": reward.total, "advantage": advantage, "components": dict(reward.components)}
            for reward, advantage in scored
            if reward is not None
        ]
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    recipes = {name: json.loads(json.dumps(asdict(recipe(name)))) for name in RECIPES}
    return {"lines": lines, "rewards": rewards, "recipes": recipes}


def recipe(name: str) -> RewardConfig:
    """A reward recipe of `configs`, without its judge."""
    parser = jsonargparse.ArgumentParser()
    parser.add_argument("--reward", type=RewardConfig)
    found: Callable[..., Any] = parser.instantiate
    return found(parser.parse_args([f"--reward={CONFIGS / name}.yaml", "--reward.judge=null"])).reward  # type: ignore[no-any-return]
