"""What a conversation is to show, planned backwards: from box and tools to the picture that needs them.

Five kinds, after CodeVision (2512.03746, section on SFT data): one tool, several tools, several crops from coarse to
fine, an error and its repair, no tool. A plan is a list of steps; each says what its call must do to which image.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

from cv_lightning.factory.table import VqaRow
from cv_lightning.orientations import ORIENTATIONS, QUARTER_TURNS, turn_box
from cv_lightning.types import Box

Kind = Literal["single_tool", "multi_tool", "multi_crop", "error_recovery", "no_tool"]
Fault = Literal["exception", "wrong_turn", "missed_crop"]
Edges = tuple[int, int, int, int]
"""Left, top, right, bottom in whole pixels."""

KINDS: tuple[Kind, ...] = get_args(Kind)
FLIPS = ("flip_horizontal", "flip_vertical")
MIN_CROP_SIDE = 4
"""Least side of a crop in pixels."""
MIN_SHRINK = 1.4
"""Each crop of several is at least so many times smaller, in side, than the one before."""


def _default_shares() -> dict[str, float]:
    return {"single_tool": 3.0, "multi_tool": 3.0, "multi_crop": 1.5, "error_recovery": 1.5, "no_tool": 1.0}


@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """Which conversations are made, and of what."""

    shares: dict[str, float] = field(default_factory=_default_shares)
    """Relative frequency of single_tool, multi_tool, multi_crop, error_recovery and no_tool. A row that cannot be a
    kind (no box, nothing small) becomes another; over all rows the shares are kept as far as the rows allow."""
    transforms: tuple[str, ...] = ORIENTATIONS
    """What pictures may be turned by; empty: they are never turned."""
    small_share: float = 0.02
    """A box of at most this share of its picture's area is too small to read without a crop."""
    turned_share: float = 0.5
    """Share of the conversations with several crops, or an error about a small box, whose picture is turned, too."""
    max_crops: int = 3
    """Most crops of a conversation with several."""

    def __post_init__(self) -> None:
        unknown = set(self.shares) - set(KINDS)
        if unknown or min(self.shares.values(), default=0) < 0 or sum(self.shares.values()) <= 0:
            raise ValueError(f"--plan.shares {self.shares}: not negative, not all 0, and only of {', '.join(KINDS)}")
        if set(self.transforms) - set(ORIENTATIONS):
            raise ValueError(f"--plan.transforms {list(self.transforms)}: only of {', '.join(ORIENTATIONS)}")
        for name in ("small_share", "turned_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"--plan.{name} {getattr(self, name)} is a share: between 0 and 1")
        if self.max_crops < 2:
            raise ValueError(f"--plan.max_crops {self.max_crops}: several crops are at least 2")


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedTurn:
    """One assistant turn of a plan."""

    action: Literal["turn", "crop", "answer"]
    image_index: int = 0
    """Which image of the conversation its call works on; 0 is the given one."""
    undoes: str = ""
    """`turn`: the transform that is undone."""
    edges: Edges | None = None
    """`crop`: in pixels of the image that it works on."""
    fault: Fault | None = None
    """How this step goes wrong, on purpose."""
    repairs: Fault | None = None
    """What went wrong in the step before."""
    rank: int = 0
    """`crop`: how many crops came before."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ConversationPlan:
    """A conversation before it is written."""

    kind: Kind
    applied: tuple[str, ...]
    """Transforms that make the given picture from the upright one, in order."""
    steps: tuple[PlannedTurn, ...]
    box: Box | None
    """In pixels of the given picture."""

    @property
    def needs_crop(self) -> bool:
        """True if the plan crops to the box."""
        return any(step.action == "crop" for step in self.steps)


# ------------------------------------------------------------------------------------------------ kinds
def is_small(row: VqaRow, config: PlanConfig) -> bool:
    """True if the row's box is too small to read without a crop."""
    return row.box_share is not None and row.box_share <= config.small_share


def possible_kinds(row: VqaRow, config: PlanConfig) -> tuple[Kind, ...]:
    """Kinds that a row can become."""
    small, turns = is_small(row, config), bool(config.transforms)
    two_turns = any(name in QUARTER_TURNS for name in config.transforms) and any(n in FLIPS for n in config.transforms)
    possible = {
        "single_tool": small or turns,
        "multi_tool": (small and turns) or (not small and two_turns),
        "multi_crop": small and _num_crops(row, config) >= 2,
        "error_recovery": small or turns,
        "no_tool": not small,
    }
    return tuple(kind for kind in KINDS if possible[kind] and config.shares.get(kind, 0) > 0)


class KindDealer:
    """Deals out kinds row by row so that their frequencies follow the shares as closely as the rows allow."""

    def __init__(self, config: PlanConfig) -> None:
        self.config = config
        self.dealt = dict.fromkeys(KINDS, 0)

    def deal(self, row: VqaRow) -> Kind | None:
        """The possible kind that is furthest behind its share; None if the row can be none."""
        possible = possible_kinds(row, self.config)
        if not possible:
            return None
        shares = self.config.shares
        kind = min(possible, key=lambda name: ((self.dealt[name] + 1) / shares[name], KINDS.index(name)))
        self.dealt[kind] += 1
        return kind


# ------------------------------------------------------------------------------------------------ plans
def make_plan(row: VqaRow, kind: Kind, config: PlanConfig, rng: random.Random) -> ConversationPlan:
    """A plan of a kind that is possible for the row.

    Args:
        row: with its box in pixels of the upright picture.
        kind: from `possible_kinds`.
        config: transforms and sizes.
        rng: draws tools, transforms, margins and faults.
    """
    small = is_small(row, config)
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
            crops = nested_windows(row, _drawn_crops(row, config, rng) if kind == "multi_crop" else 1, rng)
    steps = _good_steps(applied, crops)
    if kind == "error_recovery":
        steps = _with_fault(steps, row, rng)
    answer = PlannedTurn(action="answer", image_index=_num_images(steps) - 1)
    return ConversationPlan(kind=kind, applied=applied, steps=(*steps, answer), box=given_box(row, applied))


def given_box(row: VqaRow, applied: tuple[str, ...]) -> Box | None:
    """The row's box in pixels of the picture after `applied`."""
    return None if row.box is None else turn_box(row.box, applied, row.size)


def _good_steps(applied: tuple[str, ...], crops: list[Edges]) -> list[PlannedTurn]:
    """Turns from the last applied to the first, then crops; each works on the image that the one before made."""
    steps = [PlannedTurn(action="turn", image_index=at, undoes=name) for at, name in enumerate(reversed(applied))]
    origin = (0, 0)
    for rank, (x1, y1, x2, y2) in enumerate(crops):
        edges = (x1 - origin[0], y1 - origin[1], x2 - origin[0], y2 - origin[1])
        steps.append(PlannedTurn(action="crop", image_index=len(steps), edges=edges, rank=rank))
        origin = (x1, y1)
    return steps


def _with_fault(steps: list[PlannedTurn], row: VqaRow, rng: random.Random) -> list[PlannedTurn]:
    """The steps with one of them failing first; a failed one that made an image shifts the numbers behind it."""
    at = rng.randrange(len(steps))
    step = steps[at]
    kinds: list[Fault] = ["exception", "wrong_turn" if step.action == "turn" else "missed_crop"]
    fault = rng.choice(kinds)
    failed = replace(step, fault=fault)
    if fault == "missed_crop":
        assert step.edges is not None
        missed = _missed(step.edges, row.size, rng)
        fault = fault if missed is not None else "exception"
        failed = replace(step, edges=missed or step.edges, fault=fault)
    elif fault == "wrong_turn":
        failed = replace(step, undoes=rng.choice([name for name in ORIENTATIONS if name != step.undoes]), fault=fault)
    repaired = replace(step, repairs=fault)
    later = [replace(each, image_index=each.image_index + (fault != "exception")) for each in steps[at + 1 :]]
    return [*steps[:at], failed, repaired, *later]


def _num_images(steps: list[PlannedTurn]) -> int:
    return 1 + sum(step.fault != "exception" for step in steps)


# ------------------------------------------------------------------------------------------------ windows
def nested_windows(row: VqaRow, count: int, rng: random.Random) -> list[Edges]:
    """Crops of the upright picture, each within the one before; the last fits the box with a margin.

    Args:
        row: it has a box.
        count: number of crops, from 1.
        rng: draws margin and places.
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
    """A window of `scale` times the sides of `inner` that holds it and lies in `outer`, placed at random."""
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
    """A window of the same size that lies beside the right one, as if x or y had been misjudged."""
    x1, y1, x2, y2 = edges
    places = []
    for dx, dy in ((1, 0), (-1, 0), (0, 1), (0, -1)):
        shift = rng.uniform(1.0, 1.6)
        left, top = x1 + round(dx * shift * (x2 - x1)), y1 + round(dy * shift * (y2 - y1))
        if left >= 0 and top >= 0 and left + x2 - x1 <= size[0] and top + y2 - y1 <= size[1]:
            places.append((left, top, left + x2 - x1, top + y2 - y1))
    return rng.choice(places) if places else None


def _num_crops(row: VqaRow, config: PlanConfig) -> int:
    """Most crops that shrink by `MIN_SHRINK` a side each from the whole picture to the box with its margin."""
    assert row.box_share is not None
    whole = math.sqrt(1 / max(row.box_share, 1e-9)) / 1.6
    return min(config.max_crops, int(math.log(max(1.0, whole)) / math.log(MIN_SHRINK)))


def _drawn_crops(row: VqaRow, config: PlanConfig, rng: random.Random) -> int:
    return rng.randint(2, _num_crops(row, config))


def _area(edges: Edges) -> int:
    return (edges[2] - edges[0]) * (edges[3] - edges[1])
