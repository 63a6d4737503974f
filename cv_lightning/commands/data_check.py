"""`python -m cv_lightning data check FILES`: what a data set holds and whether it will train."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cv_lightning.data.rows import ReaderConfig
from cv_lightning.files import write_text
from cv_lightning.types import CVLightningError

LISTED_ROWS = 12
PROGRESS_EVERY_S = 10.0


def main(argv: list[str]) -> int:
    """Check RL Parquet and SFT JSON files. Exit code 0: every file has usable rows; 1: one has none; 2: wrong usage."""
    parser = _parser()
    options = parser.parse_args(argv)
    from cv_lightning.factory.check import CheckConfig, check_files

    try:
        config = CheckConfig(
            reader=ReaderConfig(bbox_frame=options.bbox_frame, image_folder=options.image_folder),
            test_files=tuple(options.test),
            processor=options.processor,
            factor=options.factor,
            min_pixels=options.min_pixels,
            max_pixels=options.max_pixels,
            max_tokens=options.max_tokens,
            pixels=not options.headers_only,
            max_rows=options.max_rows,
            num_workers=options.workers,
        )
        report = check_files(options.files, config, _progress())
    except (CVLightningError, ValueError) as error:
        sys.stderr.write(f"data check: {error}\n")
        return 2
    if options.json:
        write_text(options.json, json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    if options.page:
        from cv_lightning.factory.page import write_page

        write_page(options.page, report)
    sys.stdout.write(summary(report) + "\n")
    if options.page:
        sys.stdout.write(f"page: {options.page.resolve().as_uri()}\n")
    return 0 if report["ok"] else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m cv_lightning data check", description=main.__doc__)
    parser.add_argument("files", nargs="+", metavar="FILES", help=".parquet (RL, benchmarks), .json or .jsonl (SFT)")
    parser.add_argument("--test", nargs="+", default=[], metavar="FILE", help="held-out files, for leakage")
    parser.add_argument("--processor", default="", help="model folder: count its tokens, use its pixel limits")
    parser.add_argument("--bbox-frame", choices=("given", "upright"), default="given", help="as in data.reader")
    parser.add_argument("--image-folder", default="", help="where relative image paths start (the file's folder)")
    parser.add_argument("--factor", type=int, default=32, help="patch factor without --processor: 28 or 32")
    parser.add_argument("--min-pixels", type=int, help="of an image for the model")
    parser.add_argument("--max-pixels", type=int, help="of an image for the model")
    parser.add_argument("--max-tokens", type=int, help="of a prompt (16,384) or a conversation (32,768)")
    parser.add_argument("--headers-only", action="store_true", help="decode no image: fast, finds no copies")
    parser.add_argument("--max-rows", type=int, default=0, help="rows of each file, evenly spread; 0: all")
    parser.add_argument("--workers", type=int, default=0, help="processes; 0: as it pays")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report here")
    parser.add_argument("--page", type=Path, metavar="FILE", help="write a self-contained HTML page here")
    return parser


def _progress() -> Callable[[int, int], None]:
    """Shows how far it has got: a line that is rewritten on a terminal, a line now and then in a log."""
    begun = last = time.perf_counter()
    live = sys.stderr.isatty()

    def show(done: int, total: int) -> None:
        nonlocal last
        now = time.perf_counter()
        if now - last < (0.1 if live else PROGRESS_EVERY_S) and not (live and done == total):
            return
        last = now
        rate = done / max(1e-9, now - begun)
        text = f"{done} of {total} rows, {rate:.0f} rows/s, {(total - done) / max(rate, 1e-9):.0f} s left"
        sys.stderr.write(f"\r{text:60}" + ("\n" if done == total else "") if live else text + "\n")
        sys.stderr.flush()

    return show


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
        return ["copies: not looked for (--headers-only)"]
    lines = [
        f"copies: {copies['double_rows']['count']} rows with image and question of an earlier one; "
        f"{copies['different']} different pictures of {copies['pictures']}, "
        f"{copies['near_copies']['count']} of them nearly another"
    ]
    leakage = copies["leakage"]
    if leakage["held_out_by"]:
        lines.append(
            f"leakage: of {leakage['held_out_pictures']} held-out pictures (by {leakage['held_out_by']}) "
            f"{leakage['exact']} are in the training rows, {leakage['near']} nearly (turned ones too)"
        )
    else:
        lines.append("leakage: name held-out files with --test")
    return lines
