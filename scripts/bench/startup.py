"""How long the command line takes to answer, against a bare import of LightningCLI in the same run.

    python scripts/bench/startup.py [--json FILE] [--repeat N]

Writes `help_s`, `wrong_verb_s`, `doctor_help_s` (seconds) and `fit_help_over_import`, `print_config_over_import`,
`bad_key_over_import` (ratios), and of a GRPO run on a tiny model `fit_startup_s`: seconds from the command to the first
batch, less those in which the model and the engine are loaded; `fit_model_and_engine_s` are the latter. Runs are
interleaved; medians.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
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
LOADERS = {
    "cv_lightning.modules.base": ("load_policy", "load_processor"),
    "cv_lightning.callbacks.rollout": ("build_engine",),
}


def seconds(command: list[str]) -> float:
    """Wall-clock time of one command, from the project's folder."""
    begun = time.perf_counter()
    subprocess.run(command, capture_output=True, cwd=ROOT, check=False)
    return time.perf_counter() - begun


def first_batch() -> None:
    """Run `fit` up to its first batch; print the seconds until then, and those of loading. Needs its own process."""
    import psutil

    spent = 0.0

    def timed(load: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            nonlocal spent
            begun = time.perf_counter()
            try:
                return load(*args, **kwargs)
            finally:
                spent += time.perf_counter() - begun

        return run

    def arrived(*_: Any) -> None:
        whole = time.time() - psutil.Process().create_time()
        print(json.dumps([whole, spent]), flush=True)
        for child in psutil.Process().children(recursive=True):
            child.kill()
        os._exit(0)

    from cv_lightning.__main__ import main as run_verb
    from cv_lightning.environment import prepare_environment

    prepare_environment()
    for module, names in LOADERS.items():
        loaded = importlib.import_module(module)
        for name in names:
            setattr(loaded, name, timed(getattr(loaded, name)))
    importlib.import_module("cv_lightning.callbacks.rollout").RolloutCallback.on_train_batch_start = arrived
    sys.argv[1:] = fit = sys.argv[2:]
    run_verb(fit)


def fit_startup(tiny: Path) -> tuple[float, float]:
    """Seconds of one start: without loading, and of loading."""
    fit = [*CONFIG, "--model.init_args.policy.path", str(tiny), "--trainer.default_root_dir", str(tiny.parent / "run")]
    run = subprocess.run([*PYTHON, __file__, "--first_batch", *fit], capture_output=True, text=True, cwd=ROOT)
    lines = [line for line in run.stdout.splitlines() if line.startswith("[") and line.endswith("]")]
    if run.returncode or not lines:
        raise SystemExit(f"fit did not reach its first batch:\n{run.stdout}{run.stderr}")
    whole, spent = json.loads(lines[-1])
    return whole - spent, spent


def main() -> None:
    """Measure and print."""
    if sys.argv[1:2] == ["--first_batch"]:
        first_batch()
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--repeat", type=int, default=5)
    given = parser.parse_args()
    for command in COMMANDS.values():
        seconds(command)  # byte code and file cache
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    starts = []
    with tempfile.TemporaryDirectory() as name:
        tiny = Path(name, "tiny")
        subprocess.run([*PYTHON, "-m", "cv_lightning", "tiny", "--out", str(tiny)], check=True, cwd=ROOT)
        for _ in range(given.repeat):
            starts.append(fit_startup(tiny))
            for name, command in COMMANDS.items():
                times[name].append(seconds(command))
    medians = {name: statistics.median(values) for name, values in times.items()}
    figures = {f"{name}_s": round(medians[name], 3) for name in medians if name not in HEAVY}
    figures |= {f"{name}_over_import": round(medians[name] / medians["import"], 3) for name in HEAVY}
    figures["fit_startup_s"], figures["fit_model_and_engine_s"] = (
        round(statistics.median(values), 2) for values in zip(*starts, strict=True)
    )
    print(json.dumps(figures, indent=1))
    if given.json:
        given.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
