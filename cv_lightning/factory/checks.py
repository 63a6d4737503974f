"""Whether a conversation shows what it claims to: every call is run again, and the images tell.

The same checks decide what a builder keeps and what `verify_file` accepts of the written file.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, cast

from PIL import Image

from cv_lightning.agent.calls import trajectory_image
from cv_lightning.agent.protocol import ParsedTurn, parse_turn
from cv_lightning.factory.plans import KINDS, Fault, Kind
from cv_lightning.images import area, intersection, is_upright
from cv_lightning.orientations import to_upright
from cv_lightning.rewards.answer import rule_score
from cv_lightning.rewards.format import check_turns
from cv_lightning.rewards.geometry import Frame, crop_credit, source_extent
from cv_lightning.rewards.process import CORRECT_ABOVE
from cv_lightning.rewards.transforms import ORIENTATION
from cv_lightning.tools import CodeRunner, CodeTool, ToolContext
from cv_lightning.tools.base import missing_image
from cv_lightning.types import Box, ToolResult, ToolStatus, TrajectoryImage

MAX_SHRUNK = 0.9
"""A crop shows at most this share of the area before it, or it is none."""
BOX_TOLERANCE_PX = 1.0
"""A crop may cut so much off a box: coordinates are rounded."""
LEAKS = re.compile(
    r"ground[ -]?truth|meta ?data|bounding box (?:was|is) given|as instructed|(?:the|your) instructions?\b"
    r"|\bhint(?:ed)?\b|the (?:plan|directive) (?:says|asks|wants)|on purpose|deliberate|attempt was refused",
    re.IGNORECASE,
)
"""What a thought must not say: it would teach the model to speak of what only the teacher was told."""


class Problem(NamedTuple):
    """Why a conversation is not kept."""

    kind: str
    """Short name, the same for every conversation with this problem."""
    detail: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What a conversation claims; written beside it, so that the file can be verified by itself."""

    id: str
    """Of the row it was made from."""
    kind: Kind
    question: str
    answer: str
    """The right one."""
    applied: tuple[str, ...] = ()
    """Transforms that were applied to the upright picture, in order."""
    box: Box | None = None
    """What the answer is read from, in pixels of the given picture."""
    needs_crop: bool = False
    fault: Fault | None = None
    """What goes wrong once, in a conversation about an error."""
    data_source: str = "unknown"
    judged: bool = False
    """The rules refused the final answer and the judge accepted it."""

    def to_json(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Any) -> Facts:
        """Of what `to_json` gave.

        Raises:
            ValueError: something is missing or of another kind.
        """
        try:
            given = dict(values)
            given["applied"] = tuple(given["applied"])
            given["box"] = cast(Box, tuple(given["box"])) if given["box"] is not None else None
            facts = cls(**given)
        except (TypeError, KeyError, ValueError) as error:
            raise ValueError(f"the facts of the conversation cannot be read ({error!r})") from error
        if facts.kind not in KINDS:
            raise ValueError(f"kind {facts.kind!r} is none of {', '.join(KINDS)}")
        return facts


# ------------------------------------------------------------------------------------------------ playing
@dataclass(frozen=True, slots=True, kw_only=True)
class Played:
    """One assistant turn, and what really came of it."""

    text: str
    parsed: ParsedTurn
    result: ToolResult | None = None
    """Of the call; None for a turn without one."""
    image_index: int | None = None
    """Of the image that the call made."""

    @property
    def ok(self) -> bool:
        """True for a call that made an image."""
        return self.image_index is not None


class Player:
    """Plays a conversation: runs its calls one after another and keeps track of where every image comes from.

    Args:
        image: the given picture.
        sandbox: runs the calls.
        owner: name of the conversation, for the sandbox's queue.
    """

    def __init__(self, image: Image.Image, sandbox: CodeRunner, owner: str) -> None:
        self.images = [TrajectoryImage(original=image, model_image=image)]
        self.turns: list[Played] = []
        self._sandbox, self._owner = sandbox, owner

    async def look(self, text: str) -> tuple[Played, TrajectoryImage | None]:
        """What a turn would give; nothing is kept."""
        parsed = parse_turn(text)
        if parsed.call is None:
            return Played(text=text, parsed=parsed), None
        context = ToolContext(images=tuple(self.images), owner=self._owner, sandbox=self._sandbox)
        arguments = parsed.call.arguments
        result = missing_image(arguments, len(self.images)) or await CodeTool().call(arguments, context)
        if not result.images:
            return Played(text=text, parsed=parsed, result=result), None
        image = trajectory_image(self.images, result.images[0], result.images[0].image)
        return Played(text=text, parsed=parsed, result=result, image_index=len(self.images)), image

    def keep(self, turn: Played, image: TrajectoryImage | None) -> None:
        """Take over what `look` gave."""
        self.turns.append(turn)
        if image is not None:
            self.images.append(image)


# ------------------------------------------------------------------------------------------------ checks
def problems_of(facts: Facts, turns: Sequence[Played], images: Sequence[TrajectoryImage]) -> list[Problem]:
    """Everything about a played conversation that is not as it claims; empty for one to keep.

    Args:
        facts: the claims.
        turns: all assistant turns, as a `Player` played them.
        images: of the conversation, the given one first.
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
    """A wrong final answer, by rule, unless the judge has accepted it."""
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
        self.on_path = [call for call in calls if call.image_index in self.path]
        self.off_path = [call for call in calls if call.image_index not in self.path]

    def path_problems(self) -> list[Problem]:
        """All calls lead to the last image, but for the one that goes wrong in a conversation about an error."""
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
        really = {
            "exception": not failed.ok,
            "wrong_turn": self.left_turned(failed),
            "missed_crop": self.misses(failed),
        }
        if not really[fault]:
            return [Problem("no real error", f"the call that was to go wrong ({fault}) did not")]
        return []

    def left_turned(self, call: Played) -> bool:
        """True if a call turned its image and left it not upright."""
        if call.image_index is None or call.result is None or call.result.effect is None:
            return False
        image = self.images[call.image_index]
        return bool(set(call.result.effect.core) & ORIENTATION) and not self.is_upright(image)

    def misses(self, call: Played) -> bool:
        """True if a call's crop leaves out half of the box or more."""
        if call.image_index is None or self.facts.box is None:
            return False
        extent = source_extent(self.images[call.image_index], self.frame)
        return extent is not None and intersection(extent, self.facts.box) < 0.5 * area(self.facts.box)

    def is_upright(self, image: TrajectoryImage) -> bool:
        """True if an image shows the picture upright, as it was before `applied`."""
        return is_upright(image.to_source, to_upright(self.facts.applied, self.images[0].original.size))

    def orientation_problems(self) -> list[Problem]:
        """The last image is upright, by no more turns than were needed."""
        if not self.is_upright(self.images[self.path[-1]]):
            return [Problem("orientation", "the image that the answer is given on is not upright")]
        turning = [call for call in self.on_path if _core(call) & ORIENTATION]
        if len(turning) != len(self.facts.applied):
            wanted = len(self.facts.applied)
            return [Problem("needless turn", f"{len(turning)} turns of a picture that needed {wanted}")]
        return []

    def crop_problems(self) -> list[Problem]:
        """Each crop holds the box and lies in the one before; the last shows little else."""
        found, last = [], self.frame.box
        cropped = {call.image_index for call in self.on_path if "crop" in _core(call)}
        for at in self.path[1:]:
            extent = source_extent(self.images[at], self.frame)
            if extent is None:
                return [Problem("unknown geometry", f"image {at} is no crop, turn or resize of the picture")]
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
        """The calls are those of the conversation's kind."""
        cores = [_core(call) for call in self.on_path]
        crops = sum("crop" in core for core in cores)
        distinct = len(set().union(*cores)) if cores else 0
        wanted = {
            "single_tool": len(cores) == 1 and distinct == 1,
            "multi_tool": len(cores) >= 2 and distinct >= 2,
            "multi_crop": crops >= 2,
            "error_recovery": len(cores) >= 1 and self.facts.fault is not None,
            "no_tool": not self.calls,
        }
        if wanted[self.facts.kind]:
            return []
        ran = ", ".join("+".join(sorted(core)) or "nothing" for core in cores) or "none"
        return [Problem("kind", f"calls that did {ran} are no {self.facts.kind}")]


def _core(call: Played) -> set[str]:
    effect = call.result.effect if call.result is not None else None
    return set(effect.core) if effect is not None else set()


def path_of(images: Sequence[TrajectoryImage]) -> list[int]:
    """Indices of the images that the last one was made of, the given one first."""
    path: list[int] = []
    at: int | None = len(images) - 1
    while at is not None:
        path.append(at)
        at = images[at].parent
    return path[::-1]


def within(inner: Box, outer: Box, tolerance: float = BOX_TOLERANCE_PX) -> bool:
    """True if a box lies in another, up to a tolerance in pixels."""
    low = inner[0] >= outer[0] - tolerance and inner[1] >= outer[1] - tolerance
    return low and inner[2] <= outer[2] + tolerance and inner[3] <= outer[3] + tolerance
