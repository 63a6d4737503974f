"""Tasks from the Parquet files of RL and benchmarks.

A row has `images` (bytes or paths), `prompt` or `extra_info.question`, and `reward_model.ground_truth` or
`extra_info.answer`; `data_source` and the rest of `extra_info` are optional. Nested columns may be JSON texts. Files
may differ in their columns. Images are decoded when a row is read.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cv_lightning.data.benchmark import scored_by
from cv_lightning.data.boxes import fit_box, is_fraction, parse_box
from cv_lightning.data.chunks import ParquetRows
from cv_lightning.data.image_cells import load_images
from cv_lightning.data.rows import ReaderConfig, RowError, RowFiles, check_text, is_missing, log_unread
from cv_lightning.early import wrong_kind
from cv_lightning.orientations import ORIENTATIONS, turn_box, turned_size
from cv_lightning.types import Box, DataError, Message, Task

IMAGE_MARK = "<image>"
OTHER_TRANSFORMS = frozenset(
    (
        "crop", "resize", "grayscale", "autocontrast", "equalize", "invert", "sharpen", "sharpness", "smooth",
        "gaussian_blur", "edge_detect", "dilate", "erode", "threshold", "brightness_up", "brightness_down",
        "contrast_up", "contrast_down", "color_up", "color_down",
    )
)  # fmt: skip
"""Transforms, besides turns and flips, that a data set may require; the reward knows the same names."""
ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function": "tool",
}
"""The template's roles by the words that data sets use; the template writes a role unchanged."""
EXTRA_KEYS = ("question", "answer", "transform", "bbox", "bbox_2d")
"""Keys of `extra_info` that become fields of the task; all others are its metadata."""
NEEDED_COLUMNS = (("images", "image"), ("prompt", "extra_info"), ("reward_model", "extra_info"))
"""Groups of columns; a file must have one of each."""
READ_COLUMNS = (*(name for names in NEEDED_COLUMNS for name in names), "data_source", "ability", "id", "index")
"""Columns that are read, and those of the format that mean nothing to a run."""


class TaskFiles(RowFiles[Task]):
    """The tasks of Parquet files.

    Args:
        files: Paths of Parquet files.
        config: Frame of boxes, prompt and folder of images.

    Raises:
        DataError: A file does not exist or is not Parquet, or has no usable row.
    """

    def __init__(self, files: Sequence[str | Path], config: ReaderConfig) -> None:
        super().__init__(files, config, "--data.init_args.train_files/eval_files")
        for path in self.paths:
            if error := wrong_kind("data.init_args.train_files", str(path), "rl"):
                raise DataError(error)
        self.rows = ParquetRows(self.paths, NEEDED_COLUMNS, optional=("data_source",))
        for path, names in zip(self.paths, self.rows.names, strict=True):
            log_unread(path, names, READ_COLUMNS)
        self._open(self.rows.sizes)

    def read(self, index: int, *, decode: bool = True) -> Task:
        """One task; with `decode` False its images have sizes but no pixels.

        Raises:
            RowError: The row cannot be used.
        """
        file, number = self._index.locate(index)
        row = self.rows.row(index)
        return task_of_row(row, self.paths[file], number, self.config, decode=decode, name=self.names[file])

    def order(self, rng: random.Random) -> list[int]:
        """All rows in a shuffled order in which each part of a file is read once."""
        return self.rows.order(rng)


# ------------------------------------------------------------------------------------------------ one row
def task_of_row(
    row: Mapping[str, Any], path: Path, number: int, config: ReaderConfig, *, decode: bool = True, name: str = ""
) -> Task:
    """The task that a row describes.

    Args:
        row: Column to value, as pyarrow gives it.
        path: File, for relative image paths and messages.
        number: Row in the file, from 0.
        config: Frame of boxes, prompt and folder of images.
        decode: False reads only the images' headers; the task's images then have sizes but no pixels.
        name: Start of the id; by default the file's stem.

    Raises:
        RowError: The row cannot be used.
    """
    extra = extra_info(row)
    images = load_images(image_cells(row), Path(config.image_folder or path.parent), decode)
    messages = _messages(row.get("prompt"), config)
    marks = sum(message.content.count(IMAGE_MARK) for message in messages)
    if messages and marks != len(images):
        raise RowError("image marks", f"prompt has {marks} {IMAGE_MARK} marks but there are {len(images)} images")
    question = extra.get("question") or _bare_question(messages)
    question = without_marks(check_text("" if question is None else str(question), "the question"))
    if not question:
        raise RowError("no question", "neither prompt nor extra_info.question holds a question")
    transforms = parse_transforms(extra.get("transform"))
    truth, accepted = _ground_truth(_parsed(row.get("reward_model"), "reward_model"), extra)
    metadata = {key: value for key, value in extra.items() if key not in EXTRA_KEYS and key != "accepted_answers"}
    if accepted:
        metadata["accepted_answers"] = accepted
    if config.metric is not None:
        metadata |= scored_by(config.metric, accepted or [truth])
    return Task(
        id=f"{name or path.stem}:{number}",
        question=question,
        images=images,
        ground_truth=truth,
        data_source=config.data_source or _data_source(row, extra) or path.stem,
        required_transforms=transforms,
        box=_box(extra, images[0].size, transforms, config),
        messages=messages if config.prompt == "given" else (),
        metadata=metadata,
    )


def extra_info(row: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of `extra_info` that are set; it may be a mapping or its JSON text.

    Raises:
        RowError: It is neither.
    """
    extra = _parsed(row.get("extra_info"), "extra_info") or {}
    if not isinstance(extra, Mapping):
        raise RowError("extra_info", f"extra_info is a {type(extra).__name__}; a mapping is wanted")
    return {str(key): value for key, value in extra.items() if not is_missing(value)}


def image_cells(row: Mapping[str, Any]) -> list[Any]:
    """The image cells of a row: bytes, a path, or a mapping with either.

    Raises:
        RowError: There is none.
    """
    cells = row.get("image") if is_missing(row.get("images")) else row.get("images")
    if is_missing(cells) or (isinstance(cells, (list, str, bytes)) and not cells):
        raise RowError("no image", "images is empty; a task needs at least one")
    return cells if isinstance(cells, list) else [cells]


def _parsed(value: Any, key: str) -> Any:
    """The value of a nested column, which some files hold as JSON text."""
    if isinstance(value, str) and value.strip()[:1] in ("{", "["):
        try:
            return json.loads(value)
        except (ValueError, RecursionError) as error:
            raise RowError(key.rpartition(".")[2], f"{key} is text that is not JSON ({error})") from error
    return None if is_missing(value) else value


def _messages(prompt: Any, config: ReaderConfig) -> tuple[Message, ...]:
    prompt = _parsed(prompt, "prompt")
    if prompt is None:
        return ()
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    try:
        messages = tuple(Message(role=_role(m["role"]), content=message_text(m["content"])) for m in prompt)
    except (TypeError, KeyError, AttributeError) as error:
        raise RowError("prompt", f"prompt is not a list of {{role, content}} ({error!r})") from error
    for message in messages:
        check_text(message.content, f"prompt ({message.role})")
    return messages if config.system == "given" else tuple(m for m in messages if m.role != "system")


def _role(given: Any) -> str:
    """The template's name of a role.

    Raises:
        RowError: The role is unknown.
    """
    role = ROLES.get(given.strip().casefold()) if isinstance(given, str) else None
    if role is None:
        raise RowError("role", f"prompt has a message of role {str(given)[:60]!r}; known are {', '.join(ROLES)}")
    return role


def _data_source(row: Mapping[str, Any], extra: Mapping[str, Any]) -> str:
    named = row.get("data_source")
    return check_text(str(("" if is_missing(named) else named) or extra.get("dataset_name") or ""), "data_source")


def message_text(content: Any) -> str:
    """Text of a message; in a list of parts, an image part becomes a mark.

    Raises:
        RowError: The content is NaN.
    """
    if is_missing(content) and content is not None:
        raise RowError("prompt", "a message's content is NaN, as pandas writes a missing one")
    if isinstance(content, list):
        return "".join(IMAGE_MARK if part.get("type") == "image" else str(part.get("text") or "") for part in content)
    return str(content or "")


def _bare_question(messages: Sequence[Message]) -> str:
    users = [message.content for message in messages if message.role == "user"]
    return without_marks(users[-1]) if users else ""


def without_marks(text: str) -> str:
    """Text without image marks, stripped; marks that only appear once another is removed are removed, too."""
    while IMAGE_MARK in text:
        text = text.replace(IMAGE_MARK, "")
    return text.strip()


def _ground_truth(reward_model: Any, extra: Mapping[str, Any]) -> tuple[str, list[str]]:
    """The ground truth, and all accepted answers if there are several.

    A list of texts as ground truth names several; `extra_info.accepted_answers` adds to it.

    Raises:
        RowError: There is none, or `accepted_answers` is neither one answer nor a list of them.
    """
    truth = reward_model.get("ground_truth") if isinstance(reward_model, Mapping) else None
    found = (_without_missing(value) for value in (truth, extra.get("answer")))
    truth = next((value for value in found if not is_missing(value)), None)
    if truth is None or truth == [] or (isinstance(truth, str) and not truth.strip()):
        raise RowError("no answer", "neither reward_model.ground_truth nor extra_info.answer holds an answer")
    is_list_of_texts = isinstance(truth, list) and all(isinstance(text, str) and text.strip() for text in truth)
    several = [text.strip() for text in truth] if is_list_of_texts else []
    text = truth if isinstance(truth, str) else json.dumps(truth, ensure_ascii=False, default=str)
    further = _parsed(extra.get("accepted_answers"), "extra_info.accepted_answers")
    further = [answer for answer in (further if isinstance(further, list) else [further]) if not is_missing(answer)]
    if not all(isinstance(answer, str | int | float) for answer in further):
        raise RowError("accepted answers", f"extra_info.accepted_answers {further} is not a list of answers")
    accepted = [*(several if len(several) > 1 else []), *map(str, further)]  # unchanged: the metric normalises them
    for answer in (text, *accepted):
        check_text(answer, "an accepted answer")
    return several[0] if several else text, accepted


def _without_missing(value: Any) -> Any:
    """A list without its missing entries, None if no other is left; any other value unchanged."""
    if isinstance(value, list) and value:
        return [answer for answer in value if not is_missing(answer)] or None
    return value


def parse_transforms(value: Any) -> tuple[str, ...]:
    """Names in `extra_info.transform`: a list, a mapping of names (unset ones are ignored), JSON of either, or a text.

    Raises:
        RowError: A name is unknown, or the value has no names.
    """
    value = _parsed(value, "extra_info.transform")
    if isinstance(value, str):
        value = [part.strip() for part in value.split(",") if part.strip().lower() not in ("", "none", "null")]
    if isinstance(value, Mapping):
        # Columnar storage gives every row all keys; absent ones are null.
        value = [name for name, chosen in value.items() if chosen not in (None, False, 0)]
    if value is not None and not isinstance(value, (list, tuple)):
        raise RowError("transform", f"extra_info.transform {value!r} is not a list, mapping or text of names")
    names = tuple(str(name) for name in value or () if name is not None)
    for name in names:
        if not re.fullmatch(r"rotate_-?\d+", name) and name not in ORIENTATIONS and name not in OTHER_TRANSFORMS:
            known = ", ".join((*ORIENTATIONS, *sorted(OTHER_TRANSFORMS)))
            raise RowError("unknown transform", f"extra_info.transform names {name!r}; known are {known} and rotate_N")
    return tuple(_turn(name) for name in names if _turn(name) != "rotate_0")


def _turn(name: str) -> str:
    """The one name of a turn: `rotate_-90` is `rotate_270`."""
    return f"rotate_{int(name.removeprefix('rotate_')) % 360}" if name.startswith("rotate_") else name


def raw_box(extra: Mapping[str, Any]) -> Box | None:
    """The row's box in the frame of the file, from `bbox` or `bbox_2d`.

    Raises:
        RowError: It is not four finite numbers.
    """
    key = _box_key(extra)
    return parse_box(extra.get(key), f"extra_info.{key}")


def _box(
    extra: Mapping[str, Any], size: tuple[int, int], transforms: Sequence[str], config: ReaderConfig
) -> Box | None:
    """The ground-truth box in pixels of the given image, clipped to it."""
    given = raw_box(extra)
    if given is None:
        return None
    if is_fraction(given, size):
        raise RowError(
            "box",
            f"a box of {list(given)} lies within 0..1: fractions of its {size[0]}x{size[1]} image? Boxes are pixels; "
            "multiply by width and height",
        )
    upright = config.bbox_frame == "upright"
    box = turn_box(given, transforms, turned_size(size, transforms)) if upright else given
    hint = f"; boxes are pixels, and bbox_frame is {config.bbox_frame!r}"
    return fit_box(box, size, f"extra_info.{_box_key(extra)} {list(given)}", hint)


def _box_key(extra: Mapping[str, Any]) -> str:
    return "bbox" if extra.get("bbox") is not None else "bbox_2d"
