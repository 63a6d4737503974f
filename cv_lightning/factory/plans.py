"""Plans of conversations, made backwards: from the box and the tools to the image that needs them.

There are five kinds, after CodeVision (arXiv 2512.03746, section on SFT data): one tool, several tools, several crops
from coarse to fine, an error and its repair, no tool. A plan is a list of steps; each states what its call must do to
which image.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal, get_args

from PIL import Image

from cv_lightning.factory.vqa_table import VqaRow
from cv_lightning.orientations import ORIENTATIONS, QUARTER_TURNS, turn_box, turn_image
from cv_lightning.ranges import Fraction, Range, check_ranges
from cv_lightning.types import Box

Kind = Literal["single_tool", "multi_tool", "multi_crop", "error_recovery", "no_tool"]
Fault = Literal["exception", "wrong_turn", "missed_crop"]
Edges = tuple[int, int, int, int]
"""Left, top, right, bottom in whole pixels."""

KINDS: tuple[Kind, ...] = get_args(Kind)
RETURNS = {"image": "an image", "text": "an image and a printed text", "pair": "two images, the whole one last"}
"""What a call returns, as its teacher is told."""
FLIPS = ("flip_horizontal", "flip_vertical")
MIN_CROP_SIDE = 4
"""Smallest side of a crop in pixels."""
MIN_SHRINK = 1.4
"""Smallest ratio between the sides of successive crops."""


def _default_shares() -> dict[str, float]:
    return {"single_tool": 3.0, "multi_tool": 3.0, "multi_crop": 1.5, "error_recovery": 1.5, "no_tool": 1.0}


@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """Kinds of conversations, and the transforms and sizes that they are made of."""

    shares: dict[str, float] = field(default_factory=_default_shares)
    """Relative frequency of single_tool, multi_tool, multi_crop, error_recovery and no_tool. A row that does not
    fit the drawn kind (no box, nothing small) gets another one; under-represented kinds are filled first."""
    transforms: tuple[str, ...] = ORIENTATIONS
    """Transforms that may be applied to an image; empty: none."""
    small_share: Fraction = 0.02
    """A box of at most this fraction of its image's area is too small to read without a crop."""
    turned_share: Fraction = 0.5
    """Fraction of turned images among conversations with several crops, and among those about an error on a small
    box."""
    max_crops: Annotated[int, Range(at_least=2)] = 3
    """Largest number of crops of a conversation with several."""
    text_share: Fraction = 0.25
    """Fraction of the calls that also print the size of their image, where the code tool returns text."""
    pair_share: Fraction = 0.1
    """Fraction of the last crops that show a half of the crop before the whole, where the code tool returns two."""

    def __post_init__(self) -> None:
        unknown = set(self.shares) - set(KINDS)
        if unknown or min(self.shares.values(), default=0) < 0 or not 0 < sum(self.shares.values()) < math.inf:
            raise ValueError(f"--plan.shares {self.shares}: not negative, not all 0, and only of {', '.join(KINDS)}")
        check_ranges(self, "plan")
        if self.text_share + self.pair_share > 1:
            raise ValueError(
                f"--plan.text_share {self.text_share} and pair_share {self.pair_share}: at most 1 together"
            )
        check_transforms(self)


def check_transforms(plan: Any) -> None:
    """Check the `transforms` of a plan.

    Raises:
        ValueError: A transform is unknown; names the flag.
    """
    if set(plan.transforms) - set(ORIENTATIONS):
        raise ValueError(f"--plan.transforms {list(plan.transforms)}: only of {', '.join(ORIENTATIONS)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedTurn:
    """One assistant turn of a plan."""

    action: Literal["turn", "crop", "answer"]
    image_index: int = 0
    """Number of the image that its call edits; 0 is the given one."""
    undoes: str = ""
    """`turn`: the transform that is undone."""
    edges: Edges | None = None
    """`crop`: edges in pixels of the image that it edits."""
    fault: Fault | None = None
    """Deliberate error of this step."""
    repairs: Fault | None = None
    """Error of the step before, which this one corrects."""
    rank: int = 0
    """`crop`: number of crops before it."""
    returns: Literal["image", "text", "pair"] = "image"
    """What its call returns: an image, a printed text beside it, or two images."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ConversationPlan:
    """The plan of one conversation."""

    kind: Kind
    applied: tuple[str, ...]
    """Transforms that turn the upright image into the given one, in order."""
    steps: tuple[PlannedTurn, ...]
    box: Box | None
    """Evidence in pixels of the given image."""

    @property
    def needs_crop(self) -> bool:
        """True if the plan crops to the box."""
        return any(step.action == "crop" for step in self.steps)


def with_text(plan: ConversationPlan, config: PlanConfig, max_images: int, rng: random.Random) -> ConversationPlan:
    """The plan with calls that print or show two images, drawn by the shares of the config; never the wrong calls.

    Args:
        plan: The plan.
        config: The shares.
        max_images: Images that a call may show.
        rng: Draws the calls.
    """

    def drawn(step: PlannedTurn) -> PlannedTurn:
        if step.action == "answer" or step.fault is not None:
            return step
        value, is_last = rng.random(), step is plan.steps[-2]  # steps after it count on one image per call
        if step.action == "crop" and is_last and max_images > 1 and value >= 1 - config.pair_share:
            return replace(step, returns="pair")
        return replace(step, returns="text") if value < config.text_share else step

    return replace(plan, steps=tuple(map(drawn, plan.steps)))


# ------------------------------------------------------------------------------------------------ kinds
def is_small(row: VqaRow, small_share: float) -> bool:
    """True if the row's box is too small to read without a crop."""
    return row.box_fraction is not None and row.box_fraction <= small_share


def possible_kinds(row: VqaRow, config: PlanConfig) -> tuple[Kind, ...]:
    """Kinds of conversations that can be made of a row."""
    small, turns = is_small(row, config.small_share), bool(config.transforms)
    two_turns = any(name in QUARTER_TURNS for name in config.transforms) and any(n in FLIPS for n in config.transforms)
    possible = {
        "single_tool": small or turns,
        "multi_tool": (small and turns) or (not small and two_turns),
        "multi_crop": small and _max_crops(row, config) >= 2,
        "error_recovery": small or turns,
        "no_tool": not small,
    }
    return tuple(kind for kind in KINDS if possible[kind] and config.shares.get(kind, 0) > 0)


class KindAssigner:
    """Assigns a kind to each row so that the frequencies follow the configured ones as closely as the rows allow."""

    def __init__(self, config: PlanConfig) -> None:
        self.config = config
        self.assigned = dict.fromkeys(KINDS, 0)

    def assign(self, row: VqaRow) -> Kind | None:
        """The possible kind that is most under-represented so far; None if no kind is possible."""
        possible = possible_kinds(row, self.config)
        if not possible:
            return None
        kind = min(possible, key=lambda name: (self.assigned[name] + 1) / self.config.shares[name])
        self.assigned[kind] += 1
        return kind


# ------------------------------------------------------------------------------------------------ plans
def make_plan(row: VqaRow, kind: Kind, config: PlanConfig, rng: random.Random) -> ConversationPlan:
    """A plan of one kind.

    Args:
        row: The question; its box is in pixels of the upright image.
        kind: One of `possible_kinds`.
        config: Transforms and sizes.
        rng: Draws tools, transforms, margins and errors.
    """
    small = is_small(row, config.small_share)
    applied: tuple[str, ...] = ()
    crops: list[Edges] = []
    if kind == "multi_tool" and not small:
        turn = rng.choice([name for name in config.transforms if name in QUARTER_TURNS])
        applied = (turn, rng.choice([name for name in config.transforms if name in FLIPS]))
        applied = applied if rng.random() < 0.5 else applied[::-1]
    elif kind != "no_tool":
        both = kind == "multi_tool" or (kind == "multi_crop" and rng.random() < config.turned_share)
        both = both or (kind == "error_recovery" and small and rng.random() < config.turned_share)
        if config.transforms and (both or not small):
            applied = (rng.choice(config.transforms),)
        if small:
            crops = nested_windows(row, rng.randint(2, _max_crops(row, config)) if kind == "multi_crop" else 1, rng)
    steps = _good_steps(applied, crops)
    if kind == "error_recovery":
        steps = _with_fault(steps, row, rng)
    num_made = sum(step.fault != "exception" for step in steps)
    answer = PlannedTurn(action="answer", image_index=num_made)
    return ConversationPlan(kind=kind, applied=applied, steps=(*steps, answer), box=given_box(row, applied))


def given_box(row: VqaRow, applied: tuple[str, ...]) -> Box | None:
    """The row's box in pixels of the image after `applied`."""
    return None if row.box is None else turn_box(row.box, applied, row.size)


def given_image(row: VqaRow, applied: tuple[str, ...]) -> Image.Image:
    """The row's image after `applied`.

    Raises:
        RowError: It cannot be decoded.
    """
    image = row.image()
    for name in applied:
        image = turn_image(image, name)
    return image


def _good_steps(applied: tuple[str, ...], crops: list[Edges]) -> list[PlannedTurn]:
    """Turns that undo the applied ones in reverse order, then crops; each edits the result of the one before."""
    steps = [PlannedTurn(action="turn", image_index=at, undoes=name) for at, name in enumerate(reversed(applied))]
    origin = (0, 0)
    for rank, (x1, y1, x2, y2) in enumerate(crops):
        edges = (x1 - origin[0], y1 - origin[1], x2 - origin[0], y2 - origin[1])
        steps.append(PlannedTurn(action="crop", image_index=len(steps), edges=edges, rank=rank))
        origin = (x1, y1)
    return steps


def _with_fault(steps: list[PlannedTurn], row: VqaRow, rng: random.Random) -> list[PlannedTurn]:
    """The steps with an error before one of them; if the wrong call made an image, later image numbers grow by one."""
    at = rng.randrange(len(steps))
    step = steps[at]
    kinds: list[Fault] = ["exception", "wrong_turn" if step.action == "turn" else "missed_crop"]
    fault = rng.choice(kinds)
    edges, undoes = step.edges, step.undoes
    if fault == "missed_crop":
        assert step.edges is not None
        missed = _missed(step.edges, row.size, rng)
        fault, edges = ("exception", edges) if missed is None else (fault, missed)
    elif fault == "wrong_turn":
        undoes = rng.choice([name for name in ORIENTATIONS if name != step.undoes])
    failed = replace(step, edges=edges, undoes=undoes, fault=fault)
    repaired = replace(step, repairs=fault)
    later = [replace(each, image_index=each.image_index + (fault != "exception")) for each in steps[at + 1 :]]
    return [*steps[:at], failed, repaired, *later]


# ------------------------------------------------------------------------------------------------ windows
def nested_windows(row: VqaRow, count: int, rng: random.Random) -> list[Edges]:
    """Crops of the upright image, each within the one before; the last fits the box with a margin.

    Args:
        row: A question with a box.
        count: Number of crops, from 1.
        rng: Draws margin and places.
    """
    assert row.box is not None
    last = window(row.box, (0, 0, *row.size), 1 + 2 * rng.uniform(0.08, 0.3), rng)
    windows: list[Edges] = []
    outer: Edges = (0, 0, *row.size)
    for left in range(count - 1, 0, -1):
        ratio = math.sqrt(_area(outer) / _area(last)) ** (left / (left + 1))
        outer = window(last, outer, ratio, rng)
        windows.append(outer)
    return [*windows, last]


def window(inner: Box | Edges, outer: Edges, scale: float, rng: random.Random) -> Edges:
    """A window of `scale` times the sides of `inner` that contains it and lies in `outer`, placed at random."""
    edges: list[tuple[int, int]] = []
    for axis in (0, 1):
        low, high = inner[axis], inner[axis + 2]
        floor, ceiling = outer[axis], outer[axis + 2]
        side = min(float(ceiling - floor), max((high - low) * scale, MIN_CROP_SIDE))
        first = max(float(floor), high - side)
        start = rng.uniform(first, max(first, min(low, ceiling - side)))
        edges.append((max(floor, math.floor(start)), min(ceiling, math.ceil(start + side))))
    return edges[0][0], edges[1][0], edges[0][1], edges[1][1]


def _missed(edges: Edges, size: tuple[int, int], rng: random.Random) -> Edges | None:
    """A window of the same size beside the right one; None if the image has no room for one."""
    x1, y1, x2, y2 = edges
    places = []
    for dx, dy in ((1, 0), (-1, 0), (0, 1), (0, -1)):
        shift = rng.uniform(1.0, 1.6)
        left, top = x1 + round(dx * shift * (x2 - x1)), y1 + round(dy * shift * (y2 - y1))
        if left >= 0 and top >= 0 and left + x2 - x1 <= size[0] and top + y2 - y1 <= size[1]:
            places.append((left, top, left + x2 - x1, top + y2 - y1))
    return rng.choice(places) if places else None


def _max_crops(row: VqaRow, config: PlanConfig) -> int:
    """Largest number of crops, each `MIN_SHRINK` times smaller in side, from the image to the box with its margin."""
    assert row.box_fraction is not None
    whole = math.sqrt(1 / max(row.box_fraction, 1e-9)) / 1.6
    return min(config.max_crops, int(math.log(max(1.0, whole)) / math.log(MIN_SHRINK)))


def _area(edges: Edges) -> int:
    return (edges[2] - edges[0]) * (edges[3] - edges[1])
