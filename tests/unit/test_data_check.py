"""`data check`: problems by kind with their rows, the frame of boxes, copies and leakage, limits, page, exit code."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_corpus import (
    BAD_ITEMS,
    BAD_TASKS,
    ODD_TASKS,
    damage_middle,
    encoded,
    item,
    picture,
    row,
    write_items,
    write_tasks,
)
from PIL import Image

from cv_lightning.__main__ import main as program
from cv_lightning.data.rows import ReaderConfig
from cv_lightning.digits.export import write_digits_parquet
from cv_lightning.digits.scenes import DigitsConfig
from cv_lightning.factory.check import check_files
from cv_lightning.factory.check_facts import CheckConfig
from cv_lightning.factory.check_frames import FrameEvidence, judge_frame
from cv_lightning.factory.near_images import VARIANTS, NearImages, thumbnail
from cv_lightning.types import DataError

TRANSPOSE = {
    "rotate_90": Image.Transpose.ROTATE_90,
    "rotate_180": Image.Transpose.ROTATE_180,
    "rotate_270": Image.Transpose.ROTATE_270,
    "flip_horizontal": Image.Transpose.FLIP_LEFT_RIGHT,
    "flip_vertical": Image.Transpose.FLIP_TOP_BOTTOM,
}


def main(words: list[str]) -> int:
    return program(["data", *words])


def rows_by_kind(entries: list[dict[str, Any]], path: str) -> dict[str, list[int]]:
    return {entry["kind"]: entry["rows"][path] for entry in entries if path in entry["rows"]}


def expected(cases: dict[str, tuple[str, Any]], first: int) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for at, (kind, _) in enumerate(cases.values(), start=first):
        found.setdefault(kind, []).append(at)
    return found


# ------------------------------------------------------------------------------------------------ the corpus
def test_the_corpus_is_counted_by_kind_with_row_numbers(tmp_path: Path) -> None:
    tasks = write_tasks(tmp_path / "set.parquet", [row(), *(bad for _, bad in BAD_TASKS.values())], row_group_size=6)
    odd = write_tasks(tmp_path / "odd.parquet", [made for _, made in ODD_TASKS.values()])
    sft = write_items(tmp_path, [item(), *(bad for _, bad in BAD_ITEMS.values())])
    report = check_files([tasks, odd, sft], CheckConfig())
    assert rows_by_kind(report["problems"], tasks) == expected(BAD_TASKS, 1)
    assert rows_by_kind(report["problems"], sft) == expected(BAD_ITEMS, 1)
    assert rows_by_kind(report["problems"], odd) == {}
    notes = rows_by_kind(report["notes"], odd)
    for at, (kind, _) in enumerate(ODD_TASKS.values()):
        assert any(note.startswith(kind) and at in rows for note, rows in notes.items()), kind
    assert [file["usable"] for file in report["files"]] == [1, len(ODD_TASKS), 1]
    assert report["ok"]
    assert json.loads(json.dumps(report)) == report


def test_the_check_and_training_skip_the_same_rows(tmp_path: Path) -> None:
    from cv_lightning.data.readers import TaskFiles

    path = write_tasks(tmp_path / "set.parquet", [row(), *(bad for _, bad in BAD_TASKS.values())])
    files = TaskFiles([path], ReaderConfig())
    for index in range(files.num_rows):
        files._is_usable(index, decode=True)
    [summary] = check_files([path], CheckConfig())["files"]
    assert summary["usable"] == files.num_rows - len(files.problems.problems)


def test_unreadable_rows_in_the_middle_are_listed(tmp_path: Path) -> None:
    rows = [row(encoded(picture(seed=at))) for at in range(12)]
    path = write_tasks(tmp_path / "set.parquet", rows, row_group_size=4)
    damage_middle(Path(path), group=1)
    report = check_files([path], CheckConfig())
    assert rows_by_kind(report["problems"], path) == {"unreadable rows": [4, 5, 6, 7]}


def test_an_unusable_file_is_reported_and_fails_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, cut, bad = (write_tasks(tmp_path / f"{name}.parquet", [row()]) for name in ("good", "cut", "bad"))
    Path(cut).write_bytes(Path(cut).read_bytes()[:-50])
    write_tasks(Path(bad), [row(b"<html>")])
    assert main(["check", good]) == 0
    assert main(["check", good, cut]) == 1
    assert "cut.parquet: CANNOT BE USED" in capsys.readouterr().out
    assert main(["check", good, bad]) == 1
    assert "no usable row; the first one: images[0]" in capsys.readouterr().out
    assert main(["check", str(tmp_path / "nowhere.parquet")]) == 2
    assert "no such file" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["set.csv", "set"])
def test_a_file_name_without_a_known_format_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("a,b")
    with pytest.raises(DataError, match=r"must end in \.parquet"):
        check_files([str(tmp_path / name)], CheckConfig())


def test_repeated_ids_are_noted(tmp_path: Path) -> None:
    rows = [row(encoded(picture(seed=at)), extra_index=index) for at, index in enumerate([0, 1, 1, 2, 0])]
    path = write_tasks(tmp_path / "set.parquet", rows)
    report = check_files([path], CheckConfig())
    assert rows_by_kind(report["notes"], path) == {"id (or extra_info.index) that came before": [2, 4]}


# ------------------------------------------------------------------------------------------------ limits
def test_effects_of_the_limits_are_listed(tmp_path: Path) -> None:
    rows = [
        row(encoded(picture(64, 64))),
        row(encoded(picture(256, 256))),
        row(encoded(picture(16, 16)), extra_bbox=[1.0, 1.0, 9.0, 9.0]),
        row(encoded(picture(640, 640)), extra_bbox=[1.0, 1.0, 9.0, 300.0]),
    ]
    path = write_tasks(tmp_path / "set.parquet", rows)
    report = check_files([path], CheckConfig(min_pixels=32 * 32, max_pixels=128 * 128, max_tokens=15))
    assert rows_by_kind(report["cut"], path) == {
        "image shrunk to max_pixels": [1, 3],
        "image enlarged to min_pixels": [2],
        "more than max_tokens: the row is of no use": [1, 3],
        "box less than half a patch wide for the model: only a crop shows it": [0, 1, 3],
    }
    tokens = report["tokens"]["images"]
    assert (tokens["min"], tokens["max"], tokens["count"]) == (1, 16, 4)
    assert sum(tokens["counts"]) == 4
    assert report["images"]["widths"]["max"] == 640
    assert report["tokens"]["all"] == {"count": 0}


def test_a_sample_of_rows_is_evenly_spread_and_headers_suffice(tmp_path: Path) -> None:
    cut = encoded(picture(300, 300))[:20_000]
    path = write_tasks(tmp_path / "set.parquet", [row(cut) for _ in range(100)])
    report = check_files([path], CheckConfig(max_rows=10, pixels=False))
    assert (report["rows"]["all"], report["rows"]["checked"], report["rows"]["usable"]) == (100, 10, 10)
    assert report["copies"] is None
    assert not check_files([path], CheckConfig(max_rows=10))["ok"]


def test_processes_give_the_same_report(tmp_path: Path) -> None:
    rows = [row(encoded(picture(seed=at))) if at % 7 else row(b"<html>") for at in range(150)]
    path = write_tasks(tmp_path / "set.parquet", rows, row_group_size=40)
    alone, together = (check_files([path], CheckConfig(num_workers=number)) for number in (1, 2))
    assert {**alone, "seconds": 0} == {**together, "seconds": 0}


# ------------------------------------------------------------------------------------------------ box frames
def turned_rows(names: list[str], frame: str, size: tuple[int, int] = (90, 90)) -> list[dict[str, Any]]:
    """Rows with a patch of noise on a plain image, turned, and its box in one of the frames."""
    rows = []
    for at, name in enumerate(names):
        upright = Image.new("RGB", size, (200, 200, 200))
        box = (8 + at % 5, 6 + at % 7, 38 + at % 5, 16 + at % 7)
        upright.paste(picture(30, 10, seed=at), box[:2])
        image = upright.transpose(TRANSPOSE[name])
        if frame == "given":
            dark = np.argwhere(np.abs(np.asarray(image, dtype=int) - 200).sum(-1) > 30)
            (top, left), (bottom, right) = dark.min(0), dark.max(0) + 1
            box = (left, top, right, bottom)
        rows.append(
            row(encoded(image), extra_bbox=[float(edge) for edge in box], extra_transform=json.dumps([name, "crop"]))
        )
    return rows


@pytest.mark.parametrize("frame", ["given", "upright"])
@pytest.mark.parametrize(("names", "reason"), [(list(TRANSPOSE) * 4, "edges"), (["flip_vertical"] * 12, "edges")])
def test_the_frame_is_found_by_the_content_of_the_boxes(
    tmp_path: Path, frame: str, names: list[str], reason: str
) -> None:
    path = write_tasks(tmp_path / "set.parquet", turned_rows(names, frame))
    [verdict] = check_files([path], CheckConfig())["box_frame"]
    assert verdict["fits"] == frame
    assert reason in verdict["reason"]


@pytest.mark.parametrize("frame", ["given", "upright"])
def test_the_frame_is_found_by_the_bounds(tmp_path: Path, frame: str) -> None:
    rows = turned_rows(["rotate_90", "rotate_270"] * 4, frame, size=(200, 30))
    for made in rows:
        if frame == "upright":
            made["extra_info"]["bbox"] = [150.0, 4.0, 190.0, 20.0]
        else:
            made["extra_info"]["bbox"] = [4.0, 150.0, 20.0, 190.0]
    path = write_tasks(tmp_path / "set.parquet", rows)
    [verdict] = check_files([path], CheckConfig(pixels=False))["box_frame"]
    assert verdict["fits"] == frame
    assert "8 boxes lie inside" in verdict["reason"]


def test_the_frame_is_found_by_the_shape_of_boxes() -> None:
    def evidence(swapped: bool, log_ratio: float) -> FrameEvidence:
        return FrameEvidence(swapped, swapped, True, True, log_ratio)

    wide, tall = [evidence(False, 1.2)] * 30, [evidence(True, -1.2)] * 30
    assert judge_frame(wide + tall).fits == "given"
    assert judge_frame(wide + [evidence(True, 1.1)] * 30).fits == "upright"
    assert judge_frame(wide).fits == "unknown"
    assert judge_frame([]).reason == "no row has a box"


def test_a_frame_other_than_the_configured_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_tasks(tmp_path / "set.parquet", turned_rows(list(TRANSPOSE) * 4, "upright"))
    assert main(["check", path]) == 0
    assert "SET data.reader.bbox_frame TO upright" in capsys.readouterr().out
    assert main(["check", path, "--bbox-frame", "upright"]) == 0
    assert "the frame is upright, as configured" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------ copies
def soft(seed: int, size: tuple[int, int] = (160, 120)) -> Image.Image:
    """An image with large shapes, like a photograph."""
    return picture(8, 6, seed).resize(size, Image.Resampling.BICUBIC)


def stored_again(image: Image.Image) -> bytes:
    return encoded(
        image.resize((image.width * 3 // 4, image.height * 3 // 4), Image.Resampling.BICUBIC), "JPEG", quality=70
    )


def test_leakage_is_found_exact_stored_again_and_turned(tmp_path: Path) -> None:
    train = write_tasks(tmp_path / "train.parquet", [row(encoded(soft(seed))) for seed in range(30)])
    held = [
        row(encoded(soft(100))),
        row(encoded(soft(4), "TIFF")),  # the same pixels in another format
        row(stored_again(soft(7))),
        row(stored_again(soft(9).transpose(TRANSPOSE["rotate_90"])), reward_model={"ground_truth": "x"}),
        row(encoded(soft(11).transpose(TRANSPOSE["flip_horizontal"])), prompt=None, extra_question="Other?"),
    ]
    test = write_tasks(tmp_path / "test.parquet", held)
    leakage = check_files([train], CheckConfig(test_files=(test,)))["copies"]["leakage"]
    found = {(p["held_out"]["row"], p["train"]["row"], p["how"], p["same_question"]) for p in leakage["pairs"]}
    assert found == {(1, 4, "exact", True), (2, 7, "near", True), (3, 9, "near", True), (4, 11, "near", False)}
    assert (leakage["held_out_pictures"], leakage["exact"], leakage["near"]) == (5, 1, 3)


def test_splits_within_a_file_replace_a_test_file(tmp_path: Path) -> None:
    rows = [row(encoded(soft(seed)), extra_split="train") for seed in range(5)]
    rows += [row(encoded(soft(3)), extra_split="test"), row(encoded(soft(50)), extra_split="test")]
    leakage = check_files([write_tasks(tmp_path / "set.parquet", rows)], CheckConfig())["copies"]["leakage"]
    assert (leakage["held_out_by"], leakage["held_out_pictures"], leakage["exact"]) == ("extra_info.split", 2, 1)


def test_double_rows_and_near_copies(tmp_path: Path) -> None:
    rows = [row(encoded(soft(0))), row(encoded(soft(1))), row(encoded(soft(0)))]
    rows += [row(encoded(soft(0)), extra_question="Else?"), row(stored_again(soft(1)))]
    copies = check_files([write_tasks(tmp_path / "set.parquet", rows)], CheckConfig())["copies"]
    assert [(p["row"]["row"], p["like"]["row"]) for p in copies["double_rows"]["pairs"]] == [(2, 0)]
    assert [(p["image"]["row"], p["like"]["row"]) for p in copies["near_copies"]["pairs"]] == [(4, 1)]
    assert (copies["pictures"], copies["different"]) == (5, 3)


def test_digit_scenes_of_the_same_layout_are_not_copies(tmp_path: Path) -> None:
    for split in ("train", "held_out"):
        write_digits_parquet(tmp_path / f"{split}.parquet", DigitsConfig(), split, 80)
    report = check_files(
        [str(tmp_path / "train.parquet")], CheckConfig(test_files=(str(tmp_path / "held_out.parquet"),))
    )
    assert report["rows"]["usable"] == 160
    assert (report["copies"]["leakage"]["exact"], report["copies"]["leakage"]["near"]) == (0, 0)
    assert report["copies"]["near_copies"]["count"] == 0
    assert {frame["fits"] for frame in report["box_frame"]} == {"given"}


def test_a_blank_image_has_no_near_copy() -> None:
    blank, other = (thumbnail(Image.new("RGB", (50, 50), colour)) for colour in ("white", "#fefefe"))
    known = NearImages()
    known.add(blank)
    assert known.find(other, VARIANTS) is None


# ------------------------------------------------------------------------------------------------ page and command
class Loaded(HTMLParser):
    """Collects what a page would load."""

    def __init__(self) -> None:
        super().__init__()
        self.sources: list[str] = []
        self.links: list[str] = []
        self.rows = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.rows += tag == "tr"
        self.sources += [value or "" for name, value in attrs if name == "src"]
        self.links += [value or "" for name, value in attrs if name == "href"]


def test_the_page_is_one_file_and_shows_the_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [*(bad for _, bad in BAD_TASKS.values()), *(row(encoded(soft(seed))) for seed in range(4))]
    rows.append(row(b"<html><script>alert(1)</script>", extra_transform=json.dumps(["<script>alert(1)</script>"])))
    rows.append(row(extra_transform=json.dumps(["<script>alert(1)</script>"])))
    train = write_tasks(tmp_path / "train.parquet", rows)
    test = write_tasks(tmp_path / "test.parquet", [row(stored_again(soft(2)))])
    page, report = tmp_path / "page.html", tmp_path / "report.json"
    assert main(["check", train, "--test", test, "--page", str(page), "--json", str(report)]) == 0
    text, said = page.read_text(encoding="utf-8"), json.loads(report.read_text(encoding="utf-8"))
    parser = Loaded()
    parser.feed(text)
    assert len(parser.sources) == 2 + 5  # the two images of the leak, and one of each usable row
    assert text.count('class="sample panel"') == 6 + 4 + 1  # of train: six of the kinds of problems, the usable rows
    assert all(source.startswith("data:image/") for source in parser.sources)
    assert all(link.startswith(("#", "data:,")) for link in parser.links)
    assert "<script>" not in text
    assert all(entry["kind"] in text for entry in said["problems"])
    out = capsys.readouterr().out
    assert f"{said['rows']['usable']} of {len(rows) + 1} rows usable" in out
    assert "1 x image too large" in out


def test_digits_are_exported_and_pass(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(tmp_path / "d.parquet"), "--count", "12", "--seed", "3"]) == 0
    assert main(["check", str(tmp_path / "d.parquet")]) == 0
    assert "12 rows of tasks, 12 usable" in capsys.readouterr().out
    assert main(["export", str(tmp_path / "d.csv")]) == 2
    assert "must end in .parquet (RL) or .json (SFT)" in capsys.readouterr().err
