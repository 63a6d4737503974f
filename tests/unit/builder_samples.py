"""Tables to build from: images with a marked detail that the questions refer to."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageDraw

from cv_lightning.types import Box


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind)
    return buffer.getvalue()


def picture(seed: int, size: tuple[int, int] = (240, 180), box: Box | None = None) -> Image.Image:
    """A smooth random image with a black frame at the box."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(60, 250, (12, 16, 3), dtype=np.uint8))
    image = coarse.resize(size, Image.Resampling.BICUBIC)
    if box is not None:
        x1, y1, x2, y2 = map(round, box)
        ImageDraw.Draw(image).rectangle((x1, y1, x2 - 1, y2 - 1), outline="black")
    return image


def rows(count: int, small: bool = True) -> list[dict[str, Any]]:
    """Questions, every other one about a small detail."""
    made = []
    for at in range(count):
        box: Box | None = (20.0 + at % 7 * 25, 30.0 + at % 5 * 20, 42.0 + at % 7 * 25, 44.0 + at % 5 * 20)
        box = box if small and at % 2 == 0 else None
        row = {"image": {"bytes": encoded(picture(at, box=box)), "path": None}, "question": f"What is item {at}?"}
        made.append({**row, "answer": str(100 + at), "bbox": list(box) if box else None, "data_source": "made"})
    return made


def table(folder: Path, count: int, name: str = "vqa.parquet") -> str:
    """A Parquet table of `rows`."""
    path = folder / name
    pq.write_table(pa.Table.from_pylist(rows(count)), path, row_group_size=8)
    return str(path)


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
