"""Which image operations a task wants, and which a trajectory used according to the sandbox's trace.

The labels rotate_90/180/270 (counter-clockwise), flip_horizontal, flip_vertical and crop are *core*; anything else that
changes an image (contrast_up, grayscale, resize, ...) is optional. Pure functions.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from cv_lightning.images import dihedral_affine, is_upright
from cv_lightning.orientations import ORIENTATIONS, to_upright
from cv_lightning.rewards.geometry import Frame, density, source_extent
from cv_lightning.types import (
    ERASED,
    Affine,
    Box,
    EndState,
    Operation,
    Task,
    ToolResult,
    ToolStatus,
    Trajectory,
    TrajectoryImage,
    Turn,
)

ORIENTATION = frozenset(ORIENTATIONS)
TURNED = "turned"
"""Net orientation without a label of its own: a transposition, a free angle."""
CORE = ORIENTATION | {"crop", TURNED}
_TURNING = ("rotate", "flip", "transpose", "transverse", "reverse", TURNED)
OPTIONAL = frozenset(
    (
        "autocontrast brightness_down brightness_up color_down color_up colorize contrast_down contrast_up convolve "
        "draw edge_detect equalize filter gaussian_blur grayscale invert median_blur morphology posterize resize "
        "sharpen sharpness sharpness_down sharpness_up smooth solarize threshold tone"
    ).split()
)
"""Operations outside the core that may help to see; others earn nothing."""
ROUNDING_PX = 16
"""What rounding to whole patches takes off a side at most: half of one token, with patches of 16 pixels."""
MIN_DENSITY = 0.6
"""Pixels that the model must see of a part of the source, as a fraction of those in the first view."""
MIN_FIDELITY = 0.8
"""Least legibility of what the model sees: the product of the fidelities of the calls that made it."""


# ------------------------------------------------------------------------------------------------ what is wanted
def expected_operations(required: Iterable[str]) -> frozenset[str]:
    """Operations that a task wants: the inverse of everything that was done to its image.

    `rotate_n` becomes the rotation by 360 - n where that is 90, 180 or 270, and is left out otherwise; flips are
    their own inverse, and every other name stands for itself.
    """
    return frozenset(filter(None, map(_inverse, required)))


def _inverse(name: str) -> str:
    """The operation that undoes a transform; empty where none of the core does."""
    if not name.startswith("rotate_"):
        return name
    try:
        angle = (360 - int(name.removeprefix("rotate_"))) % 360
    except ValueError:
        return ""
    return f"rotate_{angle}" if angle in (90, 180, 270) else ""


def orientation_label(affine: Affine) -> str:
    """The change of orientation by a map: `identity`, a core operation, or `TURNED` for any other."""
    signs = {_signs(dihedral_affine(name, 1, 1)): name for name in ("identity", *ORIENTATIONS)}
    return signs.get(_signs(affine), TURNED)


def _signs(affine: Affine) -> tuple[float, ...]:
    linear = affine.a, affine.b, affine.d, affine.e
    smallest = 1e-6 * max(map(abs, linear))
    return tuple(0.0 if abs(value) <= smallest else math.copysign(1.0, value) for value in linear)


# ------------------------------------------------------------------------------------------------ what was used
@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCredit:
    """What a trajectory gets credit and blame for."""

    labels: frozenset[str] = frozenset()
    """Operations that count as used (U)."""
    boxes: tuple[Box, ...] = ()
    """Crops that count, in the frame of the ground-truth box."""
    turned: frozenset[str] = frozenset()
    """Orientation operations that ran, even if their result was discarded: for blame, never for credit."""
    ordered: bool | None = None
    """True if exactly the wanted operations ran, each once, in order; None where order does not count."""


def net_credit(trajectory: Trajectory, expected: frozenset[str]) -> ToolCredit:
    """Credit for what the answer was given on: the net geometry of the last image that the model saw.

    A trajectory that did not answer gets no credit. An upright image has all the wanted turns, however they were
    composed (two flips for a half turn); another one has at most its net turn. An image that shows its part of the
    source illegibly, or more coarsely than the first view, earns nothing. Optional operations count where that image
    descends from their result.
    """
    turned = turned_labels(trajectory)
    if not trajectory.images or trajectory.end_state is not EndState.ANSWERED:
        return ToolCredit(turned=turned)
    task, image = trajectory.task, trajectory.last_image_seen
    chain, results = _chain(trajectory)
    labels = _optional_labels(results)
    boxes: tuple[Box, ...] = ()
    if image.source == 0 and image.to_source is not None and image.parent is not None:
        frame = Frame(*task.images[0].size)
        box = source_extent(image, frame, _shown_part(results))
        if box is not None and _is_legible(results) and not is_coarser(chain, trajectory.images[0], frame):
            labels |= _net_orientation(task, image.to_source, expected & ORIENTATION)
            if frame.is_cropped_to(box):
                labels, boxes = labels | {"crop"}, (box,)
    return ToolCredit(labels=frozenset(labels), boxes=boxes, turned=turned)


def is_coarser(chain: Sequence[TrajectoryImage], first: TrajectoryImage, frame: Frame) -> bool:
    """True if an image shows its part of the source with far fewer pixels than the first view does.

    The content counts, not the canvas: borders show nothing, and enlarging adds no detail, so the coarsest image on the
    way decides. What an image of one or two patches loses by rounding to whole patches (up to half) does not count.

    Args:
        chain: The image, then those that it was made from; the maps to the source are known.
        first: The first view.
        frame: Size of the source.
    """
    first_view = first.model_image.width * first.model_image.height / frame.area
    content = min(density(image) for image in chain)
    seen, made = chain[0].model_image, chain[0].original
    only_rounded = seen.width >= made.width - ROUNDING_PX and seen.height >= made.height - ROUNDING_PX
    ratio = seen.width * seen.height / (made.width * made.height)
    shown = density(chain[0]) * (max(ratio, 1.0) if only_rounded else ratio)
    # where the first view was enlarged, the source has no more detail than one pixel for a pixel
    return shown < MIN_DENSITY * first_view or content < MIN_DENSITY * min(1.0, first_view)


def _net_orientation(task: Task, to_source: Affine, wanted: frozenset[str]) -> frozenset[str]:
    if wanted and is_upright(to_source, to_upright(task.required_transforms, task.images[0].size)):
        return wanted
    return frozenset({orientation_label(to_source)} - {"identity"})


def ran_credit(trajectory: Trajectory, *, in_source: bool) -> ToolCredit:
    """Credit for everything that ran, as a set over the whole trajectory: the released code's rule, on what really ran.

    Args:
        trajectory: Finished; whether it answered does not matter.
        in_source: Map crops to the source image; else leave them in the frame of the image that each call worked on,
            as the released code does.
    """
    labels: set[str] = set()
    boxes: list[Box | None] = []
    for index, result in _successes(trajectory):
        labels |= _optional_labels([result]).union(result.effect.core if result.effect else ())
        boxes.append(_call_box(trajectory, index, result, in_source))
    found = tuple(box for box in boxes if box is not None)
    return ToolCredit(labels=frozenset(labels), boxes=found, turned=turned_labels(trajectory))


def step_credit(trajectory: Trajectory, expected: frozenset[str]) -> ToolCredit:
    """Credit step by step (paper, section "must-use"): each wanted operation on its first correct use, crops in source.

    A step is the net effect of one call whose image the model saw. `ordered` holds where the calls did the wanted
    operations once each, the last transform undone first and the crop at the end, and no call failed.
    """
    use = ran_credit(trajectory, in_source=True)
    steps: list[str] = []
    for _, result in _successes(trajectory):
        core = sorted(result.effect.core if result.effect else (), key=lambda label: label == "crop")
        steps += core or [TURNED]
    undone = [name for name in reversed(trajectory.task.required_transforms) if name != "crop"]
    order = [label for name in undone for label in expected_operations([name])] + ["crop"] * ("crop" in expected)
    failed = any(turn.result is not None and turn.result.status is not ToolStatus.OK for turn in trajectory.turns)
    return replace(use, ordered=bool(order) and steps == order and not failed)


def turned_labels(trajectory: Trajectory) -> frozenset[str]:
    """Orientation operations that ran in any call, even where their result was discarded.

    Read from the pixels of each result, proven or only suggested, and from the names in the trace. A trace from which
    operations were removed may have held any of them.
    """
    if any(op.name == ERASED for op in trajectory.operations):
        return ORIENTATION | {TURNED}
    ran = {op.name for op in trajectory.operations if not _is_of_channels(op)}
    effects = [effect for turn in trajectory.turns if turn.result for effect in turn.result.effects]
    ran |= {label for effect in effects if effect for label in (*effect.core, *effect.turned)}
    return frozenset(name if name in ORIENTATION else TURNED for name in ran if name.startswith(_TURNING))


def _is_of_channels(op: Operation) -> bool:
    """True for `np.flip` along the last axis, which swaps colours (in a grey image the net effect shows the flip)."""
    axis = op.arguments.get("axis")  # a trace may be forged: of any type
    return op.name == "reverse" and (axis[-1] if isinstance(axis, tuple | list) and axis else axis) in (-1, 2)


def _successes(trajectory: Trajectory) -> Iterable[tuple[int, ToolResult]]:
    """Images that calls made and the model saw, by index, each with the result of its own."""
    for turn in trajectory.turns:
        if turn.result is not None and turn.result.status is ToolStatus.OK:
            yield from _made_by(turn)


def _made_by(turn: Turn) -> Iterable[tuple[int, ToolResult]]:
    """The images of a turn's call by index, each with the result as if the call had made only that image."""
    result = turn.result
    if result is None:
        return
    for number, index in enumerate(turn.image_indices):
        if not result.traces:
            yield index, result
            continue
        trace = result.traces[number]
        operations = tuple(replace(op, used=at in trace.used) for at, op in enumerate(result.operations))
        yield index, replace(result, effect=trace.effect, operations=operations, traces=())


def _optional_labels(results: Iterable[ToolResult]) -> set[str]:
    return {op.name for result in results for op in result.operations if op.used and _may_help(op)}


def _may_help(op: Operation) -> bool:
    """True for an optional operation that changes something: not for a factor of 1 or a resize to the same size."""
    idle = op.arguments.get("factor") == 1 or (op.name == "resize" and op.input_size == op.output_size is not None)
    return op.name in OPTIONAL and not idle


def _chain(trajectory: Trajectory) -> tuple[list[TrajectoryImage], list[ToolResult]]:
    """The last image, those that it was made from down to the task's own, and the results that made them."""
    made_by = {index: result for turn in trajectory.turns for index, result in _made_by(turn)}
    images: list[TrajectoryImage] = []
    results: list[ToolResult] = []
    index: int | None = len(trajectory.images) - 1
    while index is not None:
        images.append(trajectory.images[index])
        result = made_by.get(index)
        results += [result] if result is not None else []
        index = images[-1].parent
    return images, results


def _shown_part(results: Sequence[ToolResult]) -> Box | None:
    """Part of the last image that shows its source, according to the results that made it; None: all of it."""
    return results[0].effect.shown if results and results[0].effect is not None else None


def _is_legible(results: Iterable[ToolResult]) -> bool:
    """True if strokes and edges of the source survived the calls that an image came from.

    Each call is measured against its own input; the product is what several calls keep together.
    """
    return math.prod(result.effect.fidelity for result in results if result.effect is not None) >= MIN_FIDELITY


def _call_box(trajectory: Trajectory, index: int, result: ToolResult, in_source: bool) -> Box | None:
    if not in_source:
        return result.effect.crop_box if result.effect is not None else None
    image = trajectory.images[index]
    if image.source != 0:
        return None
    frame = Frame(*trajectory.task.images[0].size)
    box = source_extent(image, frame, _shown_part([result]))
    return box if box is not None and frame.is_cropped_to(box) else None
