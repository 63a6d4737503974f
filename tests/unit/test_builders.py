"""Builders of data sets: tables, plans, the offline teacher, progress, RL tasks."""

from __future__ import annotations

import base64
import csv
import io
import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from builder_samples import encoded, picture, rows, table
from PIL import Image

from cv_lightning.data.readers import TaskFiles
from cv_lightning.data.rows import ReaderConfig, RowError
from cv_lightning.factory.build_files import ProgressFile
from cv_lightning.factory.build_rl import BuildRL, TaskPlan, build_rl
from cv_lightning.factory.difficulty import is_informative, read_pass_rates
from cv_lightning.factory.overlap import KnownImages, OrientedImages
from cv_lightning.factory.plans import KINDS, KindAssigner, PlanConfig, PlannedTurn, make_plan, possible_kinds
from cv_lightning.factory.teacher import CropFrame, OfflineTeacher, TurnRequest, crop_arguments
from cv_lightning.factory.vqa_table import TableConfig, VqaTable, read_box
from cv_lightning.types import DataError

# ------------------------------------------------------------------------------------------------ tables


def test_every_table_format_gives_the_same_rows(tmp_path: Path) -> None:
    parquet = VqaTable([table(tmp_path, 5)], TableConfig())
    (tmp_path / "a.png").write_bytes(encoded(picture(0, box=(20, 30, 42, 44))))
    row = {"image": "a.png", "question": "What is item 0?", "answer": 100, "bbox": [20, 30, 42, 44]}
    (tmp_path / "t.jsonl").write_text(
        json.dumps({**row, "question": "What is item 0?\u2028"}, ensure_ascii=False) + "\n"
    )
    with (tmp_path / "t.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(row))
        writer.writeheader()
        writer.writerow({**row, "bbox": "20, 30, 42, 44"})
        coded = base64.b64encode(encoded(picture(0, box=(20, 30, 42, 44)))).decode()
        writer.writerow({**row, "image": coded, "bbox": "[20 30 42 44]"})
    (tmp_path / "t.jsonl").rename(tmp_path / "t.JSONL")
    texts = VqaTable([str(tmp_path / "t.JSONL"), str(tmp_path / "t.csv")], TableConfig())
    assert len(parquet) == 5 and len(texts) == 3
    wanted = parquet.row(0)
    for position in range(3):
        found = texts.row(position)
        assert (found.question, found.answer, found.box, found.size) == (
            wanted.question, wanted.answer, wanted.box, wanted.size,
        )  # fmt: skip
        assert found.image().tobytes() == wanted.image().tobytes()
    assert [texts.row(at).id for at in range(3)] == ["t:0", "t:0", "t:1"]


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        ({"question": ""}, "no question"),
        ({"answer": None}, "no answer"),
        ({"image": "none.png"}, "unreadable image"),
        ({"image": ""}, "no image"),
        ({"bbox": [9, 9, 3, 3]}, "box"),
        ({"bbox": "1 2 3"}, "box"),
        ({"bbox": [0, 0, 9999, 10]}, "box"),
    ],
)
def test_unusable_rows_name_the_problem(tmp_path: Path, change: dict[str, object], kind: str) -> None:
    (tmp_path / "a.png").write_bytes(encoded(picture(0)))
    row = {"image": "a.png", "question": "What?", "answer": "1", **change}
    (tmp_path / "t.jsonl").write_text(json.dumps(row) + "\n{broken\n")
    found = VqaTable([str(tmp_path / "t.jsonl")], TableConfig())
    with pytest.raises(RowError) as caught:
        found.row(0)
    assert caught.value.kind == kind
    with pytest.raises(RowError, match="not JSON"):
        found.row(1)


def test_a_missing_column_names_its_flag(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no column picture; it has .*image.*--table.image"):
        VqaTable([table(tmp_path, 2)], TableConfig(image="picture"))
    (tmp_path / "t.txt").write_text("x")
    with pytest.raises(DataError, match="a table is read from"):
        VqaTable([str(tmp_path / "t.txt")], TableConfig())


def test_the_most_frequent_of_several_answers_is_taken(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encoded(picture(0)))
    row = {"image": "a.png", "question": "What?", "answer": ["two", "2", "2"]}
    (tmp_path / "t.jsonl").write_text(json.dumps(row))
    assert VqaTable([str(tmp_path / "t.jsonl")], TableConfig()).row(0).answer == "2"


# ------------------------------------------------------------------------------------------------ plans


def test_frequencies_of_kinds_are_kept_as_far_as_the_rows_allow(tmp_path: Path) -> None:
    found = VqaTable([table(tmp_path, 40)], TableConfig())
    config = PlanConfig(shares={"single_tool": 1, "multi_tool": 1, "multi_crop": 1, "error_recovery": 1, "no_tool": 1})
    assigner = KindAssigner(config)
    assigned = Counter(assigner.assign(found.row(at)) for at in range(40))
    assert assigned == dict.fromkeys(KINDS, 8)
    assert "multi_crop" not in possible_kinds(found.row(1), config)  # no box
    assert "no_tool" not in possible_kinds(found.row(0), config)  # too small to read
    assert possible_kinds(found.row(1), PlanConfig(transforms=())) == ("no_tool",)


def test_crop_windows_are_nested_and_contain_the_box(tmp_path: Path) -> None:
    found = VqaTable([table(tmp_path, 20)], TableConfig())
    for at in range(0, 20, 2):
        row = found.row(at)
        for seed in range(20):
            plan = make_plan(row, "multi_crop", PlanConfig(turned_share=0), random.Random(seed))
            crops = [step.edges for step in plan.steps if step.edges]
            assert 2 <= len(crops) <= 3 and plan.applied == ()
            x = y = 0
            width, height = row.size
            for x1, y1, x2, y2 in crops:
                assert 0 <= x1 < x2 <= width and 0 <= y1 < y2 <= height
                assert (x2 - x1) * (y2 - y1) < 0.75 * width * height
                x, y, width, height = x + x1, y + y1, x2 - x1, y2 - y1
            assert row.box is not None
            assert x <= row.box[0] and y <= row.box[1] and x + width >= row.box[2] and y + height >= row.box[3]


def test_an_error_shifts_later_image_numbers(tmp_path: Path) -> None:
    row = VqaTable([table(tmp_path, 1)], TableConfig()).row(0)
    seen = set()
    for seed in range(60):
        plan = make_plan(row, "error_recovery", PlanConfig(), random.Random(seed))
        failed = [step for step in plan.steps if step.fault]
        repaired = [step for step in plan.steps if step.repairs]
        assert len(failed) == len(repaired) == 1 and failed[0].fault == repaired[0].repairs
        assert failed[0].image_index == repaired[0].image_index
        images = 1
        for step in plan.steps[:-1]:
            assert step.image_index < images
            images += step.fault != "exception"
        assert plan.steps[-1] == PlannedTurn(action="answer", image_index=images - 1)
        seen.add(failed[0].fault)
    assert seen == {"exception", "wrong_turn", "missed_crop"}


def test_the_offline_teacher_depends_on_its_seed(tmp_path: Path) -> None:
    row = VqaTable([table(tmp_path, 1)], TableConfig()).row(0)
    plan = make_plan(row, "multi_tool", PlanConfig(), random.Random(0))

    def turn(seed: int) -> str:
        request = TurnRequest(
            row=row, plan=plan, number=0, images=[row.image()], messages=(), frame=CropFrame(), seed=str(seed)
        )
        return OfflineTeacher().text(request)

    texts = [turn(seed) for seed in range(40)]
    assert texts == [turn(seed) for seed in range(40)]
    assert len(set(texts)) > 30


@pytest.mark.parametrize("coordinates", ["original_px", "model_px", "relative_1000"])
def test_crop_code_in_every_frame_cuts_the_same(coordinates: str) -> None:
    frame = CropFrame(coordinates=coordinates, factor=32, min_pixels=1024, max_pixels=64 * 1024)  # type: ignore[arg-type]
    image = picture(1, (800, 600))
    before, edges = crop_arguments((200, 150, 400, 300), image.size, frame)
    scope = {"image": image}
    exec(f"{before}result = image.crop({edges})", scope)
    assert all(abs(got - wanted) <= 2 for got, wanted in zip(scope["result"].size, (200, 150), strict=True))
    assert bool(before) == (coordinates != "original_px")


# ------------------------------------------------------------------------------------------------ progress


def test_progress_survives_a_cut_line_and_refuses_other_settings(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    with ProgressFile(path, {"seed": 1}) as progress:
        for number in (3, 1, 2):
            progress.add({"number": number, "text": "\u00e4" * number})
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"number": 4, "te')
    with ProgressFile(path, {"seed": 1}) as progress:
        assert len(progress) == 3 and 4 not in progress
        progress.add({"number": 1, "text": "again"})
        assert [(e["number"], e["text"]) for e in progress.entries()] == [
            (1, "again"),
            (2, "\u00e4\u00e4"),
            (3, "\u00e4" * 3),
        ]
    assert path.read_bytes().startswith(whole) and path.read_bytes().count(b"\n") == 5
    with pytest.raises(DataError, match=r"other settings \(seed\)"):
        ProgressFile(path, {"seed": 2})


# ------------------------------------------------------------------------------------------------ RL


def test_rl_tasks_follow_their_plan(tmp_path: Path) -> None:
    out = tmp_path / "rl.parquet"
    report = build_rl(BuildRL(files=[table(tmp_path, 30)], out=out))
    tasks = TaskFiles([str(out)], ReaderConfig())
    assert report["kept"] == len(tasks) == 30 and not tasks.problems.problems
    turned = Counter[str]()
    for at in range(30):
        task = tasks.row(at)
        assert ("crop" in task.required_transforms) == (at % 2 == 0) == (task.box is not None)
        turned.update(name for name in task.required_transforms if name != "crop")
        if task.box is not None:  # the black frame lies where the box says
            x1, y1, x2, y2 = map(round, task.box)
            found = np.asarray(task.images[0].crop((x1, y1, x2, y2)).convert("L")) < 30
            assert found[[0, -1]].all() and found[:, [0, -1]].all() and not found[1:-1, 1:-1].any()
    assert max(turned.values()) - min(turned.values()) <= 1 and 8 <= sum(turned.values()) <= 22


def test_duplicates_and_test_images_are_dropped(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    made = rows(10)
    made[3] = dict(made[2])  # the same image and question
    made[5] = {**made[4], "question": "Another question?"}
    path = tmp_path / "vqa.parquet"
    pq.write_table(pa.Table.from_pylist(made), path)
    bench = tmp_path / "bench.parquet"  # the test set shows row 6 turned
    one = tmp_path / "one.parquet"
    pq.write_table(pa.Table.from_pylist([made[6]]), one)
    build_rl(BuildRL(files=[str(one)], out=bench, plan=TaskPlan(turned_share=1, transforms=("rotate_90",))))
    report = build_rl(BuildRL(files=[str(path)], out=tmp_path / "rl.parquet", test_files=[str(bench)]))
    assert report["kept"] == 8
    assert {name: found["rows"] for name, found in report["dropped"].items()} == {
        "duplicate": ["vqa:3"],
        "in the test files": ["vqa:6"],
    }
    config = BuildRL(files=[str(path)], out=tmp_path / "rl2.parquet", duplicates="picture")
    assert build_rl(config)["dropped"]["duplicate"]["rows"] == ["vqa:3", "vqa:5"]


@pytest.mark.parametrize(
    "columns", [("image", "Question", "Answer"), ("image", "question", "answers"), ("image_1", "q", "a")]
)
@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_images_of_any_test_file_are_kept_out(tmp_path: Path, columns: tuple[str, ...], kind: str) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    made = rows(6)
    path, test = tmp_path / "vqa.parquet", tmp_path / f"test.{kind}"
    pq.write_table(pa.Table.from_pylist(made), path)
    if kind == "parquet":
        pq.write_table(
            pa.Table.from_pylist([{columns[0]: row["image"], columns[1]: "?", columns[2]: ["4"]} for row in made[:4]]),
            test,
        )
    else:
        for number, row in enumerate(made[:4]):
            (tmp_path / f"{number}.png").write_bytes(row["image"]["bytes"])
        test.write_text("".join(json.dumps({columns[0]: f"{number}.png"}) + "\n" for number in range(4)))
    report = build_rl(BuildRL(files=[str(path)], out=tmp_path / "rl.parquet", test_files=[str(test)]))
    assert report["kept"] == 2 and report["dropped"]["in the test files"]["rows"] == [f"vqa:{at}" for at in range(4)]


def test_a_test_file_without_an_image_stops_the_build(tmp_path: Path) -> None:
    test = tmp_path / "test.jsonl"
    test.write_text(json.dumps({"photo": "a.png"}) + "\n")
    with pytest.raises(DataError, match=r"test\.jsonl: no image in it could be read.*--table\.image"):
        build_rl(BuildRL(files=[table(tmp_path, 2)], out=tmp_path / "rl.parquet", test_files=[str(test)]))


@pytest.mark.parametrize("cell", [float("nan"), 7, {"x": 1}])
def test_an_odd_box_cell_raises_a_row_error(cell: Any) -> None:
    if cell != cell:
        assert read_box(cell, (100, 80), "bbox") is None
    else:
        with pytest.raises(RowError, match="is not four numbers"):
            read_box(cell, (100, 80), "bbox")


def test_near_images_are_found_and_others_are_not(tmp_path: Path) -> None:
    known = KnownImages("near")
    for seed in range(20):
        known.add(picture(seed))
    for seed in range(20):
        image = picture(seed)
        coded = Image.open(io.BytesIO(encoded(image.rotate(90, expand=True).resize((120, 160)), "JPEG")))
        assert coded in known
        assert picture(seed + 1000) not in known
    assert Image.new("RGB", (100, 80), "white") not in known


def test_an_image_is_found_in_every_orientation() -> None:
    known = OrientedImages()
    own = known.add(picture(0))
    for turn in Image.Transpose:
        assert known.add(picture(0).transpose(turn)) == own
    halves = picture(0).copy()  # the same grey values at other places
    halves.paste(picture(0).crop((120, 0, 240, 180)), (0, 0))
    halves.paste(picture(0).crop((0, 0, 120, 180)), (120, 0))
    assert known.find(halves) is None and known.find(picture(1)) is None
    assert known.add(halves) != own


def test_tasks_always_or_never_right_are_dropped(tmp_path: Path) -> None:
    rates = tmp_path / "rates.jsonl"
    lines = [{"id": "vqa:0", "right": 0, "scored": 8}, {"id": "vqa:1", "right": 8, "scored": 8}]
    lines += [{"id": "vqa:2", "rate": 0.5}, {"id": "vqa:3", "rate": 1.0}, {"id": "vqa:4", "right": 3, "scored": 7}]
    rates.write_text("\n".join(map(json.dumps, lines)))
    report = build_rl(BuildRL(files=[table(tmp_path, 6)], out=tmp_path / "rl.parquet", pass_rates=rates))
    dropped = {name: found["rows"] for name, found in report["dropped"].items()}
    assert dropped == {"all wrong": ["vqa:0"], "all right": ["vqa:1", "vqa:3"], "no pass rate": ["vqa:5"]}
    tasks = TaskFiles([str(tmp_path / "rl.parquet")], ReaderConfig())
    assert [tasks.row(at).metadata["source_id"] for at in range(2)] == ["vqa:2", "vqa:4"]
    assert tasks.row(1).metadata["pass_rate"] == pytest.approx(3 / 7)
    assert is_informative(1, 2) and not is_informative(2, 2) and not is_informative(0, 2)
    rates.write_text('{"name": "x"}')
    with pytest.raises(DataError, match="line 0"):
        read_pass_rates(rates)


def test_region_questions_do_not_state_the_place(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encoded(picture(0, (1000, 800))))
    regions = [
        {"text": "Exit only", "bbox": [10, 10, 40, 20]},
        {"text": "Mind the gap", "bbox": [100, 200, 130, 212]},
        {"text": "Mind your head", "bbox": [300, 200, 330, 212]},
        {"text": "Large heading text", "bbox": [0, 300, 900, 500]},
    ]
    (tmp_path / "t.jsonl").write_text(json.dumps({"image": "a.png", "regions": regions}))
    out = tmp_path / "rl.parquet"
    build_rl(BuildRL(files=[str(tmp_path / "t.jsonl")], out=out, plan=TaskPlan(region_questions=5, turned_share=0)))
    tasks = TaskFiles([str(out)], ReaderConfig())
    assert len(tasks) == 1  # two texts begin with Mind, one is large
    task = tasks.row(0)
    assert task.box == (10, 10, 40, 20) and task.required_transforms == ("crop",)
    assert '"Exit"' in task.question and "10" not in task.question
    if "How many" in task.question:
        letter = task.question.split('"')[1]
        assert task.ground_truth == str("exit only".count(letter))
    else:
        assert task.ground_truth == "Exit only"
