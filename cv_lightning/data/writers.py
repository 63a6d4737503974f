"""Writes tasks as RL Parquet and conversations as SFT JSON, the formats that `readers` and `sft_json` read."""

from __future__ import annotations

import io
import json
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from cv_lightning.data.conversations import Conversation, DemoTurn
from cv_lightning.data.readers import IMAGE_MARK
from cv_lightning.files import whole_file, write_text
from cv_lightning.types import Task

ROWS_PER_GROUP = 256
"""Rows of a row group, the unit that a reader or writer holds in memory."""
IMAGES = pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())]))


def write_task_parquet(path: str | Path, tasks: Iterable[Task], split: str) -> None:
    """Write tasks to an RL file, images as PNG bytes.

    Images are kept in an unnamed file until the last task, after which the columns of `extra_info` are known.

    Args:
        path: File to write; it appears complete or not at all.
        tasks: Tasks, consumed one by one; their `metadata` goes into `extra_info`.
        split: Value of `extra_info.split`.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    sizes: list[list[int]] = []
    with tempfile.TemporaryFile(dir=path.parent) as stored:
        for index, task in enumerate(tasks):
            rows.append(_row(task, split, index))
            sizes.append([stored.write(_png(image)) for image in task.images])
        schema = _schema(rows).append(pa.field("images", IMAGES))
        stored.seek(0)
        with whole_file(path) as temporary, pq.ParquetWriter(temporary, schema) as writer:
            for start in range(0, len(rows), ROWS_PER_GROUP):
                some = slice(start, start + ROWS_PER_GROUP)
                cells = [[{"bytes": stored.read(size), "path": None} for size in row] for row in sizes[some]]
                table = [row | {"images": images} for row, images in zip(rows[some], cells, strict=True)]
                writer.write_table(pa.Table.from_pylist(table, schema))


def _schema(rows: list[dict[str, Any]]) -> pa.Schema:
    """Schema of the rows; `extra_info` becomes JSON text if a key has values of different types."""
    try:
        return pa.Table.from_pylist(rows).schema
    except (pa.ArrowException, NotImplementedError):
        for row in rows:
            row["extra_info"] = json.dumps(row["extra_info"], ensure_ascii=False, default=str)
        return pa.Table.from_pylist(rows).schema


def _row(task: Task, split: str, index: int) -> dict[str, Any]:
    prompt = [{"role": message.role, "content": message.content} for message in task.messages]
    if not prompt:
        prompt = [{"role": "user", "content": IMAGE_MARK * len(task.images) + task.question}]
    return {
        "data_source": task.data_source,
        "prompt": prompt,
        "reward_model": {"ground_truth": task.ground_truth, "style": "rule"},
        "extra_info": {
            **task.metadata,
            "question": task.question,
            "answer": task.ground_truth,
            "transform": list(task.required_transforms),
            "bbox": list(task.box) if task.box else None,
            "index": index,
            "split": split,
        },
    }


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()


def write_sft_json(path: str | Path, conversations: Iterable[Conversation]) -> None:
    """Write conversations to an SFT file, images into a folder beside it.

    Args:
        path: File to write, complete or not at all; the folder's name is its stem and `_images`.
        conversations: Conversations in the order of the file.
    """
    path = Path(path)
    folder = path.with_name(f"{path.stem}_images")
    folder.mkdir(parents=True, exist_ok=True)
    items = [_item(conversation, index, folder) for index, conversation in enumerate(conversations)]
    write_text(path, json.dumps(items, indent=1, ensure_ascii=False))


def _item(conversation: Conversation, index: int, folder: Path) -> dict[str, Any]:
    task = conversation.task
    images = list(task.images)
    user = next((m.content for m in task.messages if m.role == "user"), IMAGE_MARK * len(images) + task.question)
    turns: list[dict[str, Any]] = [{"from": "human", "value": user}]
    for turn in conversation.turns:
        turns.append({"from": "gpt", "value": turn.text, **({} if turn.learn else {"loss": False})})
        images += turn.images
        if turn.is_answered:
            turns.append(tool_entry(turn))
    names = []
    for number, image in enumerate(images):
        file = folder / f"{index}_{number}.png"
        image.save(file)
        names.append(f"{folder.name}/{file.name}")
    item: dict[str, Any] = {"conversations": turns, "images": names}
    system = next((m.content for m in task.messages if m.role == "system"), None)
    return item if system is None else {**item, "system": system}


def tool_entry(turn: DemoTurn) -> dict[str, str]:
    """The tool's turn of an SFT item.

    Args:
        turn: The assistant turn with the response.
    """
    marks = IMAGE_MARK * len(turn.images)
    if turn.response_text:
        return {"from": "tool", "value": ("" if IMAGE_MARK in turn.response_text else marks) + turn.response_text}
    said = {} if turn.said is None else {"text": turn.said}
    return {"from": "tool", "value": marks, **said, **({"error": turn.error} if turn.error else {})}
