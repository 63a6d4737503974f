"""Hostile files: every bad row is counted under its kind with its number, and training uses the rest."""

from __future__ import annotations

import json
import os
import random
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow as pa
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
from hypothesis import given, settings
from hypothesis import strategies as st

from cv_lightning.data.readers import NEEDED_COLUMNS, ParquetRows, TaskFiles, task_of_row
from cv_lightning.data.rows import ReaderConfig, RowError
from cv_lightning.data.sft_json import ConversationFiles, conversation_of_item
from cv_lightning.data.sources import RowStream
from cv_lightning.types import DataError


def kinds(files: TaskFiles | ConversationFiles) -> dict[int, str]:
    return {problem.row: problem.kind for problem in files.problems.problems}


def test_training_skips_every_kind_of_bad_row(tmp_path: Path) -> None:
    good = [row(reward_model={"ground_truth": f"good {at}"}) for at in range(6)]
    rows = [*good[:3], *(bad for _, bad in BAD_TASKS.values()), *good[3:]]
    files = TaskFiles([write_tasks(tmp_path / "set.parquet", rows, row_group_size=5)], ReaderConfig())
    source = RowStream(files, seed=0)
    tasks = [task for step in range(len(rows)) for task in source.batch(step, 4)]
    assert len(tasks) == 4 * len(rows)
    assert {task.ground_truth for task in tasks} == {f"good {at}" for at in range(6)}
    assert kinds(files) == {at: kind for at, (kind, _) in enumerate(BAD_TASKS.values(), start=3)}


def test_the_replacement_of_a_bad_row_depends_on_the_step_only(tmp_path: Path) -> None:
    rows = [row(b"<html>") if at % 3 else row(reward_model={"ground_truth": str(at)}) for at in range(40)]
    path = write_tasks(tmp_path / "set.parquet", rows, row_group_size=7)

    def step(number: int, rank: int = 0, world_size: int = 1, num_threads: int = 0) -> list[str]:
        files = TaskFiles([path], ReaderConfig(num_threads=num_threads))
        return [task.ground_truth for task in RowStream(files, seed=3).batch(number, 8, rank, world_size)]

    assert step(7) == step(7) == step(7, num_threads=1)
    assert [x for pair in zip(step(7, 0, 2), step(7, 1, 2), strict=True) for x in pair] == step(7)
    assert len(set(step(7))) > 2  # not all replaced by one


def test_odd_images_are_read(tmp_path: Path) -> None:
    rows = [made for _, made in ODD_TASKS.values()]
    files = TaskFiles([write_tasks(tmp_path / "set.parquet", rows)], ReaderConfig())
    read = dict(zip(ODD_TASKS, (files.row(at) for at in range(len(rows))), strict=True))
    assert len(files) == len(rows)
    assert not kinds(files)
    assert all(task.images[0].mode == "RGB" for task in read.values())
    assert read["EXIF"].images[0].size == (32, 48)
    low, high = (read["16 bits"].images[0].getpixel(at)[0] for at in ((0, 0), (47, 31)))
    assert (low, high) == (0, 255)


def test_a_damaged_row_group_excludes_only_its_rows(tmp_path: Path) -> None:
    rows = [row(encoded(picture(seed=at)), reward_model={"ground_truth": str(at)}) for at in range(12)]
    path = write_tasks(tmp_path / "set.parquet", rows, row_group_size=4)
    damage_middle(Path(path), group=1)
    files = TaskFiles([path], ReaderConfig())
    answers = {task.ground_truth for step in range(3) for task in RowStream(files, seed=0).batch(step, 4)}
    assert answers <= {"0", "1", "2", "3", "8", "9", "10", "11"}
    assert len(files) == 8
    assert kinds(files) == dict.fromkeys(range(4, 8), "unreadable rows")


def test_a_truncated_file_is_an_error_that_names_it(tmp_path: Path) -> None:
    good, cut = (write_tasks(tmp_path / f"{name}.parquet", [row()]) for name in ("good", "cut"))
    Path(cut).write_bytes(Path(cut).read_bytes()[:-100])
    with pytest.raises(DataError, match=r"cut\.parquet: cannot be read as Parquet .* is it cut off"):
        TaskFiles([good, cut], ReaderConfig())


def test_each_file_must_have_a_usable_row(tmp_path: Path) -> None:
    good = write_tasks(tmp_path / "good.parquet", [row()])
    bad = write_tasks(tmp_path / "bad.parquet", [row(b"<html>"), row(reward_model={"ground_truth": None})])
    with pytest.raises(DataError, match=r"(?s)bad\.parquet: no usable row.*1 x unreadable image.*1 x no answer"):
        TaskFiles([good, bad], ReaderConfig())


def test_files_with_different_columns_are_read_together(tmp_path: Path) -> None:
    full = write_tasks(tmp_path / "full.parquet", [row()])
    thin = write_tasks(tmp_path / "thin.parquet", [{key: row()[key] for key in ("images", "prompt", "reward_model")}])
    texts = {key: json.dumps(row()[key]) for key in ("prompt", "reward_model", "extra_info")}
    nested = write_tasks(tmp_path / "texts.parquet", [{"image": row()["images"][0], **texts}])
    other = row(extra_bbox=None, extra_bbox_2d=[[1, 2, 11, 12]], extra_transform=["crop"])
    boxed = write_tasks(tmp_path / "boxed.parquet", [other])
    tasks = RowStream(TaskFiles([full, thin, nested, boxed], ReaderConfig()), seed=0).batch(0, 4)
    found = {task.id: (task.box, task.required_transforms) for task in tasks}
    same = ((1.0, 2.0, 11.0, 12.0), ("crop",))
    assert found == {"full:0": same, "thin:0": (None, ()), "texts:0": same, "boxed:0": same}


def test_files_of_one_name_keep_their_ids_apart(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    paths = [write_tasks(tmp_path / folder / "train.parquet", [row()]) for folder in ("a", "b")]
    files = TaskFiles(paths, ReaderConfig())
    assert [files.row(at).id for at in range(2)] == ["a.train:0", "b.train:0"]


@pytest.mark.parametrize(("system", "roles"), [("given", ["system", "user"]), ("own", ["user"])])
def test_the_system_message_is_kept_or_replaced(tmp_path: Path, system: Any, roles: list[str]) -> None:
    prompt = [{"role": "system", "content": "Old."}, {"role": "user", "content": "<image>What?"}]
    path = write_tasks(tmp_path / "set.parquet", [row(prompt=prompt)])
    assert [m.role for m in TaskFiles([path], ReaderConfig(system=system)).row(0).messages] == roles
    sft = write_items(tmp_path, [item(system="Old.")])
    assert [m.role for m in ConversationFiles([sft], ReaderConfig(system=system)).row(0).task.messages] == roles


def test_bad_conversations_are_listed_and_skipped(tmp_path: Path) -> None:
    path = write_items(tmp_path, [item(), *(bad for _, bad in BAD_ITEMS.values()), item()])
    files = ConversationFiles([path], ReaderConfig())
    source = RowStream(files, seed=1)
    ids = {one.task.id for step in range(11) for one in source.batch(step, 4)}
    assert ids == {"sft:0", f"sft:{len(BAD_ITEMS) + 1}"}
    assert kinds(files) == {at: kind for at, (kind, _) in enumerate(BAD_ITEMS.values(), start=1)}


def test_conversations_in_other_formats(tmp_path: Path) -> None:
    roles = {"human": "user", "gpt": "assistant", "tool": "tool"}
    chat = [{"role": roles[turn["from"]], "content": turn["value"]} for turn in item()["conversations"]]
    made = {"messages": [{"role": "system", "content": "Be brief."}, *chat], "images": item()["images"]}
    write_items(tmp_path, [])
    lines = [json.dumps(item()), "{broken", json.dumps(made)]
    (tmp_path / "sft.jsonl").write_text("\n".join(lines), encoding="utf-8")
    files = ConversationFiles([str(tmp_path / "sft.jsonl")], ReaderConfig())
    assert len(files) == 2
    assert kinds(files) == {1: "conversations"}
    first, last = files.row(0), files.row(1)
    assert [turn.text for turn in first.turns] == [turn.text for turn in last.turns]
    assert [m.role for m in last.task.messages] == ["system", "user"]


KEYS = "bytes path role content from value bbox transform question answer ground_truth".split()
SCALARS = st.none() | st.booleans() | st.integers(-5, 5) | st.floats() | st.text(max_size=8) | st.binary(max_size=8)
JSON = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4),
    max_leaves=8,
)
COLUMNS = st.sampled_from(["prompt", "images", "reward_model", "extra_info", "data_source"])


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(COLUMNS, JSON, min_size=1, max_size=3))
def test_any_row_is_read_or_raises_a_row_error(changes: dict[str, Any]) -> None:
    try:
        task_of_row({**row(), **changes}, Path("set.parquet"), 0, ReaderConfig())
    except RowError as error:
        assert error.kind
        assert str(error)


@settings(max_examples=300, deadline=None)
@given(st.one_of(JSON, st.dictionaries(st.sampled_from(["conversations", "images", "system"]), JSON)))
def test_any_item_is_read_or_raises_a_row_error(made: Any) -> None:
    try:
        conversation_of_item(made, Path("sft.json"), 0, ReaderConfig())
    except RowError as error:
        assert error.kind


def test_memory_stays_with_the_chunks(tmp_path: Path) -> None:
    """Reading an epoch of one large row group keeps only its chunks in memory."""
    noise = [os.urandom(400_000) for _ in range(100)]
    rows = [row(images=[{"bytes": noise[at % 100], "path": None}]) for at in range(1000)]
    path = write_tasks(tmp_path / "large.parquet", rows, use_dictionary=False)
    del rows
    reader = ParquetRows([path], NEEDED_COLUMNS)
    # What is allocated, not what is resident: allocators return memory to the system when they like.
    held: list[int] = []
    tracemalloc.start()
    try:
        for index in reader.order(random.Random(0)):
            assert len(reader.row(index)["images"][0]["bytes"]) == 400_000
            held.append(pa.total_allocated_bytes() + tracemalloc.get_traced_memory()[0])
    finally:
        tracemalloc.stop()
    assert len(reader.chunks) > 20
    # All chunks that are kept are there by row 400. The page that is read, here all rows, is held to its end.
    assert max(held[400:]) - held[400] < 50e6  # of 240 MB that are read after it
