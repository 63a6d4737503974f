"""Teachers, which write the assistant's turns: the protocol, and the offline teacher that writes from templates."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from PIL import Image

from cv_lightning.agent.protocol import call_markup
from cv_lightning.factory import phrases
from cv_lightning.factory.plans import ConversationPlan, Edges, PlannedTurn
from cv_lightning.factory.vqa_table import VqaRow
from cv_lightning.images import ImageLimits
from cv_lightning.ranges import PositiveInt, check_ranges
from cv_lightning.tools import CodeTool
from cv_lightning.tools.base import Coordinates

QUESTION_CHARACTERS = 160
"""Greatest length of a question inside a thought."""
DESCRIBED_FRACTION = 0.5
"""Fraction of the calls for which the offline teacher writes a description."""


@dataclass(frozen=True, kw_only=True)
class CropFrame:
    """Frame of the coordinates in a conversation."""

    coordinates: Coordinates = "original_px"
    """`original_px`, `model_px` or `relative_1000`; must be that of the agent's prompt in training."""
    factor: PositiveInt = 32
    """`model_px`: the model sees images whose sides are multiples of this, patch size times merge size."""
    min_pixels: PositiveInt = 784
    """`model_px`: pixels of the smallest image that the model sees."""
    max_pixels: PositiveInt = 262_144
    """`model_px`: pixels of the largest image that the model sees."""

    def __post_init__(self) -> None:
        check_ranges(self, "frame")
        if self.coordinates == "model_px":
            self.view((64, 64))  # raises for inconsistent limits

    def view(self, size: tuple[int, int]) -> tuple[int, int]:
        """(width, height) of the frame for an image of a size."""
        if self.coordinates == "original_px":
            return size
        if self.coordinates == "relative_1000":
            return 1000, 1000
        limits = ImageLimits(factor=self.factor, min_pixels=self.min_pixels, max_pixels=self.max_pixels)
        return limits.model_size(*size)


@dataclass(frozen=True, slots=True, kw_only=True)
class EarlierMessage:
    """An earlier message of a conversation."""

    role: str
    """assistant or tool"""
    text: str
    images: Sequence[Image.Image] = ()
    """Images of a tool's message."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnRequest:
    """Request for the next assistant turn."""

    row: VqaRow
    plan: ConversationPlan
    number: int
    """Number of the step in the plan."""
    images: Sequence[Image.Image]
    """Images of the conversation so far; the first is the given one."""
    messages: Sequence[EarlierMessage]
    """Messages after the question so far."""
    frame: CropFrame
    seed: str
    """Seed of the conversation; together with the number of the step it determines the template's choices."""
    refusal: str = ""
    """Reason why the last attempt at this turn was refused; empty at the first attempt."""

    @property
    def step(self) -> PlannedTurn:
        """The step to write."""
        return self.plan.steps[self.number]


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """A turn from a teacher, and the tokens it took."""

    text: str
    """The whole assistant turn, markup included."""
    prompt_tokens: int = 0
    completion_tokens: int = 0


class Teacher(Protocol):
    """Writes conversations turn by turn."""

    tries: int
    """Attempts at a turn before its conversation is dropped."""

    async def write(self, request: TurnRequest) -> Written:
        """The next turn.

        Raises:
            EndpointError: The endpoint gave none.
        """

    def usage(self) -> dict[str, float]:
        """Usage so far: requests, retries, failed, prompt_tokens, completion_tokens, cost."""

    async def close(self) -> None:
        """Close the connections of the running event loop; may be called twice."""


# ------------------------------------------------------------------------------------------------ text
def call_turn(thought: str, code: str, image_index: int, description: str = "") -> str:
    """Assistant turn that calls the tool, in the Hermes form."""
    arguments = {"code": code, "image_index": image_index}
    if description:
        arguments["description"] = description
    return f"<think>{thought}</think>\n{call_markup(CodeTool.name, arguments)}"


def answer_turn(thought: str, answer: str) -> str:
    """Assistant turn that answers."""
    return f"<think>{thought}</think>\n<answer>{answer}</answer>"


def crop_arguments(edges: Edges, size: tuple[int, int], frame: CropFrame) -> tuple[str, str]:
    """(lines before, tuple) of a crop's code, with numbers in the frame of the conversation.

    Args:
        edges: Edges in pixels of the image.
        size: (width, height) of the image.
        frame: Frame of the coordinates.
    """
    view = frame.view(size)
    if view == size:
        return "", f"({', '.join(map(str, edges))})"
    scaled = [round(edge * view[at % 2] / size[at % 2]) for at, edge in enumerate(edges)]
    before = f"sx, sy = image.width / {view[0]}, image.height / {view[1]}\n"
    return before, f"({', '.join(f'{edge} * {axis}' for edge, axis in zip(scaled, ('sx', 'sy') * 2, strict=True))})"


# ------------------------------------------------------------------------------------------------ offline
class OfflineTeacher:
    """Writes from templates with several phrasings each; needs no endpoint."""

    tries = 1
    """One attempt: a template gives the same text every time."""

    async def write(self, request: TurnRequest) -> Written:
        """The next turn, a function of the request alone."""
        return Written(text=self.text(request))

    def usage(self) -> dict[str, float]:
        """An empty dict: templates use no tokens."""
        return {}

    async def close(self) -> None:
        """Do nothing: there are no connections."""

    def text(self, request: TurnRequest) -> str:
        """Text of the next turn, without an event loop."""
        rng, step = random.Random(f"{request.seed}/{request.number}"), request.step
        if step.action == "answer":
            words = phrases.ANSWER_AFTER_TOOL if request.messages else phrases.ANSWER_AT_ONCE
            return answer_turn(rng.choice(words).format(question=_short(request.row.question)), request.row.answer)
        thought = self._thought(request, rng)
        size = request.images[step.image_index].size
        if step.action == "turn":
            wanted, code = phrases.UNDO[step.undoes], rng.choice(phrases.UNDO_CODE[step.undoes])
            description = f"{wanted[0].upper()}{wanted[1:]}"
        else:
            assert step.edges is not None
            before, edges = crop_arguments(step.edges, size, request.frame)
            code = rng.choice(phrases.CROP_CODE).format(before=before, edges=edges)
            description = rng.choice(phrases.CROP_DESCRIPTION)
        code += phrases.RETURNED[step.returns]
        if step.fault == "exception":
            code = phrases.broken(code, step.action, rng)
        return call_turn(thought, code, step.image_index, description if rng.random() < DESCRIBED_FRACTION else "")

    def _thought(self, request: TurnRequest, rng: random.Random) -> str:
        step = request.step
        question = _short(request.row.question)
        parts: list[str] = []
        if step.repairs is not None:
            parts.append(rng.choice(phrases.REPAIR[step.repairs]).format(error=_error_name(request.messages)))
        elif request.number == 0:
            parts.append(rng.choice(phrases.OPENING).format(question=question))
        if step.action == "turn":
            state = phrases.STATE[step.undoes]
            parts.append(rng.choice(phrases.TURN).format(state=state, undo=phrases.UNDO[step.undoes]))
        else:
            words = phrases.CROP_FINER if step.rank else phrases.CROP
            parts.append(rng.choice(words))
        return " ".join(parts)


def _short(question: str) -> str:
    """A question shortened to fit into a thought, without characters of markup."""
    text = " ".join(question.split()).replace("<", "\u2039").replace(">", "\u203a").replace("{", "(").replace("}", ")")
    return text if len(text) <= QUESTION_CHARACTERS else text[: QUESTION_CHARACTERS - 1].rstrip() + "\u2026"


def _error_name(messages: Sequence[EarlierMessage]) -> str:
    """Class name of the error that the tool reported last."""
    text = messages[-1].text if messages else ""
    found = re.search(r"\b[A-Z]\w*(?:Error|Exception)\b", text)
    return found.group() if found else "an error"
