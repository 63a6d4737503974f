"""Files of the embedded digits in the formats of users' data: RL Parquet and SFT JSON."""

from __future__ import annotations

from pathlib import Path

from cv_lightning.data.writers import write_sft_json, write_task_parquet
from cv_lightning.digits.scenes import DigitsConfig, Split
from cv_lightning.digits.sources import DigitDemonstrations, DigitTasks, HeldOutScenes


def write_digits_parquet(path: str | Path, digits: DigitsConfig, split: Split, count: int) -> None:
    """Write scenes to an RL file, kinds in the config's shares (equal ones in the held-out split).

    Args:
        path: File to write.
        digits: Look, shares and seed.
        split: Digits that the scenes are made of.
        count: Number of rows.
    """
    if split == "train":
        tasks = DigitTasks(digits).batch(0, count)
    else:
        kinds = list(digits.kind_shares)
        scenes = HeldOutScenes(digits, {kind: len(range(at, count, len(kinds))) for at, kind in enumerate(kinds)})
        tasks = [scenes.row(position) for position in range(len(scenes))]
    write_task_parquet(path, tasks, split)


def write_digits_sft_json(path: str | Path, source: DigitDemonstrations, count: int) -> None:
    """Write `count` demonstrations on training scenes to an SFT file, and their images to a folder beside it."""
    write_sft_json(path, source.batch(0, count))
