"""Checks whether a conversation shows what it claims; its calls are run again and their images compared.

The same checks decide what a builder keeps and what `verify_file` accepts of the written file.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from PIL import Image

from cv_lightning.agent.calls import failed_call, trajectory_image
from cv_lightning.agent.protocol import ParsedTurn, first_call, parse_turn
from cv_lightning.data.conversations import DemoTurn
from cv_lightning.factory.plans import Fault, Kind
from cv_lightning.factory.teacher import CropFrame
from cv_lightning.images import area, intersection, is_upright
from cv_lightning.orientations import to_upright
from cv_lightning.rewards.answer import rule_score
from cv_lightning.rewards.format import check_turns
from cv_lightning.rewards.geometry import Frame, crop_credit, source_extent
from cv_lightning.rewards.process import CORRECT_ABOVE
from cv_lightning.rewards.transforms import ORIENTATION
from cv_lightning.tools import DEFAULT_TOOLS, CodeRunner, Tool, ToolContext
from cv_lightning.tools.base import missing_image
from cv_lightning.types import Box, ToolCall, ToolResult, ToolStatus, TrajectoryImage

MAX_SHRUNK = 0.9
"""Largest area of a crop, as a fraction of the area before it."""
BOX_TOLERANCE_PX = 1.0
"""Largest part of a box, in pixels, that a crop may cut off, because coordinates are rounded."""
LEAKS = re.compile(
    r"ground[ -]?truth|meta ?data|bounding box (?:was|is) given|as instructed|(?:the|your) instructions?\b"
    r"|\bhint(?:ed)?\b|the (?:plan|directive) (?:says|asks|wants)|on purpose|deliberate|attempt was refused",
    re.IGNORECASE,
)
"""Words that a thought must not contain: they refer to what only the teacher was told."""


class Problem(NamedTuple):
    """Reason why a conversation is not kept."""

    kind: str
    """Short name, the same for every conversation with this problem."""
    detail: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """The claims of a conversation, stored with it so that the file can be verified without its source."""

    id: str
    """Id of the row it was made from."""
    kind: Kind
    question: str
    answer: str
    """Ground truth."""
    applied: tuple[str, ...] = ()
    """Transforms that were applied to the upright image, in order."""
    box: Box | None = None
    """Evidence of the answer, in pixels of the given image."""
    needs_crop: bool = False
    fault: Fault | None = None
    """The deliberate error in a conversation about an error."""
    data_source: str = "unknown"
    judged: bool = False
    """The rules refused the final answer and the judge accepted it."""


# ------------------------------------------------------------------------------------------------ playing
@dataclass(frozen=True, slots=True, kw_only=True)
class Played:
    """One assistant turn and the result of its call."""

    text: str
    parsed: ParsedTurn
    result: ToolResult | None = None
    """Result of the call; None for a turn without one."""
    images: range = range(0)
    """Numbers of the images that the call made."""

    @property
    def last_image(self) -> int | None:
        """Number of the last image that the call made; None if it made none."""
        return self.images[-1] if self.images else None

    @property
    def operations(self) -> set[str]:
        """Operations of the call that change orientation or extent."""
        effect = self.result.effect if self.result is not None else None
        return set(effect.core) if effect is not None else set()


class Player:
    """Runs the calls of a conversation one after another and records which image each result was made from.

    Args:
        images: The given images.
        sandbox: Runs the calls.
        owner: Name of the conversation in the sandbox's queue.
        tools: Tools that can be called.
        frame: Frame of the coordinates of calls.
    """

    def __init__(
        self,
        images: Sequence[Image.Image],
        sandbox: CodeRunner,
        owner: str,
        tools: Sequence[Tool] = DEFAULT_TOOLS,
        frame: CropFrame | None = None,
    ) -> None:
        self.tools, self._frame = tools, frame or CropFrame()
        self.images = [
            TrajectoryImage(original=image, model_image=self._view(image), source=number)
            for number, image in enumerate(images)
        ]
        self.turns: list[Played] = []
        self._sandbox, self._owner = sandbox, owner

    def _view(self, image: Image.Image) -> Image.Image:
        """The image at the size that calls in pixels of the model count in."""
        seen = self._frame.coordinates == "model_px"
        return image.resize(self._frame.view(image.size)) if seen else image

    async def look(self, text: str) -> tuple[Played, tuple[TrajectoryImage, ...]]:
        """A turn with its result, which is not recorded yet, and the images that it made."""
        parsed = parse_turn(text, self.tools)
        if parsed.call is None:
            return Played(text=text, parsed=parsed), ()
        result = missing_image(parsed.call.arguments, len(self.images)) or await self._run(parsed.call)
        made = tuple(trajectory_image(self.images, each, self._view(each.image)) for each in result.images)
        numbers = range(len(self.images), len(self.images) + len(made))
        return Played(text=text, parsed=parsed, result=result, images=numbers), made

    async def _run(self, call: ToolCall) -> ToolResult:
        tool = next(tool for tool in self.tools if tool.name == call.name)
        context = ToolContext(
            images=tuple(self.images),
            owner=self._owner,
            sandbox=self._sandbox,
            coordinates=self._frame.coordinates,
        )
        try:
            return await tool.call(call.arguments, context)
        except Exception as error:  # a tool that fails ends its conversation, never the build
            return failed_call(error).result

    def keep(self, turn: Played, images: Sequence[TrajectoryImage]) -> None:
        """Record a turn and its images."""
        self.turns.append(turn)
        self.images += images

    def demonstrated(self, turn: Played, learn: bool = True) -> DemoTurn:
        """A recorded turn as one to learn from, with the result that its call really gave."""
        made = [self.images[number].original for number in turn.images]
        result = turn.result or ToolResult(error=turn.parsed.error or "")
        is_said = turn.result is not None and (result.text or not (made or result.error))
        return DemoTurn(
            text=turn.text,
            call=first_call(turn.text),
            result_image=made[0] if made else None,
            more_images=tuple(made[1:]),
            said=result.text.rstrip("\n") if is_said else None,  # as the agent cuts it
            error=result.error,
            learn=learn,
        )


# ------------------------------------------------------------------------------------------------ checks
def problems_of(facts: Facts, turns: Sequence[Played], images: Sequence[TrajectoryImage]) -> list[Problem]:
    """Differences between a played conversation and its claims; empty for one to keep.

    Args:
        facts: The claims.
        turns: All assistant turns, played by a `Player`.
        images: Images of the conversation, the given one first.
    """
    if not turns or check_turns([turn.text for turn in turns]) != 1.0 or turns[-1].parsed.answer is None:
        return [Problem("format", "a turn without a thought, or without exactly one call or a final answer")]
    found = [Problem("leak", f"a thought says {hit.group()!r}") for hit in map(_leak, turns) if hit]
    calls = turns[:-1]
    for turn in calls:
        if turn.result is None:
            return [*found, Problem("no call", turn.parsed.error or "a turn makes no call")]
        if turn.result.status is ToolStatus.INFRASTRUCTURE_ERROR:
            return [*found, Problem("sandbox", turn.result.error)]
    view = Geometry(facts, calls, images)
    found += view.path_problems() + view.orientation_problems() + view.crop_problems() + view.kind_problems()
    return found + answer_problems(facts, turns[-1].parsed.answer)


def answer_problems(facts: Facts, answer: str | None) -> list[Problem]:
    """The problem of a final answer that is wrong by rule and that no judge has accepted."""
    if facts.judged or rule_score(answer, facts.answer, facts.question).value > CORRECT_ABOVE:
        return []
    return [Problem("answer", f"{answer!r} is not {facts.answer!r}")]


def _leak(turn: Played) -> re.Match[str] | None:
    return LEAKS.search(turn.text.partition("</think>")[0])


class Geometry:
    """The geometry of a played conversation."""

    def __init__(self, facts: Facts, calls: Sequence[Played], images: Sequence[TrajectoryImage]) -> None:
        self.facts, self.calls, self.images = facts, calls, images
        self.frame = Frame(*images[0].original.size)
        self.path = path_of(images)
        self.on_path = [call for call in calls if set(call.images) & set(self.path)]
        self.off_path = [call for call in calls if call not in self.on_path]

    def path_problems(self) -> list[Problem]:
        """Calls that do not contribute to the last image; a conversation about an error must have exactly one."""
        fault = self.facts.fault
        if fault is None:
            if not self.off_path:
                return []
            lost = self.off_path[0].result
            why = lost.error if lost is not None and lost.error else "its image is not used"
            return [
                Problem("call failed", f"{len(self.off_path)} calls do not lead to the last image; the first: {why}")
            ]
        if len(self.off_path) != 1:
            return [Problem("no single error", f"{len(self.off_path)} calls went wrong; exactly one should")]
        failed = self.off_path[0]
        if failed is self.calls[-1]:
            return [Problem("not recovered", "the call that went wrong is the last")]
        happened = {
            "exception": not failed.images,
            "wrong_turn": self.left_turned(failed),
            "missed_crop": self.misses(failed),
        }
        if not happened[fault]:
            return [Problem("no real error", f"the call with the deliberate error ({fault}) had none")]
        return []

    def left_turned(self, call: Played) -> bool:
        """True if a call turned its image and the result is not upright."""
        turned = call.last_image is not None and call.operations & ORIENTATION
        return bool(turned) and not self.is_upright(self.images[call.last_image or 0])

    def misses(self, call: Played) -> bool:
        """True if a call's crop excludes more than half of the box."""
        if call.last_image is None or self.facts.box is None:
            return False
        extent = source_extent(self.images[call.last_image], self.frame)
        return extent is not None and intersection(extent, self.facts.box) < 0.5 * area(self.facts.box)

    def is_upright(self, image: TrajectoryImage) -> bool:
        """True if an image has the orientation from before `applied`."""
        return is_upright(image.to_source, to_upright(self.facts.applied, self.images[0].original.size))

    def orientation_problems(self) -> list[Problem]:
        """A last image that is not upright, or more turns than needed."""
        if not self.is_upright(self.images[self.path[-1]]):
            return [Problem("orientation", "the image that the answer is given on is not upright")]
        turns = sum(bool(call.operations & ORIENTATION) for call in self.on_path)
        needed = len(self.facts.applied)
        return [] if turns == needed else [Problem("needless turn", f"{turns} turns of an image that needed {needed}")]

    def crop_problems(self) -> list[Problem]:
        """Crops that exclude part of the box or exceed the image before, and a last crop much larger than the box."""
        found, last = [], self.frame.box
        cropped = {number for call in self.on_path if "crop" in call.operations for number in call.images}
        for at in self.path[1:]:
            extent = source_extent(self.images[at], self.frame)
            if extent is None:
                return [Problem("unknown geometry", f"image {at} is not a crop, turn or resize of the given one")]
            if not within(extent, last):
                found.append(Problem("not nested", f"image {at} shows {extent}, outside the {last} before"))
            if self.facts.box is not None and not within(self.facts.box, extent):
                found.append(Problem("box outside", f"image {at} shows {extent}, without all of {self.facts.box}"))
            if at in cropped and area(extent) > MAX_SHRUNK * area(last):
                found.append(Problem("not smaller", f"the crop {at} shows {extent}, hardly less than {last} before"))
            last = extent
        box = self.facts.box if self.facts.needs_crop else None
        if box is not None and crop_credit(last, box, self.frame, "coverage") < 1:
            found.append(Problem("loose crop", f"the last image shows {last}, the box is {box}"))
        return found

    def kind_problems(self) -> list[Problem]:
        """Calls that do not belong to the conversation's kind."""
        cores = [call.operations for call in self.on_path]
        crops = sum("crop" in core for core in cores)
        distinct = len(set().union(*cores)) if cores else 0
        fits = {
            "single_tool": len(cores) == 1 and distinct == 1,
            "multi_tool": len(cores) >= 2 and distinct >= 2,
            "multi_crop": crops >= 2,
            "error_recovery": len(cores) >= 1 and self.facts.fault is not None,
            "no_tool": not self.calls,
        }
        if fits[self.facts.kind]:
            return []
        ran = ", ".join("+".join(sorted(core)) or "nothing" for core in cores) or "none"
        return [Problem("kind", f"calls that did {ran} do not make a {self.facts.kind}")]


def path_of(images: Sequence[TrajectoryImage]) -> list[int]:
    """Numbers of the images from the given one to the last, each made from the one before."""
    path: list[int] = []
    at: int | None = len(images) - 1
    while at is not None:
        path.append(at)
        at = images[at].parent
    return path[::-1]


def within(inner: Box, outer: Box) -> bool:
    """True if a box lies in another, up to `BOX_TOLERANCE_PX`."""
    starts = all(inner[axis] >= outer[axis] - BOX_TOLERANCE_PX for axis in (0, 1))
    return starts and all(inner[axis] <= outer[axis] + BOX_TOLERANCE_PX for axis in (2, 3))
