"""Metrics: tool-use success follows its definition, rates have intervals."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.stats import binomtest
from trajectory_samples import INVERSE, KINDS, TURNS, Policy, digit_task, group

from cv_lightning.evaluation.metrics import summarise
from cv_lightning.evaluation.outcome import crop_fits, outcomes, tool_use_success, turned_image
from cv_lightning.evaluation.results import WHOLE_BYTES, fingerprint
from cv_lightning.evaluation.statistics import bootstrap, rate, wilson
from cv_lightning.images import compose, dihedral_affine
from cv_lightning.orientations import to_upright
from cv_lightning.trajectory import TrajectoryWriter, read_groups
from cv_lightning.types import (
    IDENTITY,
    Affine,
    Box,
    Effect,
    EndState,
    Group,
    Operation,
    SandboxResult,
    ToolStatus,
    Trajectory,
    TrajectoryImage,
    Turn,
)


def record(
    required: tuple[str, ...], steps: list[str | tuple[int, int, int, int]], box: Box = (100, 40, 160, 70)
) -> Group:
    """A group of one trajectory that did `steps` (names of turns, crop boxes) to a 300x200 image."""
    found = group(digit_task(0, "upright"), 1, Policy(needless=0, error=0))
    seen, given = Image.new("RGB", (96, 96)), Image.new("RGB", (300, 200))
    found.task = replace(found.task, required_transforms=required, box=box, images=(given,))
    images = [TrajectoryImage(original=given, model_image=seen, to_source=IDENTITY)]
    for step in steps:
        last = images[-1]
        assert last.to_source is not None
        if isinstance(step, str):
            swap = step in ("rotate_90", "rotate_270")
            width, height = last.original.size
            size, back = (height, width) if swap else (width, height), dihedral_affine(step, width, height)
        else:
            size, back = (step[2] - step[0], step[3] - step[1]), Affine(1, 0, step[0], 0, 1, step[1])
        images.append(
            TrajectoryImage(
                original=Image.new("RGB", size),
                model_image=seen,
                parent=len(images) - 1,
                to_source=compose(last.to_source, back),
            )
        )
    found.trajectories[0].images = images
    return found


def holds(found: Group) -> bool:
    return tool_use_success(found.task, found.trajectories[0])


@pytest.mark.parametrize("applied", sorted(TURNS))
def test_only_the_inverse_makes_an_image_upright(applied: str) -> None:
    for done in (*sorted(TURNS), "nothing"):
        steps: list[str | tuple[int, int, int, int]] = [] if done == "nothing" else [done]
        assert holds(record((applied,), steps)) == (done == INVERSE.get(applied, applied)), (applied, done)


def test_a_task_that_needs_text_is_a_success_only_after_a_call_that_printed() -> None:
    found = record((), [])
    found.task = replace(found.task, metadata={"kind": "width", "needs_text": True})
    (trajectory,) = found.trajectories
    for turns, success in (
        ([Turn(text="", num_tokens=1)], False),
        ([Turn(text="", num_tokens=1, result=SandboxResult(text="12"))], True),
        ([Turn(text="", num_tokens=1, result=SandboxResult(image=Image.new("RGB", (9, 9))))], False),
    ):
        trajectory.turns = turns
        assert holds(found) == success
    summary = summarise([found])
    assert summary.accuracy.n == summary.tool_use_success.n == 1 and summary.accuracy_upright.n == 0


def test_net_effect_counts_instead_of_steps() -> None:
    assert holds(record(("rotate_180",), ["flip_horizontal", "flip_vertical"]))
    assert holds(record(("rotate_90",), ["rotate_90", "rotate_90", "rotate_90"]))
    assert not holds(record(("rotate_90",), ["rotate_270", "rotate_180"]))
    assert holds(record(("rotate_90", "flip_horizontal"), ["flip_horizontal", "rotate_270"]))
    assert not holds(record(("rotate_90", "flip_horizontal"), ["rotate_270", "flip_horizontal"]))


@pytest.mark.parametrize(
    "names", [("rotate_90",), ("flip_vertical",), ("rotate_270", "flip_horizontal"), ("rotate_180", "rotate_90")]
)
def test_to_upright_agrees_with_pixels(names: tuple[str, ...]) -> None:
    upright = np.zeros((20, 30), np.uint8)
    upright[3, 17] = 255
    image = Image.fromarray(upright)
    for name in names:
        image = image.transpose(TURNS[name])
    y, x = (int(v[0]) for v in np.nonzero(np.asarray(image)))
    found = record(names, [])
    back = to_upright(found.task.required_transforms, image.size)
    centre = (back.a * (x + 0.5) + back.b * (y + 0.5) + back.c, back.d * (x + 0.5) + back.e * (y + 0.5) + back.f)
    assert centre == (17.5, 3.5)


BOX = (100, 40, 160, 70)  # 60 x 30 = 1800 square pixels: a crop may have 10,800


@pytest.mark.parametrize(
    ("crop", "fits"),
    [
        ((100, 40, 160, 70), True),
        ((106, 40, 160, 70), True),  # 90 % of the box
        ((107, 40, 160, 70), False),  # 88 %
        ((80, 20, 200, 110), True),  # 10,800: exactly six times
        ((80, 20, 201, 110), False),  # 10,890
        ((200, 100, 260, 130), False),  # elsewhere
    ],
)
def test_crop_must_show_the_box_and_little_else(crop: tuple[int, int, int, int], fits: bool) -> None:
    assert holds(record(("crop",), [crop], BOX)) == fits


def test_crop_is_measured_in_source_pixels_after_a_turn() -> None:
    # the upright image is 200x300; after rotate_270 of the given one, the box lies elsewhere
    assert holds(record(("rotate_90", "crop"), ["rotate_270", (125, 95, 165, 165)], BOX))
    assert not holds(record(("rotate_90", "crop"), ["rotate_270", BOX], BOX))
    assert holds(record(("rotate_90", "crop"), [BOX, "rotate_270"], BOX))
    assert not holds(record(("rotate_90", "crop"), [BOX], BOX))  # cropped, still turned


def test_the_whole_image_is_not_a_crop() -> None:
    big = (0, 0, 290, 190)
    turned = record(("rotate_180", "crop"), ["rotate_180"], big)
    assert not crop_fits(turned.task, turned.trajectories[0])
    assert holds(record(("rotate_180", "crop"), ["rotate_180", (5, 5, 300, 200)], big))


def test_a_good_crop_counts_although_others_follow() -> None:
    found = record(("crop",), [BOX, (0, 0, 10, 10)], BOX)
    assert holds(found)  # some crop that the model saw


def test_tool_use_success_needs_an_answer_and_a_known_map() -> None:
    found = record(("rotate_90",), ["rotate_270"])
    found.trajectories[0].end_state = EndState.MAX_TURNS
    assert not holds(found)
    found = record(("rotate_90",), ["rotate_270"])
    images = found.trajectories[0].images
    images[-1] = replace(images[-1], to_source=None)
    assert not holds(found)


def spurious(trajectory: Trajectory, operations: tuple[str, ...], core: tuple[str, ...]) -> bool:
    result = SandboxResult(
        status=ToolStatus.OK,
        operations=tuple(Operation(name=name, call=name) for name in operations),
        effect=Effect(to_input=None, core=core),
    )
    trajectory.turns = [Turn(text="", num_tokens=1, result=result)]
    return turned_image(trajectory)


def test_orientation_operations_by_name_and_by_effect() -> None:
    trajectory = record((), []).trajectories[0]
    assert spurious(trajectory, ("rotate_90",), ("rotate_90",))
    assert spurious(trajectory, ("rotate_90", "rotate_270"), ())  # ran, to no effect
    assert spurious(trajectory, (), ("flip_vertical",))  # image[::-1]
    assert not spurious(trajectory, ("crop", "contrast_up", "resize"), ("crop",))


def test_summary_of_known_outcomes() -> None:
    perfect = Policy(turn=1, crop=1, needless=0, error=0, read=1)
    groups = [group(digit_task(index, kind), 2, perfect) for index in range(5) for kind in KINDS]
    summary = summarise(groups)
    assert (summary.num_tasks, summary.num_trajectories) == (20, 40)
    assert (summary.accuracy.value, summary.tool_use_success.value, summary.accuracy_upright.value) == (1, 1, 1)
    assert (summary.accuracy.n, summary.accuracy_upright.n, summary.spurious.value) == (30, 10, 0)
    assert {kind: found.turns for kind, found in summary.by_kind.items()} == {
        "upright": 1,
        "turned": 2,
        "small": 2,
        "turned_and_small": 3,
    }
    assert summary.end_states == {"answered": 1.0}
    lazy = summarise([group(digit_task(index, "turned"), 1, replace(perfect, turn=0)) for index in range(20)])
    assert lazy.tool_use_success.value == 0
    assert lazy.tool_calls_mean == 0
    assert math.isnan(lazy.tool_success.value)


def test_scalars_always_have_the_same_keys() -> None:
    groups = [group(digit_task(index, "turned"), 2) for index in range(3)]
    assert set(summarise(groups).scalars()) == set(summarise([]).scalars())


def test_live_and_stored_agree(tmp_path: Path) -> None:
    groups = [group(digit_task(index, KINDS[index % 4]), 3) for index in range(16)]
    with TrajectoryWriter(tmp_path) as writer:
        for item in groups:
            writer.write_group(item, 0)
    assert summarise(groups).to_json() == summarise(read_groups(tmp_path)).to_json()


def test_infrastructure_failures_are_left_out_not_scored_wrong() -> None:
    perfect = Policy(turn=1, error=0, read=1)
    groups = [group(digit_task(index, "turned"), 2, perfect) for index in range(3)]
    groups[0].trajectories[0].end_state = EndState.ERROR_SANDBOX
    groups[0].trajectories[0].reward = None
    groups[1].trajectories[0].reward = None  # judge gave no verdict
    summary = summarise(groups)
    assert (summary.num_errors, summary.num_unscored) == (1, 1)
    assert (summary.accuracy.value, summary.accuracy.n) == (1.0, 4)
    assert summary.tool_use_success.n == 5
    assert len(outcomes(groups)) == 6


def test_an_empty_evaluation_has_nan_figures() -> None:
    summary = summarise([])
    assert math.isnan(summary.accuracy.value)
    assert summary.to_json()["accuracy"] == {"value": None, "low": None, "high": None, "n": 0}


@pytest.mark.parametrize(("hits", "n"), [(0, 10), (3, 10), (10, 10), (390, 400), (1, 1)])
def test_wilson_agrees_with_scipy(hits: int, n: int) -> None:
    expected = binomtest(hits, n).proportion_ci(method="wilson")
    assert wilson(hits, n) == pytest.approx((expected.low, expected.high), abs=1e-6)


def test_bootstrap_resamples_tasks_not_trajectories() -> None:
    rng = np.random.default_rng(1)
    per_task = rng.integers(0, 2, 50)
    values = [float(v) for v in per_task for _ in range(8)]  # eight copies carry no more information than one
    clusters = [task for task in range(50) for _ in range(8)]
    low, high = bootstrap(values, clusters)
    once = wilson(per_task.sum(), 50)
    assert (low, high) == pytest.approx(once, abs=0.04)
    assert bootstrap(values, clusters) == (low, high)
    assert high - low > 2 * (wilson(sum(values), 400)[1] - wilson(sum(values), 400)[0])


def test_rate_interval_shrinks_with_n() -> None:
    widths = [rate([0.0, 1.0] * k, list(range(2 * k))) for k in (5, 50, 500)]
    assert all(a.high - a.low > b.high - b.low for a, b in pairwise(widths))
    assert str(rate([1.0, 0.0], [1, 2])).startswith("0.500 [")


# ------------------------------------------------------------------------------------------------ fingerprints
@pytest.mark.parametrize("size", [WHOLE_BYTES // 4, WHOLE_BYTES + 12345])
def test_a_fingerprint_sees_a_change_of_one_layer_anywhere(tmp_path: Path, size: int) -> None:
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(bytes(size))
    before = fingerprint(tmp_path)
    for start in (0, size // 3, size // 2 + 777, size - 1):
        with weights.open("r+b") as file:
            file.seek(start)
            file.write(bytes([1]) * min(size // 64, size - start))
        after = fingerprint(tmp_path)
        assert after.keys() == {"model.safetensors"} and after != before
        before = after
