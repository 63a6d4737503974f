from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import skimage.data
from PIL import Image, ImageDraw
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from cv_lightning.data.corruptions import (
    CORRUPTIONS,
    SEVERITIES,
    CorruptionConfig,
    Variant,
    apply_variant,
    corrupt_image,
)
from cv_lightning.data.readers import TaskFiles
from cv_lightning.data.rows import ReaderConfig
from cv_lightning.data.writers import write_task_parquet
from cv_lightning.evaluation.scoring import official_score
from cv_lightning.factory.corrupt import Corrupt, write_corrupted
from cv_lightning.images import is_upright
from cv_lightning.orientations import ORIENTATIONS, to_upright, turn_box, turn_image
from cv_lightning.rewards.transforms import expected_operations
from cv_lightning.types import Box, Task

PHOTOGRAPH = Image.fromarray(skimage.data.chelsea()).resize((225, 150))
PAGE = Image.fromarray(skimage.data.page()).convert("RGB")


def marked(box: Box = (20, 30, 60, 45), size: tuple[int, int] = (120, 80)) -> Task:
    """A white image with a red rectangle, which is its box."""
    image = Image.new("RGB", size, "white")
    x1, y1, x2, y2 = map(int, box)
    ImageDraw.Draw(image).rectangle((x1, y1, x2 - 1, y2 - 1), fill="red")
    return Task(
        id="m", question="Where?", images=(image,), ground_truth="there", box=box, required_transforms=("crop",)
    )


def red_box(image: Image.Image) -> Box:
    """Bounding box of what is more red than white."""
    pixels = np.asarray(image).astype(int)
    rows, columns = np.nonzero(pixels[..., 0] - pixels[..., 1] > 128)
    return float(columns.min()), float(rows.min()), float(columns.max() + 1), float(rows.max() + 1)


@pytest.mark.parametrize("orientation", ["identity", *ORIENTATIONS])
def test_boxes_follow_the_pixels(orientation: str) -> None:
    shown = apply_variant(marked(), Variant(orientation))
    assert shown.box == red_box(shown.images[0])
    assert (shown.images[0].size == (80, 120)) == (orientation in ("rotate_90", "rotate_270"))


@pytest.mark.parametrize("first", ORIENTATIONS)
def test_a_turned_task_can_be_turned_again(first: str) -> None:
    for second in ORIENTATIONS:
        task = apply_variant(apply_variant(marked(), Variant(first)), Variant(second))
        assert task.box == red_box(task.images[0])
        assert task.required_transforms == (first, second, "crop")
        back = to_upright(task.required_transforms, task.images[0].size)
        undone = turn_image(turn_image(marked().images[0], first), second)
        assert undone.tobytes() == task.images[0].tobytes()
        assert is_upright(back) == (task.images[0].tobytes() == marked().images[0].tobytes())


@pytest.mark.parametrize("corruption", CORRUPTIONS)
def test_corruptions_do_not_move_content(corruption: str) -> None:
    """The size does not change, and the middle of the red rectangle stays the reddest part of the image."""
    task = marked((20, 30, 60, 70), (160, 100))
    shown = apply_variant(task, Variant("rotate_90", corruption, 2))
    assert shown.images[0].size == (100, 160)
    pixels = np.asarray(shown.images[0]).astype(float)
    redness = pixels[..., 0] - pixels[..., 1]
    x1, y1, x2, y2 = map(int, shown.box or ())
    outside = redness.copy()
    outside[y1:y2, x1:x2] = np.nan
    assert redness[y1 + 5 : y2 - 5, x1 + 5 : x2 - 5].mean() > np.nanmean(outside) + 40


@pytest.mark.parametrize("corruption", CORRUPTIONS)
def test_equal_seeds_give_equal_pixels(corruption: str) -> None:
    one, two = (corrupt_image(PHOTOGRAPH, corruption, 3, seed=7) for _ in range(2))
    assert one.tobytes() == two.tobytes()
    assert one.tobytes() != PHOTOGRAPH.tobytes()
    drawn = ("gaussian_noise", "shot_noise", "impulse_noise", "speckle_noise", "fog", "motion_blur")
    assert (corrupt_image(PHOTOGRAPH, corruption, 3, seed=8).tobytes() != one.tobytes()) == (corruption in drawn)


@pytest.mark.parametrize("corruption", CORRUPTIONS)
@pytest.mark.parametrize("picture", [PHOTOGRAPH, PAGE], ids=["photograph", "page"])
def test_severity_is_monotone(corruption: str, picture: Image.Image) -> None:
    clean = np.asarray(picture)
    shown = [np.asarray(corrupt_image(picture, corruption, severity)) for severity in SEVERITIES]
    noise = [peak_signal_noise_ratio(clean, each) for each in shown]
    structure = [structural_similarity(clean, each, channel_axis=2) for each in shown]
    assert noise == sorted(noise, reverse=True) and len(set(noise)) == 5
    assert structure == sorted(structure, reverse=True)
    assert structure[0] > 0.2 and structure[-1] < 0.95


def test_every_combination_comes_equally_often() -> None:
    config = CorruptionConfig(corruptions=("none", "fog", "jpeg"), severities=(1, 5), mode="one")
    num = len(config.variants)
    assert num == 6 * (1 + 2 * 2)
    dealt = [variant for position in range(2 * num) for variant in config.variants_at(position)]
    assert sorted(dealt[:num], key=str) == sorted(dealt[num:], key=str) == sorted(config.variants, key=str)
    assert dealt[:num] != dealt[num:]


def test_an_unknown_name_is_refused_with_its_flag() -> None:
    with pytest.raises(ValueError, match=r"--corruptions sleet: name at least one of all, none"):
        CorruptionConfig(corruptions=("sleet",))
    with pytest.raises(ValueError, match="--severities 6"):
        CorruptionConfig(severities=(6,))


def test_corrupt_writes_every_combination(tmp_path: Path) -> None:
    source = tmp_path / "bench.parquet"
    write_task_parquet(source, [marked(), marked((10, 10, 30, 20))], "test")
    out = tmp_path / "robust.parquet"
    suite = CorruptionConfig(corruptions=("none", "gaussian_blur"), severities=(1,))
    counts = write_corrupted(Corrupt(files=[str(source)], out=out, suite=suite))
    assert counts == {
        f"{turn}/{kind}": 2 for turn in ("identity", *ORIENTATIONS) for kind in ("none", "gaussian_blur_1")
    }
    files = TaskFiles([str(out)], ReaderConfig())
    assert len(files) == 24 and not files.problems.problems
    for position in range(24):
        task = files.row(position)
        if task.metadata["corruption"] == "none":
            assert task.box == red_box(task.images[0])
        turned = {"crop"} | expected_operations([task.metadata["orientation"]])
        assert expected_operations(task.required_transforms) == turned - {"identity"}


def test_a_public_benchmark_keeps_its_metric(tmp_path: Path) -> None:
    source = tmp_path / "ocr.parquet"
    row = {"question": "what is written?", "answer": ["CENTRE", "CENTER"], "question_type": "Scene Text"}
    picture = io.BytesIO()
    marked().images[0].save(picture, "PNG")
    pq.write_table(pa.Table.from_pylist([row | {"image": {"bytes": picture.getvalue(), "path": None}}]), source)
    shown: list[tuple[int, int]] = []
    suite = CorruptionConfig(corruptions=("none",), severities=(1,))
    reader = ReaderConfig(format="ocrbench", data_source="ocrbench")
    write_corrupted(
        Corrupt(files=[str(source)], out=tmp_path / "turned.parquet", suite=suite, reader=reader),
        lambda done, count, note: shown.append((done, count)),
    )
    tasks = TaskFiles([str(tmp_path / "turned.parquet")], ReaderConfig())
    assert len(tasks) == 6 and shown == [(1, 1)]
    assert official_score("in the CENTER", tasks.row(3).metadata) == 1.0
    assert official_score("elsewhere", tasks.row(3).metadata) == 0.0


def test_an_existing_file_stays_until_the_new_one_is_complete(tmp_path: Path) -> None:
    out = tmp_path / "out.parquet"
    write_task_parquet(out, [marked()] * 600, "test")
    assert pq.ParquetFile(out).num_row_groups == 3 and len(TaskFiles([str(out)], ReaderConfig())) == 600
    before = out.read_bytes()

    def stopped() -> Iterator[Task]:
        yield marked()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_task_parquet(out, stopped(), "test")
    assert out.read_bytes() == before and [path.name for path in tmp_path.iterdir()] == ["out.parquet"]


def test_boxes_map_there_and_back() -> None:
    box = (3.0, 4.0, 30.0, 18.0)
    for there, back in (("rotate_90", "rotate_270"), ("rotate_180", "rotate_180"), ("flip_vertical", "flip_vertical")):
        turned = turn_box(box, [there], (50, 40))
        size = (40, 50) if there == "rotate_90" else (50, 40)
        assert turn_box(turned, [back], size) == box
