"""The table of a real run equals a recomputation from its stored lines by independent code."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from test_loop import ScriptedEngine

from cv_lightning.agent.config import AgentConfig
from cv_lightning.agent.dialogue import DialogueEncoder
from cv_lightning.agent.driver import Rollout
from cv_lightning.agent.prompt import PromptConfig
from cv_lightning.background import Background
from cv_lightning.digits.demonstrations import answer_text, call_text, crop_code, undo_code
from cv_lightning.digits.figures import write_summary
from cv_lightning.digits.scenes import KINDS, DigitsConfig, digit_task
from cv_lightning.engines.base import SamplingConfig
from cv_lightning.rewards import RewardConfig, RewardModule
from cv_lightning.rollout.collector import Collector
from cv_lightning.sandbox import Sandbox
from cv_lightning.tools.code_image import code_call
from cv_lightning.trajectory import TrajectoryWriter
from cv_lightning.types import Task

DIGITS = DigitsConfig()
HALF_TURN_BY_FLIPS = "result = image.transpose(Image.FLIP_LEFT_RIGHT).transpose(Image.FLIP_TOP_BOTTOM)"
SLICED = "result = Image.fromarray(np.array(image)[:, ::-1])"


# ------------------------------------------------------------------------------------------------ what the policy says
def scripts(task: Task) -> dict[str, list[str]]:
    """Scripted turns by behaviour: helpful, partly helpful, useless, and invalid ones."""
    meta = task.metadata
    turn = [undo_code(meta["applied"])] if meta["applied"] else []
    crop = [crop_code(tuple(meta["cell"]), DIGITS)] if meta["cell"] else []
    box = [int(edge) for edge in task.box or ()]
    cell = meta["cell"] or [0, 0, 64, 64]
    behaviours = {
        "as needed": turn + crop,
        "at once": [],
        "turn only": turn,
        "crop only": crop,
        "box first": [f"result = image.crop(({box[0]}, {box[1]}, {box[2]}, {box[3]}))", *turn],
        "a sixth too few": [*turn, f"result = image.crop(({cell[0]}, {cell[1]}, {cell[0] + 40}, {cell[3]}))"],
        "far too much": [*turn, "result = image.crop((0, 0, image.width - 1, image.height - 1))"],
        "half turn": [HALF_TURN_BY_FLIPS],
        "half turn twice": [HALF_TURN_BY_FLIPS, HALF_TURN_BY_FLIPS],
        "mirrored by slicing": [SLICED],
        "enlarged": [*turn, *crop, "result = image.resize((image.width * 2, image.height * 2))"],
        "broken": ["result = imge.rotate(90)", *turn],
    }
    return {name: _turns(task, codes) for name, codes in behaviours.items()} | {
        "never answers": [*_turns(task, turn + crop)[:-1], "<think>read</think>"],
        "malformed": ['<tool_call>{"name": </tool_call>', answer_text(task.ground_truth)],
    }


def _turns(task: Task, codes: list[str]) -> list[str]:
    made, texts = 0, []
    for code in codes:
        texts.append(call_text(code_call(code, made), "look"))
        made += "imge" not in code
    wrong = len(codes) == 1 and task.metadata["kind"] != "upright"
    return [*texts, answer_text("00" if wrong else task.ground_truth)]


@pytest.fixture(scope="module")
def run(encoder: DialogueEncoder, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("quickstart-seed7")
    tasks = [digit_task(DIGITS, "held_out", index, kind) for kind in KINDS for index in range(14)]
    said: dict[str, list[str]] = {}
    for number, task in enumerate(tasks):
        behaviours = list(scripts(task).values())
        said[task.id] = behaviours[number % len(behaviours)]
    engine = ScriptedEngine(encoder, lambda id, turn: said[id.rsplit("/", 2)[0]][turn], max_model_len=4096)
    config = AgentConfig(max_turns=6, prompt=PromptConfig(system="none", tool_ok="<image>Look."))
    background = Background()
    with Sandbox() as sandbox, TrajectoryWriter(folder / "eval" / "sft_greedy_tool") as writer:
        rollout = Rollout(engine, sandbox, encoder, background, config, banned_ids=())  # type: ignore[arg-type]
        collector = Collector(rollout, RewardModule(RewardConfig()))
        for group in collector.roll_out(tasks, 1, SamplingConfig(), 0):
            writer.write_group(group, 0)
    background.close()
    yield folder


def stored(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for path in run.glob("eval/*/trajectories/*.jsonl") for line in path.open()]


# ------------------------------------------------------------------------------------------------ recomputed
APPLIED = {  # what a transform does to (x, y), y downwards, up to a shift
    "rotate_90": [[0, 1], [-1, 0]],
    "rotate_180": [[-1, 0], [0, -1]],
    "rotate_270": [[0, -1], [1, 0]],
    "flip_horizontal": [[-1, 0], [0, 1]],
    "flip_vertical": [[1, 0], [0, -1]],
}


def uses_the_tool_as_needed(line: dict[str, Any]) -> bool:
    """Tool-use success by the letter of its definition, in matrices."""
    (trajectory,), task = line["trajectories"], line["task"]
    if trajectory["end_state"] != "answered":
        return False
    a, b, _, d, e, _ = trajectory["images"][-1]["to_source"] or (0, 1, 0, 1, 0, 0)
    net = np.array([[a, b], [d, e]], float)
    for name in reversed(task["required_transforms"]):
        net = np.linalg.inv(APPLIED.get(name, np.eye(2))) @ net
    upright = net[0, 0] > 0 and net[1, 1] > 0 and abs(net[0, 1]) + abs(net[1, 0]) < 1e-6
    return bool(upright) and ("crop" not in task["required_transforms"] or any(_fits(line, i) for i in _seen(line)))


def _seen(line: dict[str, Any]) -> list[dict[str, Any]]:
    return [image for image in line["trajectories"][0]["images"] if image["parent"] is not None]


def _fits(line: dict[str, Any], image: dict[str, Any]) -> bool:
    if image["to_source"] is None:
        return False
    (w, h), (a, b, c, d, e, f) = image["original"]["size"], image["to_source"]
    xs, ys = ([m * x + n * y + s for x in (0, w) for y in (0, h)] for m, n, s in ((a, b, c), (d, e, f)))
    bx1, by1, bx2, by2 = line["task"]["box"]
    overlap = max(0, min(max(xs), bx2) - max(min(xs), bx1)) * max(0, min(max(ys), by2) - max(min(ys), by1))
    number = (bx2 - bx1) * (by2 - by1)
    return overlap >= 0.9 * number and (max(xs) - min(xs)) * (max(ys) - min(ys)) <= 6 * number


def orientation_ran(line: dict[str, Any]) -> bool:
    names = []
    for turn in line["trajectories"][0]["turns"]:
        if turn["result"]:
            names += [op["name"] for op in turn["result"]["operations"]]
            names += (turn["result"]["effect"] or {"core": []})["core"]
    return any(name.startswith(("rotate", "flip", "transpose")) for name in names)


def share(hits: list[bool]) -> float:
    return round(sum(hits) / len(hits), 6)


def right(line: dict[str, Any]) -> bool:
    return line["trajectories"][0]["reward"]["answer"] == line["task"]["ground_truth"]


def test_the_table_follows_from_the_stored_lines(run: Path) -> None:
    lines = stored(run)
    needing = [line for line in lines if line["task"]["required_transforms"]]
    upright = [line for line in lines if not line["task"]["required_transforms"]]
    written, _ = write_summary(run)
    figures = written["sft"]
    assert figures["accuracy"] == share([right(line) for line in needing])
    assert figures["tool_use_success"] == share([uses_the_tool_as_needed(line) for line in needing])
    assert figures["accuracy_upright"] == share([right(line) for line in upright])
    assert figures["spurious"] == share([orientation_ran(line) for line in upright])
    for kind in KINDS:
        of_kind = [line for line in lines if line["task"]["metadata"]["kind"] == kind]
        assert figures["by_kind"][kind]["n"] == len(of_kind) == 14
        assert figures["by_kind"][kind]["accuracy"] == share([right(line) for line in of_kind])
        must = None if kind == "upright" else share([uses_the_tool_as_needed(line) for line in of_kind])
        assert figures["by_kind"][kind]["tool_use_success"] == must
    assert 0.1 < figures["tool_use_success"] < 0.5
    assert 0 < figures["spurious"] < 0.5


def test_each_behaviour_gets_its_outcome(run: Path) -> None:
    found: dict[str, Counter[str]] = {}
    for number, line in enumerate(stored(run)):
        kind = line["task"]["metadata"]["kind"]
        if kind != "upright":
            name = list(scripts(digit_task(DIGITS, "held_out", number % 14, kind)))[number % 14]
            found.setdefault(name, Counter())[kind] += uses_the_tool_as_needed(line)
    everywhere = {"turned": 1, "small": 1, "turned_and_small": 1}
    for name in ("as needed", "enlarged"):
        assert found[name] == everywhere, name
    for name in ("at once", "a sixth too few", "never answers"):
        assert found[name]["small"] == found[name]["turned_and_small"] == 0, name
    assert found["box first"]["turned_and_small"] == found["box first"]["small"] == 1
    assert found["turn only"] == {"turned": 1, "small": 0, "turned_and_small": 0}
    assert found["crop only"] == {"turned": 0, "small": 1, "turned_and_small": 0}
    assert found["far too much"] == {"turned": 1, "small": 0, "turned_and_small": 0}
    assert not any(found["half turn twice"].values())


UNDO_PIXELS = {
    "rotate_90": lambda pixels: np.rot90(pixels, -1),
    "rotate_180": lambda pixels: np.rot90(pixels, 2),
    "rotate_270": lambda pixels: np.rot90(pixels, 1),
    "flip_horizontal": np.fliplr,
    "flip_vertical": np.flipud,
}


def test_boxes_in_source_pixels_match_the_images(run: Path) -> None:
    """The part of the source that a line names, put upright, is the image that the answer was given on."""
    folder = run / "eval" / "sft_greedy_tool" / "images"

    def pixels(file: str) -> np.ndarray:
        return np.asarray(Image.open(folder / file).convert("L"))

    checked = 0
    for line in stored(run):
        source, last = line["task"]["images"][0], line["trajectories"][0]["images"][-1]
        if last["source_box"] is None or not uses_the_tool_as_needed(line):
            continue
        x1, y1, x2, y2 = (round(edge) for edge in last["source_box"])
        part = pixels(source["file"])[y1:y2, x1:x2]
        for name in reversed(line["task"]["required_transforms"]):
            part = UNDO_PIXELS.get(name, lambda same: same)(part)
        shown = Image.fromarray(pixels(last["original"]["file"])).resize(part.shape[::-1], Image.Resampling.BOX)
        assert np.abs(np.asarray(shown, float) - part).mean() < 12, line["task"]["id"]
        checked += 1
    assert checked > 8


def test_a_stored_line_has_what_the_table_needs(run: Path) -> None:
    lines = stored(run)
    assert len(lines) == 14 * len(KINDS)  # one line a trajectory
    cropped = [line for line in lines if any(op["name"] == "crop" for op in _operations(line))]
    assert cropped
    for line in cropped:
        (operation,) = [op for op in _operations(line) if op["name"] == "crop"]
        assert operation["call"]
        assert operation["arguments"]
        assert {"reward", "turns", "images", "end_state"} <= line["trajectories"][0].keys()
        assert len(line["task"]["box"]) == 4
        assert len(line["task"]["ground_truth"]) == 2


def _operations(line: dict[str, Any]) -> list[dict[str, Any]]:
    turns = line["trajectories"][0]["turns"]
    return [op for turn in turns if turn["result"] for op in turn["result"]["operations"]]
