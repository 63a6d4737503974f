"""Digits scenes: what the metadata say is what the pixels show."""

from __future__ import annotations

from collections import Counter
from itertools import combinations

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from cv_lightning.digits.demonstrations import UNDO
from cv_lightning.digits.scenes import KINDS, DigitsConfig, digit_task, is_small, is_turned
from cv_lightning.images import area, intersection
from cv_lightning.orientations import ORIENTATIONS

CONFIG = DigitsConfig()


def upright(image: Image.Image, applied: str | None) -> Image.Image:
    """The image with its transform undone, by the code that demonstrations use."""
    return eval(f"image.{UNDO[applied]}", {"image": image, "Image": Image}) if applied else image


def test_scene_depends_only_on_its_arguments() -> None:
    first = [digit_task(CONFIG, "train", index) for index in range(8)]
    digit_task(CONFIG, "held_out", 99)
    again = [digit_task(DigitsConfig(), "train", index) for index in range(8)]
    other = [digit_task(DigitsConfig(seed=1), "train", index) for index in range(8)]
    assert [t.id for t in first] == [t.id for t in again]
    assert all(a.images[0].tobytes() == b.images[0].tobytes() for a, b in zip(first, again, strict=True))
    assert any(a.ground_truth != b.ground_truth for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_train_and_held_out_scenes_share_no_digit(kind: str) -> None:
    labels = load_digits().target
    used = {"train": set(), "held_out": set()}
    for split, digits in used.items():
        for index in range(400):
            task = digit_task(CONFIG, split, index, kind)
            digits.update(task.metadata["digits"])
            assert task.ground_truth == "".join(str(labels[digit]) for digit in task.metadata["digits"])
    assert max(used["train"]) < CONFIG.train_digits <= min(used["held_out"])


@pytest.mark.parametrize("kind", KINDS)
def test_metadata_describe_the_image(kind: str) -> None:
    seen = set()
    for index in range(40):
        task = digit_task(CONFIG, "held_out", index, kind)
        image, applied, cell = task.images[0], task.metadata["applied"], task.metadata["cell"]
        seen.add(applied)
        assert task.data_source == f"digits/{kind}"
        assert image.mode == "RGB"
        assert image.size == ((384, 384) if is_small(kind) else (96, 96))
        assert task.required_transforms == tuple(filter(None, (applied, "crop" if cell else None)))
        assert (applied is not None) == is_turned(kind)
        left, top, right, bottom = (int(edge) for edge in task.box)
        pixels = np.asarray(image)[..., 0]
        frame = pixels[top:bottom, left:right]
        assert not frame[[0, -1]].any() and not frame[:, [0, -1]].any()
        assert frame[3:-3, 3:-3].max() == 255
        outside = pixels[max(0, top - 1) : bottom + 1, max(0, left - 1) : right + 1]
        assert np.count_nonzero(outside[[0, -1]]) > 0
        straight = np.asarray(upright(image, applied))[..., 0]
        side = straight.shape[0]
        assert not straight[side * 89 // 96 : side * 92 // 96, side * 7 // 96 : side * 89 // 96].any()
        assert task.metadata["box_area"] == area(task.box) == area(tuple(task.metadata["upright_box"]))
    assert seen == (set(ORIENTATIONS) if is_turned(kind) else {None})


def test_the_cell_is_a_good_crop_of_the_number() -> None:
    for index in range(200):
        task = digit_task(CONFIG, "train", index, "turned_and_small")
        cell, box = tuple(task.metadata["cell"]), tuple(task.metadata["upright_box"])
        assert intersection(cell, box) == area(box)
        assert area(cell) <= 6 * area(box)
        assert all(edge % CONFIG.cell == 0 for edge in cell)


def test_orientations_of_a_scene_are_distinct() -> None:
    image = digit_task(CONFIG, "train", 0, "upright").images[0]
    views = [image] + [image.transpose(method) for method in Image.Transpose]
    assert len(views) == 8
    for a, b in combinations(views, 2):
        assert np.mean(np.asarray(a) != np.asarray(b)) > 0.05


def test_small_digit_is_a_few_pixels_in_the_model_view() -> None:
    task = digit_task(CONFIG, "train", 0, "small")
    scale = CONFIG.model_side / task.images[0].width
    assert (task.box[2] - task.box[0]) * scale < 12
    assert (task.box[3] - task.box[1]) * scale < 8


def test_kinds_occur_by_their_frequencies() -> None:
    config = DigitsConfig(kind_shares={"upright": 3.0, "small": 1.0})
    kinds = Counter(digit_task(config, "train", index).metadata["kind"] for index in range(2000))
    assert set(kinds) == {"upright", "small"}
    assert kinds["upright"] / 2000 == pytest.approx(0.75, abs=0.04)


def test_other_sizes_keep_the_layout() -> None:
    config = DigitsConfig(model_side=192, original_side=768, cell=128)
    task = digit_task(config, "train", 3, "small")
    assert task.images[0].size == (768, 768)
    assert intersection(tuple(task.metadata["cell"]), tuple(task.metadata["upright_box"])) > 0
    assert config.grid == (6, 4)


@pytest.mark.parametrize(
    ("arguments", "flag"),
    [
        ({"train_digits": 1797}, "--train_digits"),
        ({"cell": 70}, "--cell"),
        ({"original_side": 128}, "--original_side"),
        ({"model_side": 32}, "--model_side"),
        ({"jitter_px": 9}, "--jitter_px"),
        ({"kind_shares": {"upside_down": 1.0}}, "--kind_shares"),
        ({"kind_shares": {"upright": 0.0}}, "--kind_shares"),
        ({"cell": 384, "original_side": 384}, "--cell"),
    ],
)
def test_invalid_digits_config_names_its_flag(arguments: dict, flag: str) -> None:
    with pytest.raises(ValueError, match=flag):
        DigitsConfig(**arguments)
