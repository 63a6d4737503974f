"""Reads the records of an offline W&B run, whose file has LevelDB's log format."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto.wandb_internal_pb2 import Record

BLOCK, HEADER = 32768, 7
FULL, LAST = 1, 4


def records(path: Path) -> list[Record]:
    """Records of one `.wandb` file of a finished run; W&B's service may still be writing the last of them."""
    deadline = time.monotonic() + 30
    while True:
        found = list(_records(path))
        if any(record.WhichOneof("record_type") == "exit" for record in found):
            return found
        assert time.monotonic() < deadline, f"{path} was never finished"
        time.sleep(0.1)


def _records(path: Path) -> Iterator[Record]:
    data = path.read_bytes()
    assert data[:4] in (b":W&B", b"")
    place, whole = HEADER, b""
    while place + HEADER <= len(data):
        if BLOCK - place % BLOCK < HEADER:
            place += BLOCK - place % BLOCK  # padding
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + HEADER])
        place += HEADER
        if place + length > len(data):
            return
        whole += data[place : place + length]
        place += length
        if kind in (FULL, LAST):
            yield Record.FromString(whole)
            whole = b""


def rows(path: Path) -> list[dict[str, Any]]:
    """The logged rows."""
    return [
        {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        for record in records(path)
        if record.WhichOneof("record_type") == "history"
    ]


def config(path: Path) -> dict[str, Any]:
    """The run's config, updates merged."""
    found: dict[str, Any] = {}
    for record in records(path):
        kind = record.WhichOneof("record_type")
        updates = record.config.update if kind == "config" else record.run.config.update if kind == "run" else ()
        for item in updates:
            found[item.key or "/".join(item.nested_key)] = json.loads(item.value_json)
    return found
