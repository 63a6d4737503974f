"""The embedded digits in the file formats that users bring: RL Parquet and SFT JSON."""

from __future__ import annotations

from pathlib import Path

from cv_lightning.data.writers import write_sft_json, write_task_parquet
from cv_lightning.digits.scenes import DigitsConfig, Split
from cv_lightning.digits.sources import DigitDemonstrations, DigitTasks, HeldOutScenes


def write_digits_parquet(path: str | Path, digits: DigitsConfig, split: Split, count: int) -> None:
    """Write scenes to an RL file, kinds balanced by the config's shares (equally in the held-out split).

    Args:
        path: file to write.
        digits: looks, shares and seed.
        split: which digits the scenes are made of.
        count: number of rows.
    """
    if split == "train":
        tasks = DigitTasks(digits).batch(0, count)
    else:
        kinds = list(digits.kind_shares)
        counts = {kind: count // len(kinds) + (at < count % len(kinds)) for at, kind in enumerate(kinds)}
        scenes = HeldOutScenes(digits, counts)
        tasks = [scenes.row(position) for position in range(len(scenes))]
    write_task_parquet(path, tasks, split)


def write_digits_sft_json(path: str | Path, source: DigitDemonstrations, count: int) -> None:
    """Write demonstrations on training scenes to an SFT file, images into a folder beside it.

    Args:
        path: file to write; the folder has its stem and `_images`.
        source: scenes and what is shown on them.
        count: number of conversations.
    """
    write_sft_json(path, source.batch(0, count))
