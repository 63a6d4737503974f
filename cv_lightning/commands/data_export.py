"""`cv-lightning data export OUT`: the embedded digits in the formats of users' data."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

from jsonargparse.typing import PositiveInt

from cv_lightning.command_line import run_verb
from cv_lightning.digits.demonstrations import DemonstrationConfig
from cv_lightning.digits.export import write_digits_parquet, write_digits_sft_json
from cv_lightning.digits.scenes import DigitsConfig, Split
from cv_lightning.digits.sources import DigitDemonstrations
from cv_lightning.types import DataError


def export_digits(
    out: Path, count: PositiveInt = 256, split: Split = "train", seed: int = 0, tool_share: float = 0.4
) -> None:
    """Write scenes to a .parquet file (RL), or demonstrations on scenes to a .json file (SFT).

    Args:
        out: File to write: .parquet (RL) or .json (SFT).
        count: Number of rows.
        split: Training or held-out digits (.parquet only).
        seed: Seed of the scenes.
        tool_share: Fraction of the tasks that need the tool in which it is shown (.json only).
    """
    digits = DigitsConfig(seed=seed)
    if out.suffix == ".parquet":
        write_digits_parquet(out, digits, split, count)
    elif out.suffix != ".json":
        raise DataError(f"{out}: the name must end in .parquet (RL) or .json (SFT)")
    elif split != "train":
        raise DataError("--split held_out: demonstrations are made on training scenes only; write a .parquet file")
    else:
        _write_demonstrations(out, digits, tool_share, count)
    sys.stdout.write(f"{count} rows in {out}\n")


def _write_demonstrations(path: Path, digits: DigitsConfig, tool_share: float, count: int) -> None:
    from cv_lightning.sandbox import Sandbox, SandboxConfig

    with Sandbox(SandboxConfig()) as sandbox:
        source = DigitDemonstrations(digits, DemonstrationConfig(tool_share=tool_share), sandbox.run_sync)
        write_digits_sft_json(path, source, count)


main = partial(run_verb, export_digits, name="data export")
