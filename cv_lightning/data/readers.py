"""RL and benchmark files: Parquet rows to tasks.

A row has `images` (bytes or paths), `prompt` or `extra_info.question`, and `reward_model.ground_truth` or
`extra_info.answer`; `data_source` and the rest of `extra_info` may be absent. Every row is checked when the files are
opened; pixels are decoded when a row is read.
"""

from __future__ import annotations

import io
import json
import random
import re
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from cv_lightning.data.rows import ReaderConfig, RowError, RowProblems, expand_files
from cv_lightning.images import MAX_DECODED_PIXELS, decode_image, dihedral_affine, invert, map_box
from cv_lightning.types import Box, DataError, ImageError, Message, Task

IMAGE_MARK = "<image>"
ORIENTATIONS = ("rotate_90", "rotate_180", "rotate_270", "flip_horizontal", "flip_vertical")
OTHER_TRANSFORMS = frozenset(
    (
        "crop", "resize", "grayscale", "autocontrast", "equalize", "invert", "sharpen", "sharpness", "smooth",
        "gaussian_blur", "edge_detect", "dilate", "erode", "threshold", "brightness_up", "brightness_down",
        "contrast_up", "contrast_down", "color_up", "color_down",
    )
)  # fmt: skip
"""Names, beside turns and flips, that a data set may require; those of the reward's vocabulary."""
BOX_SLACK_PX = 1.0
"""Boxes may reach this far outside the image (rounding in data sets); they are clipped."""
EXIF_ORIENTATION = 0x0112
EXTRA_KEYS = ("question", "answer", "transform", "bbox", "bbox_2d")
"""Keys of `extra_info` that become fields of the task; all others are its metadata."""


class TaskFiles:
    """The usable rows of Parquet files, by position.

    `problems` lists the rows that were skipped. Only one row group is in memory at a time.

    Args:
        files: paths of Parquet files.
        config: frame of boxes, prompt and folder of images.

    Raises:
        DataError: a file is missing or no Parquet, or no row of all files can be used.
    """

    def __init__(self, files: Sequence[str], config: ReaderConfig) -> None:
        self.config = config
        self.problems = RowProblems()
        self.paths = expand_files(files, "--data train_files/eval_files")
        self._tables = [_open(path) for path in self.paths]
        self._group = lru_cache(maxsize=2)(self._read_group)
        self._groups = [(i, group) for i, table in enumerate(self._tables) for group in range(table.num_row_groups)]
        self._usable: list[list[int]] = [list(self._scan(at)) for at in range(len(self._groups))]
        self._starts = [0]
        for rows in self._usable:
            self._starts.append(self._starts[-1] + len(rows))
        self.problems.report(len(self))

    def __len__(self) -> int:
        return self._starts[-1]

    def row(self, position: int) -> Task:
        """The task at a position; the next one whose pixels can be decoded if its own cannot.

        Raises:
            DataError: the pixels of no row can be decoded.
        """
        for at in range(position, position + len(self)):
            at %= len(self)
            group = bisect_right(self._starts, at) - 1
            row = self._usable[group][at - self._starts[group]]
            try:
                return self._task(group, row)
            except RowError as error:
                self.problems.add(self.paths[self._groups[group][0]], self._first_row(group) + row, error)
        raise DataError(f"no row with pixels that can be decoded:\n{self.problems.summary()}")

    def order(self, rng: random.Random) -> list[int]:
        """Row groups in a shuffled order, and their rows within each: every group is read once an epoch."""
        groups = list(range(len(self._groups)))
        rng.shuffle(groups)
        order: list[int] = []
        for group in groups:
            positions = list(range(self._starts[group], self._starts[group + 1]))
            rng.shuffle(positions)
            order += positions
        return order

    def _scan(self, group: int) -> Iterator[int]:
        """Rows of a row group that can be used."""
        path = self.paths[self._groups[group][0]]
        for row in range(len(self._group(group))):
            try:
                self._task(group, row, decode=False)
            except RowError as error:
                self.problems.add(path, self._first_row(group) + row, error)
            else:
                yield row

    def _task(self, group: int, row: int, decode: bool = True) -> Task:
        file = self._groups[group][0]
        number = self._first_row(group) + row
        return task_of_row(self._group(group)[row], self.paths[file], number, self.config, decode=decode)

    def _first_row(self, group: int) -> int:
        file, within = self._groups[group]
        metadata = self._tables[file].metadata
        return sum(metadata.row_group(earlier).num_rows for earlier in range(within))

    def _read_group(self, group: int) -> list[dict[str, Any]]:
        file, within = self._groups[group]
        try:
            rows: list[dict[str, Any]] = self._tables[file].read_row_group(within).to_pylist()
        except (pa.ArrowException, OSError) as error:
            where = f"{self.paths[file]}, row group {within}"
            raise DataError(f"{where}: cannot be read ({error}); is it cut off?") from error
        return rows


def _open(path: Path) -> pq.ParquetFile:
    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: cannot be read as Parquet ({error}); is it cut off, or another format?") from error
    columns = set(file.schema_arrow.names)
    for wanted in (("images",), ("prompt", "extra_info"), ("reward_model", "extra_info")):
        if not columns & set(wanted):
            raise DataError(f"{path}: no column {' or '.join(wanted)}; it has {', '.join(sorted(columns))}")
    return file


# ------------------------------------------------------------------------------------------------ one row
def task_of_row(row: Mapping[str, Any], path: Path, number: int, config: ReaderConfig, *, decode: bool = True) -> Task:
    """The task that a row describes.

    Args:
        row: column to value, as pyarrow gives it.
        path: file, for the id, relative image paths and messages.
        number: row in the file, from 0.
        config: frame of boxes, prompt and folder of images.
        decode: False reads no more than the images' headers; the task's images then have sizes but no pixels.

    Raises:
        RowError: the row cannot be used.
    """
    extra = {key: value for key, value in (row.get("extra_info") or {}).items() if value is not None}
    images = _images(row.get("images"), Path(config.image_folder or path.parent), decode)
    messages = _messages(row.get("prompt"))
    marks = sum(message.content.count(IMAGE_MARK) for message in messages)
    if messages and marks != len(images):
        raise RowError("image marks", f"prompt has {marks} {IMAGE_MARK} marks but there are {len(images)} images")
    question = extra.get("question") or _bare_question(messages)
    if not question:
        raise RowError("no question", "neither prompt nor extra_info.question holds a question")
    transforms = parse_transforms(extra.get("transform"))
    return Task(
        id=f"{path.stem}:{number}",
        question=str(question).replace(IMAGE_MARK, "").strip(),
        images=images,
        ground_truth=_ground_truth(row.get("reward_model"), extra),
        data_source=str(row.get("data_source") or extra.get("dataset_name") or path.stem),
        required_transforms=transforms,
        box=_box(extra, images[0].size, transforms, config),
        messages=messages if config.prompt == "given" else (),
        metadata={key: value for key, value in extra.items() if key not in EXTRA_KEYS},
    )


def _images(cells: Any, folder: Path, decode: bool) -> tuple[Image.Image, ...]:
    if not cells:
        raise RowError("no image", "images is empty; a task needs at least one")
    images = []
    for index, cell in enumerate(cells if isinstance(cells, list) else [cells]):
        data, name = (cell.get("bytes"), cell.get("path")) if isinstance(cell, Mapping) else (None, cell)
        if isinstance(cell, bytes):
            data, name = cell, None
        if data is None and not name:
            raise RowError("no image", f"images[{index}] has neither bytes nor path")
        source = data if data is not None else folder / str(name)
        images.append(load_image(source, f"images[{index}]", decode))
    return tuple(images)


def load_image(source: bytes | Path, key: str, decode: bool) -> Image.Image:
    """Decode an image; with `decode` False read only its header: the result then has a size but no pixels.

    Raises:
        RowError: it is no image, or too large; names the key.
    """
    try:
        if decode:
            return decode_image(source)
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            # Of a PNG without EXIF in its header getexif() would decode every pixel.
            has_exif = image.format != "PNG" or "exif" in image.info
            turned_by_exif = has_exif and image.getexif().get(EXIF_ORIENTATION, 1) > 1
            if image.width * image.height > MAX_DECODED_PIXELS:
                raise ImageError(f"{image.width}x{image.height} is more than {MAX_DECODED_PIXELS} pixels")
        return decode_image(source) if turned_by_exif else image
    except (ImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise RowError("unreadable image", f"{key}: {error}") from error


def _messages(prompt: Any) -> tuple[Message, ...]:
    if prompt is None:
        return ()
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    try:
        return tuple(Message(role=str(m["role"]), content=str(m["content"] or "")) for m in prompt)
    except (TypeError, KeyError) as error:
        raise RowError("prompt", f"prompt is no list of {{role, content}} ({error!r})") from error


def _bare_question(messages: Sequence[Message]) -> str:
    users = [message.content for message in messages if message.role == "user"]
    return users[-1].replace(IMAGE_MARK, "").strip() if users else ""


def _ground_truth(reward_model: Any, extra: Mapping[str, Any]) -> str:
    truth = reward_model.get("ground_truth") if isinstance(reward_model, Mapping) else None
    truth = extra.get("answer") if truth is None else truth
    if truth is None or truth in ("", []):
        raise RowError("no answer", "neither reward_model.ground_truth nor extra_info.answer holds an answer")
    return truth if isinstance(truth, str) else json.dumps(truth, ensure_ascii=False)


def parse_transforms(value: Any) -> tuple[str, ...]:
    """Names of `extra_info.transform`: a list, a mapping of names (unset ones left out), JSON of either, or a text.

    Raises:
        RowError: a name that is unknown.
    """
    if isinstance(value, str) and value.strip()[:1] in ("[", "{"):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise RowError("transform", f"extra_info.transform {value!r} is no JSON ({error})") from error
    if isinstance(value, str):
        value = [part.strip() for part in value.split(",") if part.strip()]
    if isinstance(value, Mapping):
        # Columnar storage gives every row all keys, the absent ones as null.
        value = [name for name, chosen in value.items() if chosen not in (None, False, 0)]
    names = tuple(str(name) for name in value or () if name is not None)
    for name in names:
        if not re.fullmatch(r"rotate_-?\d+", name) and name not in ORIENTATIONS and name not in OTHER_TRANSFORMS:
            known = ", ".join((*ORIENTATIONS, *sorted(OTHER_TRANSFORMS)))
            raise RowError("unknown transform", f"extra_info.transform names {name!r}; known are {known} and rotate_N")
    return names


def _box(
    extra: Mapping[str, Any], size: tuple[int, int], transforms: Sequence[str], config: ReaderConfig
) -> Box | None:
    """The ground-truth box in pixels of the given image, clipped to it."""
    key = "bbox" if extra.get("bbox") is not None else "bbox_2d"
    value = extra.get(key)
    if value is None or len(value) == 0 or all(edge is None for edge in value):
        return None
    try:
        x1, y1, x2, y2 = (float(edge) for edge in value)
    except (TypeError, ValueError) as error:
        raise RowError("box", f"extra_info.{key} {value} is not four numbers [x1, y1, x2, y2]") from error
    box: Box = (x1, y1, x2, y2)
    if config.bbox_frame == "upright":
        box = _to_given_frame(box, size, transforms)
    width, height = size
    inside = box[0] >= -BOX_SLACK_PX and box[1] >= -BOX_SLACK_PX
    inside = inside and box[2] <= width + BOX_SLACK_PX and box[3] <= height + BOX_SLACK_PX
    clipped = (max(0.0, box[0]), max(0.0, box[1]), min(float(width), box[2]), min(float(height), box[3]))
    if not inside or clipped[0] >= clipped[2] or clipped[1] >= clipped[3]:
        raise RowError(
            "box",
            f"extra_info.{key} {list(value)} is inverted or outside its {width}x{height} image; boxes are pixels, and "
            f"bbox_frame is {config.bbox_frame!r}",
        )
    return clipped


def _to_given_frame(box: Box, size: tuple[int, int], transforms: Sequence[str]) -> Box:
    """A box of the upright image in pixels of the given one, to which `transforms` were applied in order."""
    turned = [name for name in transforms if name in ORIENTATIONS]
    swapped = sum(name in ("rotate_90", "rotate_270") for name in turned) % 2
    width, height = size[::-1] if swapped else size
    for name in turned:
        box = map_box(invert(dihedral_affine(name, width, height)), box)
        if name in ("rotate_90", "rotate_270"):
            width, height = height, width
    return box
