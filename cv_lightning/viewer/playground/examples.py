"""Examples of the playground: images with questions to begin with, from a folder or a file of the user."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from cv_lightning.images import decode_image
from cv_lightning.types import CVLightningError, DataError, Task

MOST = 8
"""Examples that are offered of a folder or file."""
IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
QUESTION = "What is in this image?"
"""Question about an image of a folder that has no text file beside it."""


class Example(NamedTuple):
    """An image and a question about it."""

    name: str
    question: str
    load: Callable[[], Image.Image]
    """Decodes the image; a file that is none raises CVLightningError."""


def examples_of(path: Path) -> list[Example]:
    """The first examples of a folder of images, or of a file of tasks or conversations.

    Args:
        path: A folder, where `NAME.txt` beside `NAME.png` has the question; or a .parquet, .json or .jsonl file.

    Raises:
        DataError: The path does not exist, or has no example.
    """
    if path.is_dir():
        found = list(islice(_of_folder(path), MOST))
    elif path.is_file() and path.suffix in (".parquet", ".json", ".jsonl"):
        found = [example_of(task) for task in islice(_tasks(path), MOST)]
    else:
        raise DataError(f"--examples {path}: neither a folder nor a .parquet, .json or .jsonl file that exists")
    if not found:
        raise DataError(f"--examples {path}: holds no example; put images ({', '.join(IMAGES)}) into the folder")
    return found


def example_of(task: Task, name: str = "") -> Example:
    """The first image and the question of a task."""
    return Example(name or task.id, task.question, lambda: task.images[0])


def _of_folder(folder: Path) -> Iterator[Example]:
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in IMAGES and path.is_file():
            text = path.with_suffix(".txt")
            question = text.read_text(encoding="utf-8", errors="replace").strip() if text.is_file() else ""
            yield Example(path.name, question or QUESTION, lambda path=path: decode_image(path))  # type: ignore[misc]


def _tasks(path: Path) -> Iterator[Task]:
    """The usable rows of a file, in its order."""
    from cv_lightning.data.readers import TaskFiles
    from cv_lightning.data.rows import ReaderConfig, RowError
    from cv_lightning.data.sft_json import ConversationFiles

    files: TaskFiles | ConversationFiles
    files = (
        TaskFiles([path], ReaderConfig()) if path.suffix == ".parquet" else ConversationFiles([path], ReaderConfig())
    )
    for index in range(files.num_rows):
        try:
            row = files.read(index)
        except RowError:
            continue
        yield row if isinstance(row, Task) else row.task


def thumbnail_of(example: Example, longest_px: int) -> Image.Image | None:
    """The example's image scaled down; None for one that cannot be decoded."""
    try:
        image = example.load().copy()
    except CVLightningError:
        return None
    image.thumbnail((longest_px, longest_px))
    return image
