"""How long the command line takes to answer, against a bare import of LightningCLI in the same run.

    python scripts/bench/startup.py [--json FILE] [--repeat N]

Writes `help_s`, `wrong_verb_s`, `doctor_help_s` (seconds) and `fit_help_over_import`, `print_config_over_import`,
`bad_key_over_import` (ratios). Runs are interleaved; medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

PYTHON = [sys.executable]
CONFIG = ["fit", "--config", "configs/quickstart/grpo.yaml"]
COMMANDS = {
    "import": [*PYTHON, "-c", "import lightning.pytorch.cli"],
    "help": [*PYTHON, "-m", "cv_lightning", "--help"],
    "wrong_verb": [*PYTHON, "-m", "cv_lightning", "fitt"],
    "doctor_help": [*PYTHON, "-m", "cv_lightning", "doctor", "--help"],
    "fit_help": [*PYTHON, "-m", "cv_lightning", "fit", "--help"],
    "print_config": [*PYTHON, "-m", "cv_lightning", *CONFIG, "--print_config"],
    "bad_key": [*PYTHON, "-m", "cv_lightning", *CONFIG, "--no_such_key", "1"],
}
HEAVY = ("fit_help", "print_config", "bad_key")


def seconds(command: list[str]) -> float:
    """Wall-clock time of one command, from the project's folder."""
    begun = time.perf_counter()
    subprocess.run(command, capture_output=True, cwd=Path(__file__).parents[2], check=False)
    return time.perf_counter() - begun


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--repeat", type=int, default=5)
    given = parser.parse_args()
    for command in COMMANDS.values():
        seconds(command)  # byte code and file cache
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(given.repeat):
        for name, command in COMMANDS.items():
            times[name].append(seconds(command))
    medians = {name: statistics.median(values) for name, values in times.items()}
    figures = {f"{name}_s": round(medians[name], 3) for name in medians if name not in HEAVY}
    figures |= {f"{name}_over_import": round(medians[name] / medians["import"], 3) for name in HEAVY}
    print(json.dumps(figures, indent=1))
    if given.json:
        given.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
