"""`data check`: what files hold, what training would skip or cut, which frame boxes are in, what comes twice."""

from __future__ import annotations

import math
import os
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from cv_lightning.data.rows import ReaderConfig, expand_files
from cv_lightning.factory.check_copies import VARIANTS, as_thumbnails, near_copies
from cv_lightning.factory.check_facts import FactSettings, FileKind, RowFacts, inspect_rows, num_rows, token_counter
from cv_lightning.factory.check_frames import judge_frame
from cv_lightning.images import ImageLimits, ImageRule
from cv_lightning.orientations import ORIENTATIONS
from cv_lightning.types import DataError

REPORT_VERSION = 1
RECIPE_MIN_PIXELS = 784
RECIPE_MAX_PIXELS = {"tasks": 6_422_528, "conversations": 262_144}
RECIPE_MAX_TOKENS = {"tasks": 16_384, "conversations": 32_768}
SPAN_ROWS = 64
"""Rows that a worker takes at a time."""
WORKER_WORTH_ROWS = 400
"""Rows from which on a second process pays for its start."""
LISTED_ROWS = 1000
"""Rows of a kind that the report lists; the count is always whole."""
LISTED_COPIES = 500
HISTOGRAM_BINS = 20

Progress = Callable[[int, int], None]
"""Called with the rows done and all rows."""


@dataclass(frozen=True, kw_only=True)
class CheckConfig:
    """What is checked, and at which limits. The defaults are the recipe's."""

    reader: ReaderConfig = field(default_factory=ReaderConfig)
    test_files: tuple[str, ...] = ()
    """Files that are held out: pictures that these share with the others are leakage. None: `extra_info.split` says
    which rows are."""
    processor: str = ""
    """Hugging Face folder of a model: its tokenizer counts tokens, its factor and pixel limits hold."""
    factor: int = 32
    """Sides that the model sees are multiples of this where no processor says: patch size times merge size."""
    min_pixels: int | None = None
    """Pixels an image has at least for the model; by default the processor's, else 784."""
    max_pixels: int | None = None
    """At most; by default the processor's, else 6,422,528 for tasks and 262,144 for conversations."""
    max_tokens: int | None = None
    """Tokens of a prompt (tasks: 16,384 by default) or a conversation (32,768)."""
    pixels: bool = True
    """Decode every image. False: headers only, which is fast, but finds neither broken pixels nor copies."""
    max_rows: int = 0
    """Rows of each file that are looked at, evenly spread; 0: all."""
    num_workers: int = 0
    """Processes; 0: one a core where there are rows enough."""

    def __post_init__(self) -> None:
        if self.max_rows < 0 or self.num_workers < 0:
            raise ValueError(f"--max-rows {self.max_rows} and --workers {self.num_workers} cannot be negative")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ValueError(f"--max-tokens {self.max_tokens}: at least 1")
        if self.factor < 1:
            raise ValueError(f"--factor {self.factor}: the model's patch size times its merge size, such as 28 or 32")


@dataclass(slots=True)
class FileFacts:
    """A file and what was found in it."""

    path: Path
    kind: FileKind
    held_out: bool
    limits: ImageRule
    max_tokens: int
    num_rows: int = 0
    error: str = ""
    """Why nothing of it can be read."""
    rows: list[RowFacts] = field(default_factory=list)
    """In the file's order; a part of them where rows were sampled."""


def check_files(files: Sequence[str], config: CheckConfig, progress: Progress | None = None) -> dict[str, Any]:
    """Look at every row of files.

    Args:
        files: Parquet files of tasks, and JSON or JSON Lines files of conversations.
        config: what is checked.
        progress: told how far it has got.

    Returns:
        The report: JSON values only; `ok` is False if a file has no usable row.

    Raises:
        DataError: a file does not exist, or its name ends in neither .parquet, .json nor .jsonl.
        CheckpointError: no processor in the folder.
    """
    begun = time.perf_counter()
    found = [_file(path, config, held_out) for path, held_out in _paths(files, config)]
    _inspect_all(found, config, progress or (lambda done, total: None))
    return report(found, config, time.perf_counter() - begun)


def _paths(files: Sequence[str], config: CheckConfig) -> list[tuple[Path, bool]]:
    train = [(path, False) for path in expand_files(files, "FILES")]
    test = [(path, True) for path in expand_files(config.test_files, "--test")] if config.test_files else []
    for path, _ in train + test:
        if path.suffix not in (".parquet", ".json", ".jsonl"):
            raise DataError(f"{path}: the name must end in .parquet (tasks), .json or .jsonl (conversations)")
    return list(dict(train + test).items())


def _file(path: Path, config: CheckConfig, held_out: bool) -> FileFacts:
    kind: FileKind = "tasks" if path.suffix == ".parquet" else "conversations"
    if config.processor:
        limits: ImageRule = token_counter(config.processor, config.min_pixels, config.max_pixels).limits
    else:
        limits = ImageLimits(
            factor=config.factor,
            min_pixels=config.min_pixels or RECIPE_MIN_PIXELS,
            max_pixels=config.max_pixels or RECIPE_MAX_PIXELS[kind],
        )
    found = FileFacts(path, kind, held_out, limits, config.max_tokens or RECIPE_MAX_TOKENS[kind])
    try:
        found.num_rows = num_rows(path, kind)
    except DataError as error:
        found.error = str(error)
    return found


# ------------------------------------------------------------------------------------------------ all rows
def _inspect_all(found: Sequence[FileFacts], config: CheckConfig, progress: Progress) -> None:
    """Fill `rows` of each file, by several processes where that pays."""
    spans = [(number, rows) for number, file in enumerate(found) for rows in _spans(file, config.max_rows)]
    total = sum(len(rows) for _, rows in spans)
    cores = len(os.sched_getaffinity(0))
    workers = config.num_workers or max(1, min(cores, total // WORKER_WORTH_ROWS + 1))
    results: dict[int, list[RowFacts]] = {}
    done = 0
    for span, facts in _map_spans(found, spans, config, min(workers, max(1, len(spans)))):
        results[span] = facts
        done += len(facts)
        progress(done, total)
    for span, (number, _) in enumerate(spans):
        found[number].rows += results[span]


def _spans(file: FileFacts, max_rows: int) -> Iterator[list[int]]:
    rows: Sequence[int] = range(file.num_rows)
    if 0 < max_rows < file.num_rows:
        rows = [math.floor(at * file.num_rows / max_rows) for at in range(max_rows)]
    for start in range(0, len(rows), SPAN_ROWS):
        yield list(rows[start : start + SPAN_ROWS])


def _map_spans(
    found: Sequence[FileFacts], spans: Sequence[tuple[int, list[int]]], config: CheckConfig, workers: int
) -> Iterator[tuple[int, list[RowFacts]]]:
    """(span, facts) as they come."""

    def arguments(number: int, rows: list[int]) -> tuple[Path, FileKind, list[int], FactSettings]:
        file = found[number]
        settings = FactSettings(
            reader=config.reader,
            limits=file.limits,
            pixels=config.pixels,
            processor=config.processor,
            min_pixels=config.min_pixels,
            max_pixels=config.max_pixels,
        )
        return file.path, file.kind, rows, settings

    if workers == 1:
        for span, (number, rows) in enumerate(spans):
            yield span, inspect_rows(*arguments(number, rows))
        return
    # A forked child would inherit the locks of Arrow's and the tokenizer's threads.
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        futures = {
            pool.submit(inspect_rows, *arguments(number, rows)): span for span, (number, rows) in enumerate(spans)
        }
        for future in as_completed(futures):
            yield futures[future], future.result()


# ------------------------------------------------------------------------------------------------ the report
def report(found: Sequence[FileFacts], config: CheckConfig, seconds: float) -> dict[str, Any]:
    """The report on rows that have been looked at, as JSON values."""
    files = [_file_summary(file) for file in found]
    used = [(file, row) for file in found for row in file.rows if not row.kind]
    checked = sum(len(file.rows) for file in found)
    return {
        "version": REPORT_VERSION,
        "ok": all(file["usable"] > 0 for file in files),
        "files": files,
        "rows": {"all": sum(file.num_rows for file in found), "checked": checked, "usable": len(used)},
        "problems": _by_kind([(f, row, [row.kind]) for f in found for row in f.rows if row.kind], with_example=True),
        "notes": _by_kind([(f, row, row.notes) for f, row in used] + _double_ids(found)),
        "images": _images(used),
        "tokens": _tokens(used),
        "cut": _cut(used),
        "box_frame": [_frame(file, config) for file in found if file.kind == "tasks" and file.rows],
        "copies": _copies(used) if config.pixels else None,
        "contents": {
            "data_source": _counts(row.data_source for _, row in used),
            "split": _counts(row.split or "(none)" for _, row in used),
            "transform": _counts(name for _, row in used for name in row.transforms or ("(none)",)),
            "assistant turns": _counts(str(row.turns) for _, row in used if row.turns),
            "with a box": sum(row.box_frac is not None for _, row in used),
        },
        "settings": {
            "bbox_frame": config.reader.bbox_frame,
            "image_folder": config.reader.image_folder,
            "processor": config.processor,
            "pixels": config.pixels,
            "max_rows": config.max_rows,
        },
        "seconds": round(seconds, 2),
    }


def _file_summary(file: FileFacts) -> dict[str, Any]:
    usable = sum(not row.kind for row in file.rows)
    error = file.error
    if not error and not usable:
        first = next((row for row in file.rows), None)
        error = f"no usable row; the first one: {first.message}" if first else "no rows at all"
    return {
        "path": str(file.path),
        "kind": file.kind,
        "held_out": file.held_out,
        "rows": file.num_rows,
        "checked": len(file.rows),
        "usable": usable,
        "error": error,
        "limits": {
            "factor": file.limits.factor,
            "min_pixels": file.limits.min_pixels,
            "max_pixels": file.limits.max_pixels,
            "max_tokens": file.max_tokens,
        },
    }


def _by_kind(
    rows: Sequence[tuple[FileFacts, RowFacts, list[str]]], *, with_example: bool = False
) -> list[dict[str, Any]]:
    """Kinds, most frequent first, with their rows by file."""
    where: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    examples: dict[str, str] = {}
    for file, row, kinds in rows:
        for kind in dict.fromkeys(kinds):
            where[kind][str(file.path)].append(row.row)
            examples.setdefault(kind, f"{file.path}, row {row.row}: {row.message}")
    counted = [
        {
            "kind": kind,
            "count": sum(map(len, places.values())),
            "rows": {path: numbers[:LISTED_ROWS] for path, numbers in places.items()},
            **({"example": examples[kind]} if with_example else {}),
        }
        for kind, places in where.items()
    ]
    return sorted(counted, key=lambda entry: (-int(entry["count"]), str(entry["kind"])))


def _double_ids(found: Sequence[FileFacts]) -> list[tuple[FileFacts, RowFacts, list[str]]]:
    """Rows whose id or index another row of the same file and source has had before."""
    double = []
    for file in found:
        seen: set[tuple[str, str, str]] = set()
        for row in file.rows:
            key = (row.data_source, row.split, row.index)
            if row.index and not row.kind and key in seen:
                double.append((file, row, ["id (or extra_info.index) that came before"]))
            seen.add(key)
    return double


def _counts(values: Iterator[str] | Any) -> dict[str, int]:
    return dict(Counter(values).most_common())


def histogram(values: Sequence[float], bins: int = HISTOGRAM_BINS) -> dict[str, Any]:
    """Counts in bins of equal width on a logarithmic scale, and what is told of a set in a line."""
    if not len(values):
        return {"count": 0}
    numbers = np.asarray(values, dtype=float)
    low, high = float(numbers.min()), float(numbers.max())
    edges = np.geomspace(max(low, 1), max(high, low + 1, 2), bins + 1) if high > low else np.array([low, low + 1])
    edges[0], edges[-1] = min(edges[0], low), max(edges[-1], high)
    counts, _ = np.histogram(numbers, edges)
    quantiles = {f"p{q}": float(np.percentile(numbers, q)) for q in (5, 50, 95)}
    return {
        "count": len(numbers),
        "min": low,
        **quantiles,
        "max": high,
        "edges": [round(float(edge), 2) for edge in edges],
        "counts": counts.tolist(),
    }


def _images(used: Sequence[tuple[FileFacts, RowFacts]]) -> dict[str, Any]:
    sizes = [(size, file.limits) for file, row in used for size in row.sizes]
    seen = [limits.model_size(*size) for size, limits in sizes]
    return {
        "count": len(sizes),
        "widths": histogram([size[0] for size, _ in sizes]),
        "heights": histogram([size[1] for size, _ in sizes]),
        "pixels": histogram([size[0] * size[1] for size, _ in sizes]),
        "pixels seen by the model": histogram([width * height for width, height in seen]),
        "per row": _counts(str(len(row.sizes)) for _, row in used),
    }


def _tokens(used: Sequence[tuple[FileFacts, RowFacts]]) -> dict[str, Any]:
    """Tokens of images, and where a processor counts them of everything."""
    counted = [row.tokens for _, row in used if row.tokens]
    return {"images": histogram([row.image_tokens for _, row in used]), "all": histogram(counted)}


def _cut(used: Sequence[tuple[FileFacts, RowFacts]]) -> list[dict[str, Any]]:
    """What the limits change, with the rows."""
    kinds: list[tuple[FileFacts, RowFacts, list[str]]] = []
    for file, row in used:
        found = []
        if any(width * height > file.limits.max_pixels for width, height in row.sizes):
            found.append("image shrunk to max_pixels")
        if any(width * height < file.limits.min_pixels for width, height in row.sizes):
            found.append("image enlarged to min_pixels")
        if max(row.tokens, row.image_tokens) > file.max_tokens:
            found.append("more than max_tokens: the row is of no use")
        if row.box_model_px is not None and row.box_model_px < file.limits.factor / 2:
            found.append("box less than half a patch wide for the model: only a crop shows it")
        if found:
            kinds.append((file, row, found))
    return _by_kind(kinds)


def _frame(file: FileFacts, config: CheckConfig) -> dict[str, Any]:
    evidence = [row.evidence for row in file.rows if row.evidence is not None]
    turned = sum(
        row.evidence is not None and (row.evidence.swapped or any(name in ORIENTATIONS for name in row.transforms))
        for row in file.rows
    )
    verdict = judge_frame(evidence, turned)
    return {
        "path": str(file.path),
        "fits": verdict.fits,
        "configured": config.reader.bbox_frame,
        "reason": verdict.reason,
        "counts": verdict.counts,
    }


# ------------------------------------------------------------------------------------------------ copies
@dataclass(frozen=True, slots=True)
class _Picture:
    file: FileFacts
    row: RowFacts
    number: int
    held_out: bool

    def place(self) -> dict[str, Any]:
        return {"path": str(self.file.path), "row": self.row.row, "image": self.number}


def _copies(used: Sequence[tuple[FileFacts, RowFacts]]) -> dict[str, Any]:
    """Double rows, double pictures, and pictures that training and held-out rows share."""
    splits = {row.split for _, row in used} - {""}
    by_split = not any(file.held_out for file, _ in used) and len(splits) > 1
    pictures = [
        _Picture(file, row, number, row.split != "train" if by_split else file.held_out)
        for file, row in used
        for number in range(len(row.digests))
    ]
    first_of: dict[str, int] = {}
    first_held: dict[str, int] = {}
    for at, picture in enumerate(pictures):
        digest = picture.row.digests[picture.number]
        (first_held if picture.held_out else first_of).setdefault(digest, at)
    thumbs = as_thumbnails([picture.row.thumbnails[picture.number] for picture in pictures])
    train, held = list(first_of.values()), list(first_held.values())
    near = near_copies(thumbs, train, train)
    leaks = [(at, first_of[digest], "same", "exact") for digest, at in first_held.items() if digest in first_of]
    rest = [at for digest, at in first_held.items() if digest not in first_of]
    leaks += [(copy.first, copy.second, copy.variant, "near") for copy in near_copies(thumbs, rest, train, VARIANTS)]
    return {
        "pictures": len(pictures),
        "different": len({*first_of, *first_held}),
        "double_rows": _double_rows(used),
        "near_copies": {
            "count": len(near),
            "pairs": [
                {"image": pictures[copy.first].place(), "like": pictures[copy.second].place()}
                for copy in near[:LISTED_COPIES]
            ],
        },
        "leakage": {
            "held_out_by": "extra_info.split" if by_split else "--test" if held else "",
            "held_out_pictures": len(held),
            "exact": sum(how == "exact" for *_, how in leaks),
            "near": sum(how == "near" for *_, how in leaks),
            "pairs": [
                {
                    "held_out": pictures[a].place(),
                    "train": pictures[b].place(),
                    "how": how,
                    "variant": variant,
                    "same_question": pictures[a].row.question == pictures[b].row.question,
                }
                for a, b, variant, how in leaks[:LISTED_COPIES]
            ],
        },
    }


def _double_rows(used: Sequence[tuple[FileFacts, RowFacts]]) -> dict[str, Any]:
    """Rows with the images and the question of an earlier one."""
    seen: dict[tuple[Any, ...], tuple[FileFacts, RowFacts]] = {}
    pairs = []
    for file, row in used:
        if not row.digests:
            continue
        key = (*row.digests, row.question)
        if key in seen:
            other, earlier = seen[key]
            pairs.append(
                {
                    "row": {"path": str(file.path), "row": row.row},
                    "like": {"path": str(other.path), "row": earlier.row},
                }
            )
        seen.setdefault(key, (file, row))
    return {"count": len(pairs), "pairs": pairs[:LISTED_COPIES]}
