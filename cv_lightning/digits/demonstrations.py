"""Conversations for SFT, which show the tool on some of the digits tasks that need it.

Only a fraction of those tasks demonstrates the tool; the others are answered at once, as by a reader who never rotates
or crops, so that reinforcement learning can still improve the policy. Tool results come from the sandbox.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal, Protocol

from PIL import Image

from cv_lightning.agent.prompt import PromptConfig, size_statement
from cv_lightning.agent.protocol import call_markup
from cv_lightning.data.conversations import Conversation, DemoTurn
from cv_lightning.digits.measure import MEASURES, SHOW_CODE
from cv_lightning.digits.scenes import (
    KINDS,
    MEASURE_KINDS,
    DigitsConfig,
    check_kind_shares,
    digit_task,
    is_small,
    is_turned,
)
from cv_lightning.orientations import ORIENTATIONS
from cv_lightning.ranges import Fraction, check_ranges
from cv_lightning.tools.code_image import code_call
from cv_lightning.types import SandboxError, SandboxResult, Task, ToolCall, ToolStatus


class Execute(Protocol):
    """Runs a snippet on an image; `Sandbox.run_sync` is one."""

    def __call__(self, image: Image.Image, code: str, *, max_shown: int = 0) -> SandboxResult:
        """Run it; with `max_shown` above 0 what it prints is returned, too."""
        ...


NUM_OTHERS = 1_000_000
"""Number of scenes of a kind from which an answer without a call is drawn."""
UNDO = {
    "rotate_90": "rotate(270, expand=True)",
    "rotate_180": "rotate(180, expand=True)",
    "rotate_270": "rotate(90, expand=True)",
    "flip_horizontal": "transpose(Image.FLIP_LEFT_RIGHT)",
    "flip_vertical": "transpose(Image.FLIP_TOP_BOTTOM)",
}
"""Image method that undoes each orientation change."""
THOUGHT_TURN, THOUGHT_CROP, THOUGHT_MEASURE, THOUGHT_READ = "turned", "small", "measure", "read"
"""Thoughts before rotating, cropping, measuring and answering; the tokenizer merges each into one token."""


@dataclass(frozen=True, kw_only=True)
class DemonstrationConfig:
    """Fraction of tasks that show the tool, and the answers of the others."""

    tool_share: Fraction = 0.4
    """Fraction of the tasks that need the tool in which it is used; the others are answered at once."""
    direct_turned: Literal["right", "random"] = "right"
    """Answer to a rotated number without rotating it: the correct number, or a random one."""
    direct_small: Literal["right", "random"] = "random"
    """Answer to a small number without a crop (rotated ones too)."""
    measure_with: Literal["text", "image"] = "text"
    """What a call of the kinds that have to be measured returns: the printed number, or the cards from near, for a tool
    that returns images only. Without a call the answer is that of another scene of the kind."""
    needless_share: Fraction = 0.0
    """Fraction of the upright tasks in which the image is rotated first without need."""
    warm_up_shares: dict[str, float] = field(default_factory=lambda: {"upright": 3.0, "turned": 1.0, "small": 2.0})
    """Relative frequency of the kinds in the warm-up of single turns: upright tasks are answered, of the others only
    the first call is shown."""

    def __post_init__(self) -> None:
        check_ranges(self, "data.init_args.demonstrations")
        check_kind_shares("warm_up_shares", self.warm_up_shares)


# ------------------------------------------------------------------------------------------------ text
def answer_text(answer: str) -> str:
    """Assistant turn that answers."""
    return f"<think>{THOUGHT_READ}</think><answer>{answer}</answer>"


def call_text(call: ToolCall, thought: str) -> str:
    """Assistant turn that calls the tool, in the Hermes form of Qwen's chat template."""
    arguments = {"code": call.code, "image_index": call.image_index}
    return f"<think>{thought}</think>{call_markup(call.name, arguments)}"


def undo_code(transform: str) -> str:
    """Snippet that restores an image to which `transform` was applied."""
    return f"result = image.{UNDO[transform]}"


def crop_code(cell: tuple[int, int, int, int], config: DigitsConfig) -> str:
    """Snippet that crops a cell, with its numbers in the frame of coordinates of the config.

    Args:
        cell: Left, top, right, bottom in pixels of the upright original.
        config: Frame, and sides of the original and of the model's view.
    """
    if config.coordinates == "original_px":
        return f"result = image.crop(({', '.join(str(edge) for edge in cell)}))"
    side = config.model_side if config.coordinates == "model_px" else 1000
    edges = [round(edge * side / config.original_side) for edge in cell]
    scaled = ", ".join(f"{edge} * s" for edge in edges)
    return f"s = image.width / {side}\nresult = image.crop(({scaled}))"


# ------------------------------------------------------------------------------------------------ conversations
def demonstrate(
    task: Task,
    config: DemonstrationConfig,
    digits: DigitsConfig,
    rng: random.Random,
    execute: Execute,
    *,
    warm_up: bool = False,
) -> Conversation:
    """A conversation about a digits task.

    Args:
        task: Made by `digit_task`; its metadata name the necessary operations.
        config: How often the tool is used.
        digits: Frame of coordinates.
        rng: Draws whether the tool is used, and the answer without it.
        execute: Runs the snippets.
        warm_up: One turn only: the answer if no tool is needed, else the first call without its result.

    Raises:
        SandboxError: A snippet failed; its error is in the message.
    """
    kind = task.metadata["kind"]
    steps = _tool_steps(task, config, digits)
    if warm_up and steps:
        thought, code = steps[0]
        call = code_call(code)
        return Conversation(task=task, turns=(DemoTurn(text=call_text(call, thought), call=call),))
    if kind == "upright":
        if not warm_up and rng.random() < config.needless_share:
            steps = [(THOUGHT_TURN, undo_code(rng.choice(ORIENTATIONS)))]
    elif rng.random() >= config.tool_share:
        return Conversation(task=task, turns=(DemoTurn(text=answer_text(_direct_answer(task, config, digits, rng))),))
    turns = _run_steps(task, steps, execute)
    return Conversation(task=task, turns=(*turns, DemoTurn(text=answer_text(task.ground_truth))))


def _direct_answer(task: Task, config: DemonstrationConfig, digits: DigitsConfig, rng: random.Random) -> str:
    """The answer without a call to a task that needs one."""
    kind = task.metadata["kind"]
    if kind in MEASURES:
        return digit_task(digits, "train", rng.randrange(NUM_OTHERS), kind).ground_truth
    policy = config.direct_small if is_small(kind) else config.direct_turned
    return task.ground_truth if policy == "right" else f"{rng.randrange(10)}{rng.randrange(10)}"


def _tool_steps(task: Task, config: DemonstrationConfig, digits: DigitsConfig) -> list[tuple[str, str]]:
    """(thought, code) of each call that the task needs, in order."""
    kind = task.metadata["kind"]
    if kind in MEASURES:
        return [(THOUGHT_MEASURE, MEASURES[kind].code if config.measure_with == "text" else SHOW_CODE)]
    steps = []
    if is_turned(kind):
        steps.append((THOUGHT_TURN, undo_code(task.metadata["applied"])))
    if is_small(kind):
        steps.append((THOUGHT_CROP, crop_code(tuple(task.metadata["cell"]), digits)))
    return steps


def _run_steps(task: Task, steps: list[tuple[str, str]], execute: Execute) -> list[DemoTurn]:
    """Turns that make the calls one after another, each on the result of the previous one; text where code prints."""
    turns = []
    image = task.images[0]
    for index, (thought, code) in enumerate(steps):
        call, prints = code_call(code, index), "print(" in code
        result = execute(image, code, max_shown=1) if prints else execute(image, code)
        if result.status is not ToolStatus.OK or not (result.text if prints else result.image):
            raise SandboxError(f"demonstration of {task.id}: `{code}` gave {result.status}: {result.error}")
        said = result.text if prints else None
        image = result.image or image
        turns.append(DemoTurn(text=call_text(call, thought), call=call, result_image=result.image, said=said))
    return turns


# ------------------------------------------------------------------------------------------------ corpus
def tokenizer_corpus(digits: DigitsConfig, prompt: PromptConfig) -> list[str]:
    """Texts from which a tokenizer learns to write and read the conversations in few tokens.

    Args:
        digits: Question, frame of coordinates and grid.
        prompt: The agent's texts around question and tool results.
    """
    measured = [MEASURES[kind] for kind in MEASURE_KINDS if digits.kind_shares.get(kind, 0) > 0]
    calls = [(THOUGHT_MEASURE, code) for code in ([m.code for m in measured] + [SHOW_CODE]) * 20] if measured else []
    if any(digits.kind_shares.get(kind, 0) > 0 for kind in KINDS):
        turns = [undo_code(transform) for transform in ORIENTATIONS]
        crops = [crop_code(cell, digits) for cell in _cells(digits)]
        calls += [(THOUGHT_TURN, code) for code in turns * 20] + [(THOUGHT_CROP, code) for code in crops]
    corpus = [call_text(code_call(code, index), thought) for thought, code in calls for index in (0, 1)]
    views = {digits.model_side, digits.original_side, digits.crop_side}
    seen = (digits.model_side, digits.model_side)
    sizes = [size_statement(i, (side, side), seen, digits.coordinates) for side in sorted(views) for i in range(3)]
    asked = [measure.question for measure in measured]
    given = [*asked, *(f"user\n{question}" for question in asked)]
    given += [f"user\n{digits.question}", digits.question, "user\n", "assistant\n", "\n", "Error: ", answer_text("")]
    if prompt.state_size:
        given += [f"{digits.question}\n{size}" for size in sizes] + [f"\n{size}\n" for size in sizes]
    given += [prompt.tool_ok.replace("<image>", "").format(size=""), prompt.parse_error.format(error="")]
    return corpus + [text for text in given for _ in range(50)]


def _cells(digits: DigitsConfig) -> Iterator[tuple[int, int, int, int]]:
    """The crop of every cell of a large original, those on the bar too."""
    columns = digits.original_side // digits.cell
    return (digits.crop_box(column, row) for column in range(columns) for row in range(columns))
