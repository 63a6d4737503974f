"""Readers: files become tasks and conversations; unusable rows are listed and skipped."""

from __future__ import annotations

import io
import json
import logging
import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_corpus import item
from PIL import Image

from cv_lightning.data import chunks
from cv_lightning.data.readers import TaskFiles, parse_transforms
from cv_lightning.data.rows import ReaderConfig, RowError
from cv_lightning.data.sft_json import ConversationFiles
from cv_lightning.data.writers import write_sft_json, write_task_parquet
from cv_lightning.digits.demonstrations import DemonstrationConfig
from cv_lightning.digits.export import write_digits_parquet, write_digits_sft_json
from cv_lightning.digits.scenes import DigitsConfig
from cv_lightning.digits.sources import DigitDemonstrations, DigitTasks
from cv_lightning.orientations import ORIENTATIONS, turn_image
from cv_lightning.types import DataError, SandboxResult, ToolStatus


def execute(image: Image.Image, code: str) -> SandboxResult:
    """Run a demonstration's own snippet; code from a model never gets here."""
    scope = {"image": image, "Image": Image}
    exec(code, scope)
    return SandboxResult(status=ToolStatus.OK, image=scope["result"])


def png(width: int = 40, height: int = 20, **save: Any) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, **{"format": "PNG", **save})
    return buffer.getvalue()


def row(**changes: Any) -> dict[str, Any]:
    """A usable row; keys of `extra_info` are changed with `extra_KEY`."""
    extra = {"question": "What?", "transform": json.dumps(["crop"]), "bbox": [1.0, 2.0, 11.0, 12.0], "index": 0}
    extra |= {key.removeprefix("extra_"): value for key, value in changes.items() if key.startswith("extra_")}
    made = {
        "data_source": "set",
        "prompt": [{"role": "user", "content": "<image>What?"}],
        "images": [{"bytes": png(), "path": None}],
        "reward_model": {"ground_truth": "4"},
        "extra_info": extra,
    }
    return made | {key: value for key, value in changes.items() if not key.startswith("extra_")}


def parquet(path: Path, rows: list[dict[str, Any]], **write: Any) -> str:
    pq.write_table(pa.Table.from_pylist(rows), path, **write)
    return str(path)


# ------------------------------------------------------------------------------------------------ RL files
def test_a_row_becomes_a_task(tmp_path: Path) -> None:
    task = TaskFiles([parquet(tmp_path / "set.parquet", [row()])], ReaderConfig()).row(0)
    assert (task.id, task.question, task.ground_truth, task.data_source) == ("set:0", "What?", "4", "set")
    assert task.images[0].size == (40, 20)
    assert task.images[0].mode == "RGB"
    assert task.required_transforms == ("crop",)
    assert task.box == (1, 2, 11, 12)
    assert [(m.role, m.content) for m in task.messages] == [("user", "<image>What?")]
    assert task.metadata == {"index": 0}


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_parquet_round_trip_of_digits(tmp_path: Path, split: str) -> None:
    digits = DigitsConfig(seed=5)
    write_digits_parquet(tmp_path / "digits.parquet", digits, split, 14)
    files = TaskFiles([str(tmp_path / "digits.parquet")], ReaderConfig(prompt="own"))
    assert len(files) == 14
    assert not files.problems.problems
    if split == "train":
        made = DigitTasks(digits).batch(0, 14)
        for at, task in enumerate(made):
            read = files.row(at)
            assert read.images[0].tobytes() == task.images[0].tobytes()
            for name in ("question", "ground_truth", "data_source", "required_transforms", "box"):
                assert getattr(read, name) == getattr(task, name), name
            assert {key: read.metadata.get(key) for key in task.metadata} == task.metadata
    else:
        kinds = [files.row(at).metadata["kind"] for at in range(14)]
        assert sorted(kinds.count(kind) for kind in set(kinds)) == [3, 3, 4, 4]


BAD_ROWS = {
    "unreadable image": row(images=[{"bytes": b"<html>404</html>", "path": None}]),
    "unknown transform": row(extra_transform=json.dumps(["rotate_90", "spin"])),
    "box": row(extra_bbox=[1.0, 2.0, 60.0, 12.0]),
    "image marks": row(prompt=[{"role": "user", "content": "What?"}]),
    "no answer": row(reward_model={"ground_truth": None}),
    "no image": row(images=[]),
    "no question": row(prompt=None, extra_question=None),
}


def test_bad_rows_are_counted_listed_and_skipped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [
        row(),
        *BAD_ROWS.values(),
        row(images=[{"bytes": None, "path": "gone.png"}]),
        row(extra_bbox=[9.0, 9, 3, 3]),
    ]
    with caplog.at_level(logging.WARNING):
        files = TaskFiles([parquet(tmp_path / "mixed.parquet", [*rows, row()])], ReaderConfig())
        assert len(files) == 2
    found = {problem.row: problem.kind for problem in files.problems.problems}
    assert found == dict(enumerate(BAD_ROWS, start=1)) | {8: "unreadable image", 9: "box"}
    assert "9 of 11 rows skipped" in caplog.text
    assert "2 x unreadable image, rows 1, 8" in caplog.text
    for hint in ("'spin'", "rotate_90", "images[0]", "extra_info.bbox [1.0, 2.0, 60.0, 12.0]", "40x20", "<image>"):
        assert hint in files.problems.summary()


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (["prompt", "reward_model"], "no column images or image; it has prompt, reward_model"),
        (["images", "reward_model"], "no column prompt or extra_info"),
        (["images", "prompt"], "no column reward_model or extra_info"),
    ],
)
def test_a_missing_column_is_named_with_the_file(tmp_path: Path, columns: list[str], message: str) -> None:
    file = parquet(tmp_path / "thin.parquet", [{key: row()[key] for key in columns}])
    with pytest.raises(DataError, match=f"thin.parquet: {message}"):
        TaskFiles([file], ReaderConfig())


def test_optional_columns_may_be_missing(tmp_path: Path) -> None:
    thin = {key: row()[key] for key in ("images", "prompt", "reward_model")}
    task = TaskFiles([parquet(tmp_path / "thin.parquet", [thin])], ReaderConfig()).row(0)
    assert (task.question, task.data_source, task.required_transforms, task.box) == ("What?", "thin", (), None)
    asked = {"images": row()["images"], "extra_info": {"question": "How many?", "answer": 3}}
    task = TaskFiles([parquet(tmp_path / "asked.parquet", [asked])], ReaderConfig()).row(0)
    assert (task.question, task.ground_truth, task.messages) == ("How many?", "3", ())


def test_missing_files_and_files_of_another_format_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no such file: .*nowhere\.parquet"):
        TaskFiles([str(tmp_path / "nowhere.parquet")], ReaderConfig())
    whole = Path(parquet(tmp_path / "cut.parquet", [row()])).read_bytes()
    (tmp_path / "cut.parquet").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"cut\.parquet: cannot be read as Parquet"):
        TaskFiles([str(tmp_path / "cut.parquet")], ReaderConfig())


def test_truncated_pixels_are_skipped_when_read(tmp_path: Path) -> None:
    cut = row(images=[{"bytes": png(200, 200)[:3000], "path": None}])
    rows = [cut, row(reward_model={"ground_truth": "7"}), cut]
    files = TaskFiles([parquet(tmp_path / "cut.parquet", rows)], ReaderConfig())
    assert len(files) == 2, "the first row was tried when the file was opened"
    assert files.row(0).ground_truth == "7"
    with pytest.raises(RowError, match="truncated"):  # which an evaluation leaves out: no row counts twice
        files.row(1)
    assert [(p.row, p.kind) for p in files.problems.problems] == [(0, "unreadable image"), (2, "unreadable image")]
    assert files.take([0, 1, 2], 2).ground_truth == "7", "training takes a neighbour"


@pytest.mark.parametrize(("given", "read"), [("rotate_-90", ("rotate_270",)), ("rotate_450", ("rotate_90",)),
                                             ("rotate_0", ()), ("rotate_45", ("rotate_45",))])  # fmt: skip
def test_rotations_are_normalised(given: str, read: tuple[str, ...]) -> None:
    assert parse_transforms([given]) == read


def test_images_by_path_and_turned_by_exif(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.jpg").write_bytes(png(40, 20, format="JPEG", exif=exif))
    made = row(images=[{"bytes": None, "path": "a.jpg"}], extra_bbox=[0.0, 20.0, 20.0, 40.0])
    file = parquet(tmp_path / "set.parquet", [made])
    task = TaskFiles([file], ReaderConfig(image_folder=str(tmp_path / "pictures"))).row(0)
    assert task.images[0].size == (20, 40)
    assert task.box == (0, 20, 20, 40)


@pytest.mark.parametrize("names", [[name] for name in ORIENTATIONS] + [["rotate_90", "crop", "flip_vertical"]])
def test_a_box_of_the_upright_image_is_mapped_to_the_given_one(tmp_path: Path, names: list[str]) -> None:
    upright = Image.new("RGB", (40, 20), "white")
    upright.paste("black", (3, 4, 13, 9))
    image = upright
    for name in names:
        image = turn_image(image, name) if name in ORIENTATIONS else image
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    made = row(images=[{"bytes": buffer.getvalue(), "path": None}], extra_bbox=[3.0, 4.0, 13.0, 9.0])
    made["extra_info"]["transform"] = json.dumps(names)
    file = parquet(tmp_path / "set.parquet", [made])
    task = TaskFiles([file], ReaderConfig(bbox_frame="upright")).row(0)
    dark = np.argwhere(np.asarray(task.images[0])[..., 0] == 0)
    (top, left), (bottom, right) = dark.min(0), dark.max(0) + 1
    assert task.box == (left, top, right, bottom)


@pytest.fixture
def chunk_reads(monkeypatch: pytest.MonkeyPatch) -> list[chunks.Chunk]:
    """The parts of files that were read from disk."""
    found: list[chunks.Chunk] = []
    read = chunks.ParquetRows._read

    def noted(rows: chunks.ParquetRows, chunk: chunks.Chunk) -> Any:
        found.append(chunk)
        return read(rows, chunk)

    monkeypatch.setattr(chunks.ParquetRows, "_read", noted)
    return found


def test_each_part_of_a_file_is_read_once_an_epoch(tmp_path: Path, chunk_reads: list[chunks.Chunk]) -> None:
    rows = [row(reward_model={"ground_truth": str(at)}) for at in range(48)]
    files = TaskFiles([parquet(tmp_path / "set.parquet", rows, row_group_size=4)], ReaderConfig())
    order = files.order(random.Random(0))
    assert sorted(order) == list(range(48))
    assert order != files.order(random.Random(1))
    assert len({at // 4 for at in order[:8]}) > 2  # several row groups are mixed
    chunk_reads.clear()
    read = files.take_many([(order, at) for at in range(48)])
    assert [task.ground_truth for task in read] == [str(at) for at in order]
    assert len(chunk_reads) <= 12


def test_a_large_row_group_is_read_in_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk_reads: list[chunks.Chunk]
) -> None:
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 10 * len(png()))
    rows = [row(reward_model={"ground_truth": str(at)}) for at in range(53)]
    file = parquet(tmp_path / "set.parquet", rows, use_dictionary=False)
    files = TaskFiles([file], ReaderConfig())
    assert len(files.rows.chunks) > 5
    order = files.order(random.Random(0))
    chunk_reads.clear()
    assert [files.take(order, at).ground_truth for at in range(53)] == [str(at) for at in order]
    assert len(chunk_reads) in (len(files.rows.chunks) - 1, len(files.rows.chunks))
    scattered = random.Random(1).sample(range(53), 53)
    assert [files.read(at).ground_truth for at in scattered] == [str(at) for at in scattered]


@pytest.mark.parametrize(
    ("given", "names"),
    [
        (None, ()),
        ([], ()),
        (["crop", "rotate_90"], ("crop", "rotate_90")),
        ({"rotate_90": None, "flip_vertical": True, "crop": False}, ("flip_vertical",)),
        ('["crop"]', ("crop",)),
        ('{"rotate_270": 1}', ("rotate_270",)),
        ("rotate_90, crop", ("rotate_90", "crop")),
        (["rotate_45"], ("rotate_45",)),
    ],
)
def test_transforms_are_read_in_every_notation(given: Any, names: tuple[str, ...]) -> None:
    assert parse_transforms(given) == names


@pytest.mark.parametrize("given", ["[not json", ["rotate_left"], "upside down"])
def test_invalid_transforms_name_their_key(given: Any) -> None:
    with pytest.raises(RowError, match=r"extra_info\.transform"):
        parse_transforms(given)


# ------------------------------------------------------------------------------------------------ SFT files
def sft_file(folder: Path, items: Any) -> str:
    for name in ("a.png", "b.png"):
        (folder / name).write_bytes(png())
    (folder / "sft.json").write_text(json.dumps(items), encoding="utf-8")
    return str(folder / "sft.json")


def test_an_item_becomes_a_conversation(tmp_path: Path) -> None:
    conversation = ConversationFiles([sft_file(tmp_path, [item(system="Be brief.")])], ReaderConfig()).row(0)
    first, last = conversation.turns
    assert [m.role for m in conversation.task.messages] == ["system", "user"]
    assert (conversation.task.question, conversation.task.ground_truth) == ("What?", "4")
    assert (first.call.code, first.call.image_index, first.response_text) == ("result = image", 0, "<image>Here.")
    assert first.result_image.size == (40, 20)
    assert last.call is None
    assert last.text == "<answer>4</answer>"


@pytest.mark.parametrize("mark", [{"loss": False}, {"weight": 0}])
def test_a_turn_that_carries_no_loss(tmp_path: Path, mark: dict[str, Any]) -> None:
    marked = item()
    marked["conversations"][1] |= mark
    conversation = ConversationFiles([sft_file(tmp_path, [marked])], ReaderConfig()).row(0)
    assert [turn.learn for turn in conversation.turns] == [False, True]
    write_sft_json(tmp_path / "again.json", [conversation])
    again = ConversationFiles([str(tmp_path / "again.json")], ReaderConfig()).row(0)
    assert [turn.learn for turn in again.turns] == [False, True]


def test_sft_json_round_trip_of_digits(tmp_path: Path) -> None:
    source = DigitDemonstrations(DigitsConfig(), DemonstrationConfig(tool_share=0.7), execute)
    write_digits_sft_json(tmp_path / "digits.json", source, 12)
    files = ConversationFiles([str(tmp_path / "digits.json")], ReaderConfig(prompt="own"))
    assert len(files) == 12
    for at, made in enumerate(source.batch(0, 12)):
        read = files.row(at)
        assert [turn.text for turn in read.turns] == [turn.text for turn in made.turns]
        assert [turn.call for turn in read.turns] == [turn.call for turn in made.turns]
        for a, b in zip(read.turns, made.turns, strict=True):
            assert (a.result_image and a.result_image.tobytes()) == (b.result_image and b.result_image.tobytes())
        assert read.task.images[0].tobytes() == made.task.images[0].tobytes()


@pytest.mark.parametrize(
    ("text", "message"), [("{", "cannot be read as JSON"), ("{}", "a list of conversations is wanted")]
)
def test_a_file_without_a_list_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(DataError, match=rf"x\.json.*{message}"):
        ConversationFiles([str(tmp_path / "x.json")], ReaderConfig())


def test_a_call_with_invalid_json_is_kept(tmp_path: Path) -> None:
    turns = item()["conversations"]
    broken = [
        turns[0],
        {"from": "gpt", "value": "<tool_call>{oops</tool_call>"},
        {"from": "tool", "value": "Error"},
        turns[3],
    ]
    made = item(conversations=broken, images=["a.png"])
    first = ConversationFiles([sft_file(tmp_path, [made])], ReaderConfig()).row(0).turns[0]
    assert (first.call.code, first.result_image, first.response_text) == ("{oops", None, "Error")


def test_tasks_without_metadata_can_be_written(tmp_path: Path) -> None:
    task = TaskFiles([parquet(tmp_path / "set.parquet", [row()])], ReaderConfig()).row(0)
    write_task_parquet(tmp_path / "again.parquet", [task], "test")
    again = TaskFiles([str(tmp_path / "again.parquet")], ReaderConfig()).row(0)
    assert again.messages == task.messages
    assert again.metadata == {"index": 0, "split": "test"}


# ------------------------------------------------------------------------------------------------ odd but plausible
def test_turns_in_formats_of_other_tools(tmp_path: Path) -> None:
    call = {"name": "code_image_tool", "arguments": {"code": "result = image", "image_index": 0}}
    listed = item()
    listed["conversations"][1]["value"] = [{"type": "text", "text": listed["conversations"][1]["value"]}]
    bare = item()
    bare["conversations"][1] = {"from": "function_call", "value": json.dumps(call)}
    openai = item()
    openai["conversations"][1] |= {"value": None, "tool_calls": [{"function": call}]}
    silent = item()
    silent["conversations"][1]["value"] = "<think>I shall turn it.</think>"
    files = ConversationFiles([sft_file(tmp_path, [listed, bare, openai, silent])], ReaderConfig())
    assert files.row(0).turns[0].text == item()["conversations"][1]["value"]
    assert files.row(1).turns[0].text == f"<tool_call>\n{json.dumps(call)}\n</tool_call>"
    assert all(files.row(at).turns[0].call.code == "result = image" for at in range(2))
    assert len(files) == 2, "turns without text or call are bad rows"
    assert [(p.row, p.kind) for p in files.problems.problems] == [(2, "no text"), (3, "no tool call")]
    assert "between <tool_call> tags" in files.problems.problems[0].message


def test_unicode_line_separators_do_not_split_json_lines(tmp_path: Path) -> None:
    said = item()
    said["conversations"][0]["value"] = "<image>What\u2028is\u0085it?"
    path = Path(sft_file(tmp_path, []))
    lines = [json.dumps(said, ensure_ascii=False)] * 3
    path.with_suffix(".jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    assert len(ConversationFiles([str(path.with_suffix(".jsonl"))], ReaderConfig())) == 3


@pytest.mark.parametrize(
    ("truth", "further", "accepted"),
    [
        ("12", "Paris", ["12", "Paris"]),
        ("12", '["12", "13"]', ["12", "13"]),
        ("12", ["twelve", 12], ["12", "twelve"]),
        ("12", 5, ["12", "5"]),
        ("12", None, ["12"]),
        (["blue", "navy"], None, ["blue", "navy"]),
        ([3, 4], None, ["[3, 4]"]),
    ],
)
def test_several_accepted_answers_are_read(tmp_path: Path, truth: Any, further: Any, accepted: list[str]) -> None:
    extra = json.dumps({"question": "Which?", "accepted_answers": further})
    one = row(reward_model=json.dumps({"ground_truth": truth})) | {"extra_info": extra}
    assert TaskFiles([parquet(tmp_path / "set.parquet", [one])], ReaderConfig()).row(0).accepted == accepted


def test_invalid_accepted_answers_make_a_bad_row(tmp_path: Path) -> None:
    extra = json.dumps({"question": "Which?", "accepted_answers": [{"text": "12"}]})
    path = parquet(tmp_path / "set.parquet", [row() | {"extra_info": extra}, row() | {"extra_info": "{}"}])
    files = TaskFiles([path], ReaderConfig())
    assert len(files) == 1 and files.problems.problems[0].kind == "accepted answers"


def test_metadata_that_fits_no_columns_is_written_as_text(tmp_path: Path) -> None:
    extras = [
        {"question": "Which?", "level": 1, "opts": {}},
        {"question": "Which?", "level": "two", "opts": {"a": [1, "b"]}},
    ]
    path = parquet(tmp_path / "set.parquet", [row() | {"extra_info": json.dumps(extra)} for extra in extras])
    tasks = [TaskFiles([path], ReaderConfig()).row(at) for at in range(2)]
    write_task_parquet(tmp_path / "new/again.parquet", tasks, "test")
    again = TaskFiles([str(tmp_path / "new/again.parquet")], ReaderConfig())
    assert [again.row(at).metadata["level"] for at in range(2)] == [1, "two"]
    assert again.row(1).metadata["opts"] == {"a": [1, "b"]}
