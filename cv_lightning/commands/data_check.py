"""`cv-lightning data check FILES`: contents of a data set, and whether it will train."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any, Literal

from cv_lightning.command_line import put_json, run_verb
from cv_lightning.data.rows import ReaderConfig
from cv_lightning.factory.progress import progress

LISTED_ROWS = 12


def check(
    files: list[str],
    test: list[str] | None = None,
    processor: str = "",
    bbox_frame: Literal["given", "upright"] = "given",
    image_folder: str = "",
    factor: int = 32,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
    max_tokens: int | None = None,
    headers_only: bool = False,
    max_rows: int = 0,
    workers: int = 0,
    json: Path | None = None,
    page: Path | None = None,
) -> int:
    """Check RL Parquet and SFT JSON files. Exit code 0: every file has usable rows; 1: one has none; 2: wrong usage.

    Args:
        files: Files: .parquet (RL, benchmarks), .json or .jsonl (SFT).
        test: Held-out files, to search for leakage.
        processor: Model folder, whose tokens are counted and whose pixel limits apply.
        bbox_frame: Frame of the boxes, as in data.reader.
        image_folder: Folder of relative image paths; by default the file's folder.
        factor: Side in pixels of an image token without --processor: 28 or 32.
        min_pixels: Smallest image that the model sees, in pixels.
        max_pixels: Largest image that the model sees, in pixels.
        max_tokens: Most tokens of a prompt (16,384) or a conversation (32,768).
        headers_only: Decode no image: fast, but copies are not found.
        max_rows: Rows of each file, evenly spread; 0: all.
        workers: Processes; 0: chosen by the number of rows.
        json: Write the report into this file; - prints it as JSON.
        page: File for a self-contained HTML page.
    """
    from cv_lightning.factory.check import check_files
    from cv_lightning.factory.check_facts import CheckConfig, content_of_row
    from cv_lightning.viewer.check_page import write_check_page

    config = CheckConfig(
        reader=ReaderConfig(bbox_frame=bbox_frame, image_folder=image_folder),
        test_files=tuple(test or ()),
        processor=processor,
        factor=factor,
        min_pixels=min_pixels,
        max_pixels=max_pixels,
        max_tokens=max_tokens,
        pixels=not headers_only,
        max_rows=max_rows,
        num_workers=workers,
    )
    with progress("rows") as show:
        report = check_files(files, config, show)
    printed = put_json(json, report)
    if not printed:
        print(summary(report))
    if page:
        kinds = {file["path"]: file["kind"] for file in report["files"]}
        write_check_page(page, report, lambda file, row: content_of_row(Path(file), kinds[file], row, config.reader))
        print(f"page: {page.resolve().as_uri()}", file=sys.stderr if printed else sys.stdout)
    return 0 if report["ok"] else 1


# ------------------------------------------------------------------------------------------------ the summary
def summary(report: dict[str, Any]) -> str:
    """The report for a terminal."""
    lines = [_file_line(file) for file in report["files"]]
    for title, key in (("skipped in training", "problems"), ("worth a look", "notes"), ("at these limits", "cut")):
        if report[key]:
            lines += ["", f"{title}:", *(line for entry in report[key] for line in _kind_lines(entry))]
    lines += ["", *_size_lines(report), ""]
    lines += [f"boxes of {Path(f['path']).name}: {_frame_text(f)}" for f in report["box_frame"]]
    lines += _copy_lines(report["copies"])
    rows = report["rows"]
    lines.append(f"{rows['usable']} of {rows['checked']} rows usable, looked at in {report['seconds']:.1f} s")
    return "\n".join(lines)


def _file_line(file: dict[str, Any]) -> str:
    if file["error"]:
        return f"{file['path']}: CANNOT BE USED: {file['error']}"
    part = "" if file["checked"] == file["rows"] else f" of {file['checked']} looked at"
    role = ", held out" if file["held_out"] else ""
    return f"{file['path']}: {file['rows']} rows of {file['kind']}{role}, {file['usable']} usable{part}"


def _kind_lines(entry: dict[str, Any]) -> list[str]:
    lines = [f"  {entry['count']:6} x {entry['kind']}"]
    for path, rows in entry["rows"].items():
        more = ", ..." if len(rows) > LISTED_ROWS else ""
        lines.append(f"           {Path(path).name}, rows {', '.join(map(str, rows[:LISTED_ROWS]))}{more}")
    if "example" in entry:
        lines.append(f"           first: {entry['example']}")
    return lines


def _size_lines(report: dict[str, Any]) -> list[str]:
    named = {
        "image width": report["images"]["widths"],
        "image height": report["images"]["heights"],
        "image tokens a row": report["tokens"]["images"],
        "tokens a row": report["tokens"]["all"],
    }
    lines = [f"{'':20}{'least':>9}{'5 %':>9}{'median':>9}{'95 %':>9}{'most':>9}"]
    for name, values in named.items():
        if values["count"]:
            numbers = "".join(f"{values[key]:9.0f}" for key in ("min", "p5", "p50", "p95", "max"))
            lines.append(f"{name:20}{numbers}")
    if not report["tokens"]["all"]["count"]:
        lines.append("(texts are counted with --processor FOLDER)")
    return lines


def _frame_text(frame: dict[str, Any]) -> str:
    if frame["fits"] == "unknown":
        return f"no frame stands out ({frame['reason']})"
    wrong = frame["fits"] != frame["configured"]
    advice = f"; SET data.reader.bbox_frame TO {frame['fits']}" if wrong else ", as configured"
    return f"the frame is {frame['fits']}{advice} ({frame['reason']})"


def _copy_lines(copies: dict[str, Any] | None) -> list[str]:
    if copies is None:
        return ["copies: not looked for (--headers_only)"]
    lines = [
        f"copies: {copies['double_rows']['count']} rows with image and question of an earlier one; "
        f"{copies['different']} different images of {copies['pictures']}, "
        f"{copies['near_copies']['count']} of them nearly another"
    ]
    leakage = copies["leakage"]
    if leakage["held_out_by"]:
        lines.append(
            f"leakage: of {leakage['held_out_pictures']} held-out images (by {leakage['held_out_by']}) "
            f"{leakage['exact']} are in the training rows, {leakage['near']} nearly (turned ones too)"
        )
    else:
        lines.append("leakage: name held-out files with --test")
    return lines


main = partial(run_verb, check, name="data check")
