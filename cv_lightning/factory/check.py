"""`data check`: content of files, rows that training would skip or truncate, frame of boxes, duplicates, leakage."""

from __future__ import annotations

import math
import os
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from cv_lightning.data.rows import expand_files
from cv_lightning.factory.check_facts import CheckConfig, FileKind, RowFacts, inspect_rows, num_rows, token_counter
from cv_lightning.factory.check_frames import judge_frame
from cv_lightning.factory.near_images import SAME, VARIANTS, NearImages
from cv_lightning.images import ImageLimits, ImageRule
from cv_lightning.types import DataError

REPORT_VERSION = 1
RECIPE_MIN_PIXELS = 784
RECIPE_MAX_PIXELS = {"tasks": 6_422_528, "conversations": 262_144}
RECIPE_MAX_TOKENS = {"tasks": 16_384, "conversations": 32_768}
SPAN_ROWS = 64
"""Rows that a worker inspects per call."""
ROWS_PER_WORKER = 400
"""Rows for which starting a further process is worth its time."""
LISTED_ROWS = 1000
"""Rows of a kind that the report lists; the count is always complete."""
LISTED_COPIES = 500
HISTOGRAM_BINS = 20

Progress = Callable[[int, int], None]
"""Called with the number of rows done and of all rows."""


@dataclass(slots=True)
class FileFacts:
    """A file and the facts about its rows."""

    path: Path
    kind: FileKind
    held_out: bool
    limits: ImageRule
    max_tokens: int
    num_rows: int = 0
    error: str = ""
    """Reason why the file cannot be read; empty: it can."""
    rows: list[RowFacts] = field(default_factory=list)
    """Inspected rows in the file's order; a sample if `max_rows` is set."""


Used = Sequence[tuple[FileFacts, RowFacts]]
"""Usable rows with their files."""
Kinds = Iterable[tuple[FileFacts, RowFacts, Sequence[str]]]
"""Rows with the kinds of problems or notes about them."""


def check_files(files: Sequence[str], config: CheckConfig, progress: Progress | None = None) -> dict[str, Any]:
    """Inspect every row of files.

    Args:
        files: Parquet files of tasks, and JSON or JSON Lines files of conversations.
        config: Options and limits.
        progress: Called after each span of rows.

    Returns:
        The report, JSON values only; `ok` is False if a file has no usable row.

    Raises:
        DataError: A file does not exist, or its name ends in neither .parquet, .json nor .jsonl.
        CheckpointError: The folder has no processor.
    """
    begun = time.perf_counter()
    train = [(path, False) for path in expand_files(files, "FILES")]
    test = [(path, True) for path in expand_files(config.test_files, "--test")] if config.test_files else []
    for path, _ in train + test:
        if path.suffix not in (".parquet", ".json", ".jsonl"):
            raise DataError(f"{path}: the name must end in .parquet (tasks), .json or .jsonl (conversations)")
    found = [_file(path, config, held_out) for path, held_out in dict(train + test).items()]
    _inspect_all(found, config, progress or (lambda done, total: None))
    return report(found, config, time.perf_counter() - begun)


def _file(path: Path, config: CheckConfig, held_out: bool) -> FileFacts:
    kind: FileKind = "tasks" if path.suffix == ".parquet" else "conversations"
    if config.processor:
        limits: ImageRule = token_counter(config).limits
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
    """Fill `rows` of each file, with several processes if there are rows enough."""
    spans = [(file, rows) for file in found for rows in _spans(file, config.max_rows)]
    total, done = sum(len(rows) for _, rows in spans), 0
    workers = config.num_workers or min(len(os.sched_getaffinity(0)), total // ROWS_PER_WORKER + 1)
    results: dict[int, list[RowFacts]] = {}
    for span, facts in _map_spans(spans, config, max(1, min(workers, len(spans)))):
        results[span] = facts
        done += len(facts)
        progress(done, total)
    for span, (file, _) in enumerate(spans):
        file.rows += results[span]


def _spans(file: FileFacts, max_rows: int) -> Iterator[list[int]]:
    rows: Sequence[int] = range(file.num_rows)
    if 0 < max_rows < file.num_rows:
        rows = [math.floor(at * file.num_rows / max_rows) for at in range(max_rows)]
    for start in range(0, len(rows), SPAN_ROWS):
        yield list(rows[start : start + SPAN_ROWS])


def _map_spans(
    spans: Sequence[tuple[FileFacts, list[int]]], config: CheckConfig, workers: int
) -> Iterator[tuple[int, list[RowFacts]]]:
    """(number of the span, facts) in the order of completion."""
    calls = [(file.path, file.kind, rows, config, file.limits) for file, rows in spans]
    if workers == 1:
        yield from ((span, inspect_rows(*call)) for span, call in enumerate(calls))
        return
    # A forked child would inherit the locks of Arrow's and the tokenizer's threads.
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        futures = {pool.submit(inspect_rows, *call): span for span, call in enumerate(calls)}
        yield from ((futures[future], future.result()) for future in as_completed(futures))


# ------------------------------------------------------------------------------------------------ the report
def report(found: Sequence[FileFacts], config: CheckConfig, seconds: float) -> dict[str, Any]:
    """The report on inspected rows, as JSON values."""
    files = [_file_summary(file) for file in found]
    used = [(file, row) for file in found for row in file.rows if not row.kind]
    checked = sum(len(file.rows) for file in found)
    return {
        "version": REPORT_VERSION,
        "ok": all(file["usable"] > 0 for file in files),
        "files": files,
        "rows": {"all": sum(file.num_rows for file in found), "checked": checked, "usable": len(used)},
        "problems": _by_kind([(f, row, [row.kind]) for f in found for row in f.rows if row.kind], with_example=True),
        "notes": _by_kind([(f, row, row.notes) for f, row in used] + _repeated_ids(used)),
        "images": _images(used),
        "tokens": {
            "images": histogram([row.image_tokens for _, row in used]),
            "all": histogram([row.tokens for _, row in used if row.tokens]),
        },
        "cut": _by_kind((file, row, _changes_by_limits(file, row)) for file, row in used),
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
        error = f"no usable row; the first one: {file.rows[0].message}" if file.rows else "no rows at all"
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


def _by_kind(rows: Kinds, *, with_example: bool = False) -> list[dict[str, Any]]:
    """Kinds, most frequent first, with their rows by file."""
    where: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    examples: dict[str, dict[str, str]] = defaultdict(dict)
    for file, row, kinds in rows:
        for kind in dict.fromkeys(kinds):
            where[kind][str(file.path)].append(row.row)
            if with_example:
                examples[kind].setdefault("example", f"{file.path}, row {row.row}: {row.message}")
    counted = [
        {
            "kind": kind,
            "count": sum(map(len, places.values())),
            "rows": {path: numbers[:LISTED_ROWS] for path, numbers in places.items()},
            **examples[kind],
        }
        for kind, places in where.items()
    ]
    return sorted(counted, key=lambda entry: (-int(entry["count"]), str(entry["kind"])))


def _repeated_ids(used: Used) -> list[tuple[FileFacts, RowFacts, list[str]]]:
    """Rows whose id or index is that of an earlier row of the same file, source and split."""
    repeated = []
    seen: set[tuple[Path, str, str, str]] = set()
    for file, row in used:
        key = (file.path, row.data_source, row.split, row.index)
        if row.index and key in seen:
            repeated.append((file, row, ["id (or extra_info.index) that came before"]))
        seen.add(key)
    return repeated


def _counts(values: Iterable[str]) -> dict[str, int]:
    return dict(Counter(values).most_common())


def histogram(values: Sequence[float]) -> dict[str, Any]:
    """Counts in bins of equal width on a logarithmic scale, with count, extremes and percentiles."""
    if not len(values):
        return {"count": 0}
    numbers = np.asarray(values, dtype=float)
    low, high = float(numbers.min()), float(numbers.max())
    edges = (
        np.geomspace(max(low, 1), max(high, low + 1, 2), HISTOGRAM_BINS + 1) if high > low else np.array([low, low + 1])
    )
    edges[0], edges[-1] = min(edges[0], low), max(edges[-1], high)
    counts, _ = np.histogram(numbers, edges)
    return {
        "count": len(numbers),
        "min": low,
        **{f"p{q}": float(np.percentile(numbers, q)) for q in (5, 50, 95)},
        "max": high,
        "edges": [round(float(edge), 2) for edge in edges],
        "counts": counts.tolist(),
    }


def _images(used: Used) -> dict[str, Any]:
    sizes = [size for _, row in used for size in row.sizes]
    seen = [file.limits.model_size(*size) for file, row in used for size in row.sizes]
    return {
        "count": len(sizes),
        "widths": histogram([width for width, _ in sizes]),
        "heights": histogram([height for _, height in sizes]),
        "pixels": histogram([width * height for width, height in sizes]),
        "pixels seen by the model": histogram([width * height for width, height in seen]),
        "per row": _counts(str(len(row.sizes)) for _, row in used),
    }


def _changes_by_limits(file: FileFacts, row: RowFacts) -> list[str]:
    """Effects of the limits on a row."""
    pixels = [width * height for width, height in row.sizes]
    half_patch = file.limits.factor / 2
    effects = {
        "image shrunk to max_pixels": max(pixels, default=0) > file.limits.max_pixels,
        "image enlarged to min_pixels": min(pixels, default=math.inf) < file.limits.min_pixels,
        "more than max_tokens: the row is of no use": max(row.tokens, row.image_tokens) > file.max_tokens,
        "box less than half a patch wide for the model: only a crop shows it": (
            row.box_model_px is not None and row.box_model_px < half_patch
        ),
    }
    return [effect for effect, holds in effects.items() if holds]


def _frame(file: FileFacts, config: CheckConfig) -> dict[str, Any]:
    verdict = judge_frame([row.evidence for row in file.rows if row.evidence is not None])
    return {"path": str(file.path), "configured": config.reader.bbox_frame, **asdict(verdict)}


# ------------------------------------------------------------------------------------------------ copies
@dataclass(frozen=True, slots=True)
class _CheckedImage:
    """An image of a question."""

    file: FileFacts
    row: RowFacts
    number: int
    held_out: bool

    @property
    def digest(self) -> str:
        return self.row.digests[self.number]

    @property
    def thumbnail(self) -> bytes:
        return self.row.thumbnails[self.number]

    def place(self) -> dict[str, Any]:
        return {**_place(self.file, self.row), "image": self.number}


def _place(file: FileFacts, row: RowFacts) -> dict[str, Any]:
    return {"path": str(file.path), "row": row.row}


def _copies(used: Used) -> dict[str, Any]:
    """Duplicate rows, duplicate images, and images that training and held-out rows share."""
    splits = {row.split for _, row in used} - {""}
    by_split = not any(file.held_out for file, _ in used) and len(splits) > 1
    images = [
        _CheckedImage(file, row, number, row.split not in ("", "train") if by_split else file.held_out)
        for file, row in used
        for number in range(len(row.digests))
    ]
    first: dict[bool, dict[str, int]] = {False: {}, True: {}}
    for at, image in enumerate(images):
        first[image.held_out].setdefault(image.digest, at)
    known, train = NearImages(), list(first[False].values())
    near: list[tuple[int, int]] = []
    for at in train:
        if found := known.find(images[at].thumbnail):
            near.append((at, train[found[0]]))
        known.add(images[at].thumbnail)
    exact = [(at, first[False][digest], SAME) for digest, at in first[True].items() if digest in first[False]]
    rest = [at for digest, at in first[True].items() if digest not in first[False]]
    searched = [(at, known.find(images[at].thumbnail, VARIANTS)) for at in rest]
    turned = [(at, train[found[0]], found[1]) for at, found in searched if found]
    return {
        "pictures": len(images),
        "different": len({*first[False], *first[True]}),
        "double_rows": _duplicate_rows(used),
        "near_copies": {
            "count": len(near),
            "pairs": [{"image": images[a].place(), "like": images[b].place()} for a, b in near[:LISTED_COPIES]],
        },
        "leakage": {
            "held_out_by": "extra_info.split" if by_split else "--test" if first[True] else "",
            "held_out_pictures": len(first[True]),
            "exact": len(exact),
            "near": len(turned),
            "pairs": [
                {
                    "held_out": images[a].place(),
                    "train": images[b].place(),
                    "how": "exact" if at < len(exact) else "near",
                    "variant": variant,
                    "same_question": images[a].row.question == images[b].row.question,
                }
                for at, (a, b, variant) in enumerate([*exact, *turned][:LISTED_COPIES])
            ],
        },
    }


def _duplicate_rows(used: Used) -> dict[str, Any]:
    """Rows with the images and the question of an earlier one."""
    seen: dict[tuple[str, ...], dict[str, Any]] = {}
    pairs = []
    for file, row in used:
        if row.digests:
            place = _place(file, row)
            earlier = seen.setdefault((*row.digests, row.question), place)
            if earlier is not place:
                pairs.append({"row": place, "like": earlier})
    return {"count": len(pairs), "pairs": pairs[:LISTED_COPIES]}
