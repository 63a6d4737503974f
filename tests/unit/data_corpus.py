"""Hostile rows, generated: each case has the kind of problem (or note) under which its row must be counted."""

from __future__ import annotations

import io
import json
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image


def encoded(image: Image.Image, kind: str = "PNG", **save: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **save)
    return buffer.getvalue()


def picture(width: int = 48, height: int = 32, seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def huge_png(side: int = 30_000) -> bytes:
    """A real PNG of 30,000x30,000 one-bit pixels, a few kilobytes long."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    line = bytes(1 + (side + 7) // 8)
    packer = zlib.compressobj(9)
    data = b"".join(packer.compress(line * 1000) for _ in range(side // 1000)) + packer.flush()
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def row(image: bytes | str | None = None, **changes: Any) -> dict[str, Any]:
    """A row with these changes; keys of `extra_info` are changed with `extra_KEY`."""
    is_path = isinstance(image, str)
    extra = {
        "question": "What?",
        "transform": json.dumps(["crop"]),
        "bbox": [1.0, 2.0, 11.0, 12.0],
        "index": None,
        "split": None,
    }
    extra |= {key.removeprefix("extra_"): value for key, value in changes.items() if key.startswith("extra_")}
    made = {
        "data_source": "set",
        "prompt": [{"role": "user", "content": "<image>What?"}],
        "images": [{"bytes": None if is_path else image or encoded(picture()), "path": image if is_path else None}],
        "reward_model": {"ground_truth": "4"},
        "extra_info": extra,
    }
    return made | {key: value for key, value in changes.items() if not key.startswith("extra_")}


def turned_by_exif() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(picture(), "JPEG", exif=exif)


def animated() -> bytes:
    frames = [picture(seed=seed).convert("P") for seed in range(3)]
    return encoded(frames[0], "GIF", save_all=True, append_images=frames[1:], duration=50)


def wide() -> bytes:
    return encoded(Image.fromarray(np.linspace(0, 65535, 48 * 32, dtype=np.uint16).reshape(32, 48)))


NO_BOX = {"extra_bbox": None, "extra_transform": None}
BAD_TASKS: dict[str, tuple[str, dict[str, Any]]] = {
    "HTML instead of an image": ("unreadable image", row(b"<html><body>404 Not Found</body></html>")),
    "an empty image": ("unreadable image", row(b"\x89PNG\r\n\x1a\n")),
    "pixels cut off": ("unreadable image", row(encoded(picture(300, 300))[:20_000])),
    "a JPEG cut off": ("unreadable image", row(encoded(picture(300, 300), "JPEG")[:9_000])),
    "a path that leads nowhere": ("unreadable image", row("gone.png")),
    "30,000x30,000": ("image too large", row(huge_png())),
    "300x1": ("image too long", row(encoded(picture(300, 1)), **NO_BOX)),
    "no images": ("no image", row(images=[])),
    "neither bytes nor path": ("no image", row(images=[{"bytes": None, "path": None}])),
    "a box outside": ("box", row(extra_bbox=[1.0, 2.0, 60.0, 12.0])),
    "a box inverted": ("box", row(extra_bbox=[20.0, 20.0, 3.0, 3.0])),
    "a box of three numbers": ("box", row(extra_bbox=[1.0, 2.0, 3.0])),
    "a box with NaN": ("box", row(extra_bbox=[float("nan"), 2.0, 30.0, 20.0])),
    "no answer": ("no answer", row(reward_model={"ground_truth": None})),
    "a blank answer": ("no answer", row(reward_model={"ground_truth": "  "})),
    "no question": ("no question", row(prompt=None, extra_question=None)),
    "a mark too many": ("image marks", row(prompt=[{"role": "user", "content": "<image><image>What?"}])),
    "no mark": ("image marks", row(prompt=[{"role": "user", "content": "What?"}])),
    "an unknown transform": ("unknown transform", row(extra_transform=json.dumps(["spin"]))),
    "a transform that is not JSON": ("transform", row(extra_transform="[rotate")),
}
ODD_TASKS: dict[str, tuple[str, dict[str, Any]]] = {
    "CMYK": ("CMYK image", row(encoded(picture().convert("CMYK"), "JPEG"))),
    "16 bits": ("16-bit or float image", row(wide())),
    "palette": ("palette image", row(encoded(picture().convert("P")))),
    "transparent": ("transparent image", row(encoded(picture().convert("RGBA")))),
    "animated": ("animated image", row(animated())),
    "EXIF": ("image turned by EXIF", row(turned_by_exif(), extra_bbox=[1.0, 2.0, 30.0, 45.0])),
    "1x1": ("image less than 8 pixels", row(encoded(picture(1, 1)), **NO_BOX)),
    "a crop without a box": ("crop required but no box", row(extra_bbox=None)),
}


def write_tasks(path: Path, rows: list[dict[str, Any]], **write: Any) -> str:
    pq.write_table(pa.Table.from_pylist(rows), path, **write)
    return str(path)


def damage_middle(path: Path, group: int) -> None:
    """Overwrite the pages of a row group with noise; the footer and all other groups stay."""
    metadata = pq.ParquetFile(path).metadata.row_group(group)
    columns = [metadata.column(at) for at in range(metadata.num_columns)]
    data = bytearray(path.read_bytes())
    for column in columns:
        start = column.dictionary_page_offset or column.data_page_offset
        noise = np.random.default_rng(start).integers(0, 256, column.total_compressed_size, dtype=np.uint8)
        data[start : start + column.total_compressed_size] = noise.tobytes()
    path.write_bytes(bytes(data))


def item(**changes: Any) -> dict[str, Any]:
    """A conversation with one call."""
    call = (
        '<tool_call>{"name": "code_image_tool", "arguments": {"code": "result = image", "image_index": 0}}</tool_call>'
    )
    turns = [
        ("human", "<image>What?"),
        ("gpt", f"<think>a</think>{call}"),
        ("tool", "<image>Here."),
        ("gpt", "<answer>4</answer>"),
    ]
    made = {"conversations": [{"from": who, "value": text} for who, text in turns], "images": ["a.png", "b.png"]}
    return made | changes


TURNS = item()["conversations"]
BAD_ITEMS: dict[str, tuple[str, Any]] = {
    "fewer images than marks": ("image marks", item(images=["a.png"])),
    "more images than marks": ("image marks", item(images=["a.png", "b.png", "a.png"])),
    "images that are not a list": ("no image", item(images="a.png")),
    "an image that is gone": ("unreadable image", item(images=["a.png", "gone.png"])),
    "HTML instead of an image": ("unreadable image", item(images=["a.png", "page.png"])),
    "turns out of order": ("conversations", item(conversations=TURNS[1:])),
    "turns without speakers": ("conversations", item(conversations=[{"speaker": "human"}])),
    "a text": ("conversations", "text"),
    "no turns": ("conversations", item(conversations=None)),
    "turns without loss": (
        "nothing to learn",
        item(conversations=[TURNS[0], TURNS[1] | {"loss": False}], images=["a.png"]),
    ),
    "an unknown loss": ("loss mark", item(conversations=[TURNS[0], TURNS[1] | {"loss": "maybe"}], images=["a.png"])),
}


def write_items(folder: Path, items: Any, name: str = "sft.json") -> str:
    for at, image in enumerate(("a.png", "b.png")):
        (folder / image).write_bytes(encoded(picture(seed=at)))
    (folder / "page.png").write_bytes(b"<html>")
    (folder / name).write_text(json.dumps(items), encoding="utf-8")
    return str(folder / name)
