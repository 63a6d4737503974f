"""Speed of the readers against bare decoding, how soon a first batch comes, and whether memory stays flat.

    python scripts/bench/data.py [--json FILE] [--check] [--rows N] [--folder DIR]

`reader_over_floor`: images per second of `RowStream` and the resize for the model, over those of a bare loop of Pillow
decode and resize of the same JPEG bytes in memory; both on the same cores, the loop in one process a core. Blocks of
both alternate, so that a busy machine slows both. `memory_spread`: half the range of resident memory over the epoch,
over its median. `first_batch_s`: from opening files of 100,000 rows to 64 decoded tasks, in a fresh process.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[2]))

from cv_lightning.data.readers import TaskFiles
from cv_lightning.data.rows import ReaderConfig
from cv_lightning.data.sources import RowStream
from cv_lightning.images import ImageLimits, to_model_image

LIMITS = ImageLimits(factor=32, min_pixels=784, max_pixels=262_144)
SIZE = (816, 612)
"""Half a megapixel."""
SMALL = (128, 96)
BATCH, BLOCK = 64, 640
FIRST_BATCH_ROWS = 100_000
TARGETS = {"reader_over_floor": 0.8, "memory_spread": 0.05, "first_batch_s": 2.0}
FIRST_BATCH = """
import sys, time
from cv_lightning.data.readers import TaskFiles
from cv_lightning.data.rows import ReaderConfig
from cv_lightning.data.sources import RowStream
begun = time.perf_counter()
tasks = RowStream(TaskFiles(sys.argv[1:], ReaderConfig()), seed=0).batch(0, 64)
assert len(tasks) == 64 and all(task.images[0].getpixel((0, 0)) for task in tasks)
print(time.perf_counter() - begun)
"""
_images: list[bytes] = []


# ------------------------------------------------------------------------------------------------ the files
def jpegs(count: int, size: tuple[int, int]) -> list[bytes]:
    """Different images with edges and noise, as JPEG."""
    rng = np.random.default_rng(0)
    made = []
    for _ in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize(
            size, Image.Resampling.BICUBIC
        )
        noise = rng.normal(0, 8, (size[1], size[0], 3))
        buffer = io.BytesIO()
        pixels = (np.asarray(coarse) + noise).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(buffer, "JPEG", quality=85)
        made.append(buffer.getvalue())
    return made


def write_rows(path: Path, images: list[bytes], count: int, rows_per_group: int) -> None:
    """An RL file whose rows go through the images again and again."""
    writer = None
    for start in range(0, count, 1000):
        rows = [_row(images[at % len(images)], at) for at in range(start, min(count, start + 1000))]
        table = pa.Table.from_pylist(rows)
        writer = writer or pq.ParquetWriter(path, table.schema, use_dictionary=False)
        writer.write_table(table, row_group_size=rows_per_group)
    assert writer is not None
    writer.close()


def _row(image: bytes, index: int) -> dict[str, Any]:
    return {
        "data_source": "bench",
        "prompt": [{"role": "user", "content": "<image>What is written?"}],
        "images": [{"bytes": image, "path": None}],
        "reward_model": {"ground_truth": str(index), "style": "rule"},
        "extra_info": {
            "question": "What is written?",
            "transform": ["crop"],
            "bbox": [4.0, 4.0, 40.0, 40.0],
            "index": index,
        },
    }


# ------------------------------------------------------------------------------------------------ floor and reader
def _load(path: str) -> None:
    _images.extend(pq.ParquetFile(path).read_row_group(0, columns=["images"]).column("images").combine_chunks())
    _images[:] = [cell.as_py()[0]["bytes"] for cell in _images]


def _bare_loop(numbers: list[int]) -> int:
    size = to_model_image(Image.new("RGB", SIZE), LIMITS).size
    total = 0
    for number in numbers:
        with Image.open(io.BytesIO(_images[number % len(_images)])) as image:
            total += image.convert("RGB").resize(size, Image.Resampling.BICUBIC).width
    return total


def blocks(path: Path, rows: int, cores: int) -> Iterator[tuple[float, float, int]]:
    """(seconds of the floor, seconds of the reader, resident bytes) of each block of an epoch."""
    source = RowStream(TaskFiles([str(path)], ReaderConfig()), seed=0)
    process = psutil.Process()
    context = get_context("spawn")
    with (
        ProcessPoolExecutor(cores, context, _load, (str(path),)) as floor,
        ThreadPoolExecutor(cores) as resize,
    ):
        list(floor.map(_bare_loop, [[0]] * (4 * cores)))  # the processes are up
        for block in range(rows // BLOCK):
            parts = [list(range(part, BLOCK, cores * 4)) for part in range(cores * 4)]
            begun = time.perf_counter()
            list(floor.map(_bare_loop, parts))
            between = time.perf_counter()
            for step in range(block * BLOCK // BATCH, (block + 1) * BLOCK // BATCH):
                tasks = source.batch(step, BATCH)
                list(resize.map(lambda task: to_model_image(task.images[0], LIMITS), tasks))
            yield between - begun, time.perf_counter() - between, process.memory_info().rss


def reader_figures(folder: Path, rows: int) -> dict[str, float]:
    """Throughput and memory over one epoch."""
    cores = min(2, len(os.sched_getaffinity(0)))
    path = folder / "rows.parquet"
    write_rows(path, jpegs(250, SIZE), rows, rows_per_group=250)
    measured = list(blocks(path, rows, cores))
    floor_s, reader_s = (sum(block[at] for block in measured) for at in (0, 1))
    images = len(measured) * BLOCK
    settled = [block[2] for block in measured[2:]] or [measured[-1][2]]
    return {
        "rows": images,
        "floor_images_per_s": images / floor_s,
        "reader_images_per_s": images / reader_s,
        "reader_over_floor": floor_s / reader_s,
        "resident_mb": median(settled) / 1e6,
        "memory_spread": (max(settled) - min(settled)) / 2 / median(settled),
    }


def first_batch_figures(folder: Path, repeats: int = 3) -> dict[str, float]:
    """Seconds to the first batch of a large set in four files, each of few large row groups."""
    files = [folder / f"part{number}.parquet" for number in range(4)]
    images = jpegs(250, SMALL)
    for file in files:
        write_rows(file, images, FIRST_BATCH_ROWS // len(files), rows_per_group=1000)
    command = [sys.executable, "-c", FIRST_BATCH, *map(str, files)]
    root = Path(__file__).parents[2]
    seconds = [
        float(subprocess.run(command, capture_output=True, text=True, check=True, cwd=root).stdout)
        for _ in range(repeats)
    ]
    return {"first_batch_s": median(seconds)}


def main() -> int:
    """Measure, print, write; with --check the exit code says whether the targets are met."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--check", action="store_true", help="exit code 1 where a target is missed")
    parser.add_argument("--rows", type=int, default=10_000, help="rows of the epoch")
    parser.add_argument("--folder", type=Path, help="where the files are made (about 1.5 GB); removed afterwards")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="bench-data-", dir=options.folder))
    try:
        figures = first_batch_figures(folder) | reader_figures(folder, options.rows)
    finally:
        shutil.rmtree(folder)
    figures = {name: round(value, 3) for name, value in figures.items()}
    print(json.dumps(figures, indent=1))
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")
    met = (
        figures["reader_over_floor"] >= TARGETS["reader_over_floor"]
        and figures["memory_spread"] <= TARGETS["memory_spread"]
        and figures["first_batch_s"] <= TARGETS["first_batch_s"]
    )
    return int(options.check and not met)


if __name__ == "__main__":
    sys.exit(main())
