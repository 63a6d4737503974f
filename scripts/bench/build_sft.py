"""Speed of `data build-sft` with the offline teacher: verified conversations a second, start of the sandbox included.

    python scripts/bench/build_sft.py [--json FILE] [--check] [--rows 1000] [--side 384]

The table holds the embedded digits, every other row with a small box; images, calls, checks and files are real. The
written file is verified from disk afterwards, which is not part of the time.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

import pyarrow as pa  # noqa: E402
import pyarrow.parquet as pq  # noqa: E402

from cv_lightning.digits.scenes import DigitsConfig, digit_task  # noqa: E402
from cv_lightning.factory.build_sft import BuildSFT, build_sft  # noqa: E402

BAR = 50.0
"""Verified conversations a second on two cores."""


def write_table(path: Path, count: int, side: int) -> None:
    """Upright scenes of the digits as a table of VQA; small ones have a box.

    Args:
        path: Parquet file.
        count: rows.
        side: of the large images, in pixels.
    """
    config, rows = DigitsConfig(original_side=side), []
    for index in range(count):
        task = digit_task(config, "train", index, "upright" if index % 2 else "small")
        buffer = io.BytesIO()
        task.images[0].save(buffer, format="PNG", compress_level=1)
        box = list(task.box) if task.box is not None and not index % 2 else None
        image = {"bytes": buffer.getvalue(), "path": None}
        rows.append({"image": image, "question": task.question, "answer": task.ground_truth, "bbox": box})
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=256)


def measure(count: int, side: int) -> dict[str, float]:
    """Build once in a folder of its own."""
    with tempfile.TemporaryDirectory() as folder:
        table = Path(folder) / "digits.parquet"
        write_table(table, count, side)
        report = build_sft(BuildSFT(files=[str(table)], out=Path(folder) / "sft.json", verify=True))
    return {
        "build_sft_per_s": report["per_second"],
        "kept": float(report["kept"]),
        "tried": float(report["tried"]),
        "verified_share": report["verification"]["verified"] / report["verification"]["conversations"],
        "seconds": report["seconds"],
    }


def main() -> int:
    """Measure; with --check the exit code says whether the bar is met and everything verified."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--check", action="store_true", help="exit code 1 below the bar")
    parser.add_argument("--rows", type=int, default=1000, help="conversations")
    parser.add_argument("--side", type=int, default=384, help="side of the large images in pixels")
    options = parser.parse_args()
    found = measure(options.rows, options.side)
    speed, share = found["build_sft_per_s"], found["verified_share"]
    print(
        f"build-sft, offline teacher: {speed:.0f} conversations/s (bar {BAR:g}), {found['kept']:.0f} of "
        f"{found['tried']:.0f} kept, {share:.1%} of them verified from the file"
    )
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))
    met = speed >= BAR and share == 1.0
    return int(options.check and not met)


if __name__ == "__main__":
    sys.exit(main())
