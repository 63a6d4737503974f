"""`cv-lightning trajectories export RUN --out FILE`: stored trajectories as Parquet, for other tools."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

from cv_lightning.command_line import run_verb
from cv_lightning.evaluation.runs import find_stores
from cv_lightning.trajectory.parquet import write_parquet
from cv_lightning.types import DataError


def export(run: Path, out: Path | None = None, stores: list[str] | None = None) -> None:
    """Write trajectories and their images as one Parquet file, a row each.

    Args:
        run: A run's folder, or one of its stores.
        out: The file; by default trajectories.parquet in the run.
        stores: Stores by their path below the run, e.g. '[rl, eval/rl_greedy_tool]'; by default all.
    """
    found = {path.relative_to(run).as_posix(): path for path in find_stores(run)}
    if not found:
        raise DataError(f"{run}: no trajectories/*.jsonl here or below; give the folder that fit or test wrote")
    if unknown := [name for name in stores or () if name not in found]:
        raise DataError(f"--stores {', '.join(unknown)}: not in {run}, which has {', '.join(found)}")
    out = out or run / "trajectories.parquet"
    if out.suffix != ".parquet":
        raise DataError(f"--out {out}: the file is Parquet; end its name in .parquet")
    done = write_parquet({name: path for name, path in found.items() if not stores or name in stores}, out)
    missing = f" ({done.num_missing_images} missing)" if done.num_missing_images else ""
    print(f"{out}: {done.num_rows} trajectories, {done.num_images} images{missing}")
    if done.num_bad_lines:
        print(f"{done.num_bad_lines} unreadable lines skipped", file=sys.stderr)


main = partial(run_verb, export, name="trajectories export")
