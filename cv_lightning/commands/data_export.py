"""`python -m cv_lightning data export OUT`: the embedded digits in the formats that users bring."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from cv_lightning.data.sources import DigitDemonstrations
from cv_lightning.digits.demonstrations import DemonstrationConfig
from cv_lightning.digits.scenes import DigitsConfig
from cv_lightning.factory.export import write_digits_parquet, write_digits_sft_json


def main(argv: list[str]) -> int:
    """Write scenes to a .parquet file (RL), or demonstrations on scenes to a .json file (SFT). Exit code 0 or 2."""
    parser = argparse.ArgumentParser(prog="python -m cv_lightning data export", description=main.__doc__)
    parser.add_argument("out", type=Path, metavar="OUT", help="file to write: .parquet (RL) or .json (SFT)")
    parser.add_argument("--count", type=int, default=256, help="rows (default 256)")
    parser.add_argument("--split", choices=("train", "held_out"), default="train", help="which digits (.parquet only)")
    parser.add_argument("--seed", type=int, default=0, help="of the scenes (default 0)")
    parser.add_argument(
        "--tool-share", type=float, default=0.4, help="share of the tasks with a use for the tool that show it (.json)"
    )
    options = parser.parse_args(argv)
    if options.count < 1:
        parser.error(f"--count {options.count}: at least 1")
    digits = DigitsConfig(seed=options.seed)
    if options.out.suffix == ".parquet":
        write_digits_parquet(options.out, digits, options.split, options.count)
    elif options.out.suffix == ".json":
        if options.split != "train":
            parser.error("--split held_out: demonstrations are made on training scenes only; write a .parquet file")
        _write_demonstrations(options.out, digits, options.tool_share, options.count)
    else:
        parser.error(f"OUT {options.out}: the name must end in .parquet (RL) or .json (SFT)")
    sys.stdout.write(f"{options.count} rows in {options.out}\n")
    return 0


def _write_demonstrations(path: Path, digits: DigitsConfig, tool_share: float, count: int) -> None:
    from cv_lightning.sandbox import Sandbox, SandboxConfig

    with Sandbox(SandboxConfig()) as sandbox:
        source = DigitDemonstrations(digits, DemonstrationConfig(tool_share=tool_share), sandbox.run_sync)
        write_digits_sft_json(path, source, count)
