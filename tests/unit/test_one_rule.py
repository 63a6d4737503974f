"""Rules that all readers share: image cells, boxes, calls and answers of a turn."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_readers import item, png, row, sft_file

from cv_lightning.agent.protocol import parse_turn
from cv_lightning.data.benchmarks import task_files
from cv_lightning.data.boxes import parse_box
from cv_lightning.data.readers import TaskFiles
from cv_lightning.data.rows import ReaderConfig, RowError
from cv_lightning.data.sft_json import ConversationFiles
from cv_lightning.factory.vqa_table import TableConfig, VqaTable

CODED = base64.b64encode(png()).decode()


@pytest.mark.parametrize("cell", [CODED, f"data:image/png;base64,{CODED}", "a.png", "file://{}/a.png"])
def test_every_reader_decodes_an_image_cell_equally(tmp_path: Path, cell: str) -> None:
    sft_file(tmp_path, [])
    cell = cell.replace("{}", str(tmp_path))
    pq.write_table(pa.Table.from_pylist([row(images=[cell])]), tmp_path / "rl.parquet")
    plain = {"question": "What?", "answer": "4", "image": cell}
    (tmp_path / "plain.jsonl").write_text(json.dumps(plain) + "\n")
    (tmp_path / "table.csv").write_text(f'question,answer,image\nWhat?,4,"{cell}"\n')
    conversation = sft_file(tmp_path, [item(images=[cell, cell])])
    pixels = {
        TaskFiles([tmp_path / "rl.parquet"], ReaderConfig()).row(0).images[0].tobytes(),
        task_files([tmp_path / "plain.jsonl"], ReaderConfig(format="fields")).row(0).images[0].tobytes(),
        ConversationFiles([conversation], ReaderConfig()).row(0).task.images[0].tobytes(),
        VqaTable([str(tmp_path / "plain.jsonl")], TableConfig()).row(0).image().tobytes(),
        VqaTable([str(tmp_path / "table.csv")], TableConfig()).row(0).image().tobytes(),
    }
    assert len(pixels) == 1


def test_long_text_that_is_neither_a_file_nor_base64_says_so(tmp_path: Path) -> None:
    (tmp_path / "plain.jsonl").write_text(json.dumps({"question": "What?", "answer": "4", "image": "no! " * 100}))
    with pytest.raises(RowError, match="400 characters that is neither a file nor base64"):
        VqaTable([str(tmp_path / "plain.jsonl")], TableConfig()).row(0)
    deep = tmp_path.joinpath(*(["a" * 60] * 5))
    deep.mkdir(parents=True)
    (deep / "long.png").write_bytes(png())
    name = str((deep / "long.png").relative_to(tmp_path))
    assert len(name) > 256
    (tmp_path / "plain.jsonl").write_text(json.dumps({"question": "What?", "answer": "4", "image": name}))
    assert VqaTable([str(tmp_path / "plain.jsonl")], TableConfig()).row(0).size == (40, 20)


@pytest.mark.parametrize(
    "value", [[1, 2, 3, 4], [[1, 2, 3, 4]], "[1, 2, 3, 4]", "1, 2, 3, 4", "(1 2 3 4)", [1.0, "2", 3, 4]]
)
def test_boxes_are_read_in_every_notation(value: object) -> None:
    assert parse_box(value, "bbox") == (1, 2, 3, 4)


@pytest.mark.parametrize("value", [None, float("nan"), [], [None] * 4, "", "null"])
def test_missing_boxes_are_read_in_every_notation(value: object) -> None:
    assert parse_box(value, "bbox") is None


@pytest.mark.parametrize("value", [[1, 2, 3], 5, "here", {"x": 1}, [1, 2, 3, float("inf")], [1, 2, 3, None]])
def test_invalid_boxes_name_their_key(value: object) -> None:
    with pytest.raises(RowError, match="bbox"):
        parse_box(value, "bbox")


CALL = '<tool_call>{"name": "code_image_tool", "arguments": {"code": "result = image", "image_index": 0}}</tool_call>'


@pytest.mark.parametrize(
    "text",
    [
        f"<think>a</think>{CALL}",
        CALL.replace("result = image", "x = '</tool_call>'; result = image"),
        f"<think>not {CALL.replace('result = image', 'wrong')}</think>{CALL}",
        '<tool_call>{"name": "code_image_tool", "arguments": "{\\"code\\": \\"result = image\\"}"}</tool_call>',
    ],
)
def test_a_demonstration_has_the_call_that_the_agent_would_run(tmp_path: Path, text: str) -> None:
    turns = item()["conversations"]
    turns[1]["value"] = text
    conversation = ConversationFiles([sft_file(tmp_path, [item(conversations=turns)])], ReaderConfig()).row(0)
    wanted = parse_turn(text).call
    assert wanted is not None and conversation.turns[0].call == wanted


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<think>or <answer>9</answer>?</think><answer>3</answer>", "3"),
        ("<answer>3</answer><think>or <answer>9</answer>?</think>", "3"),
    ],
)
def test_a_demonstration_has_the_answer_that_the_agent_would_give(tmp_path: Path, text: str, answer: str) -> None:
    turns = item()["conversations"]
    turns[3]["value"] = text
    conversation = ConversationFiles([sft_file(tmp_path, [item(conversations=turns)])], ReaderConfig()).row(0)
    assert conversation.task.ground_truth == parse_turn(text).answer == answer
