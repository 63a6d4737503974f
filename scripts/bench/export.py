"""Measures the memory of an export: a 0.5 B model's checkpoint becomes a Hugging Face folder, and is checked.

    python scripts/bench/export.py --json FILE

A random Qwen3-VL in float32 (2 GB) and its checkpoint are written first (without an optimizer's part, which no export
reads); then `export` runs in a process of its own. `export_peak_over_size` is its peak of resident memory, mapped files
included, less what its libraries took before, over the size of the weights; `export_unchecked_peak_over_size` without
the check.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
BAR = 2.0
HALF_BILLION = {"hidden_size": 1280, "num_layers": 28, "head_dim": 64, "num_key_value_heads": 4}
CHILD = """
import resource, sys, time
sys.path.insert(0, sys.argv[1])
from cv_lightning.environment import prepare_environment
prepare_environment()
import cv_lightning.callbacks.export, transformers, peft
from transformers import AutoProcessor, AutoModelForImageTextToText
from cv_lightning.commands.export import main
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
begun = time.perf_counter()
assert main(sys.argv[2:]) == 0
print("FIGURES", 1024 * before, 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter() - begun)
"""


def write_checkpoint(folder: Path, parameters: dict[str, int]) -> int:
    """A model folder, and beside it a checkpoint.

    Returns:
        Bytes of the weights.
    """
    import torch
    import yaml
    from transformers import AutoModelForImageTextToText

    from cv_lightning.commands.tiny import TinyCheckpoint, write
    from cv_lightning.models.adapters.tiny import TinyModelConfig

    write(TinyCheckpoint(out=folder / "base", model=TinyModelConfig(**parameters)))
    model = AutoModelForImageTextToText.from_pretrained(folder / "base", dtype=torch.float32)
    state = {f"policy.{name}": tensor for name, tensor in model.state_dict().items()}
    torch.save({"state_dict": state}, folder / "made.ckpt")
    policy = {"path": str(folder / "base"), "dtype": "float32"}
    (folder / "fit_config.yaml").write_text(yaml.safe_dump({"model": {"init_args": {"policy": policy}}}))
    return sum(tensor.nbytes for tensor in state.values())


def export(folder: Path, name: str, *more: str) -> tuple[float, float]:
    """Export in a process of its own.

    Returns:
        Growth of its resident memory at the peak in bytes, and seconds.
    """
    command = [sys.executable, "-c", CHILD, str(ROOT), "--ckpt", str(folder / "made.ckpt"), "--out", str(folder / name)]
    done = subprocess.run([*command, *more], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    _, before, peak, seconds = next(line for line in done.stdout.splitlines() if line.startswith("FIGURES")).split()
    return float(peak) - float(before), float(seconds)


def measure() -> dict[str, Any]:
    """All figures."""
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        # in a process of its own, whose memory does not count
        writer = f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(Path(__file__).parent)!r}]; import export; "
        writer += f"from pathlib import Path; print(export.write_checkpoint(Path({made!r}), {HALF_BILLION!r}))"
        said = subprocess.run([sys.executable, "-c", writer], capture_output=True, text=True, check=True).stdout
        size = float(said.split()[-1])
        checked, seconds = export(folder, "checked")
        unchecked, alone = export(folder, "unchecked", "--verify", "false")
    return {
        "export_peak_over_size": checked / size,
        "export_unchecked_peak_over_size": unchecked / size,
        "export_s": seconds,
        "export_unchecked_s": alone,
        "export_size_gb": size / 1e9,
    }


def main() -> int:
    """Print and write the figures; with --check the exit code says whether the bar is met."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--check", action="store_true", help="exit code 1 where the bar is missed")
    options = parser.parse_args()
    figures = measure()
    for name, value in figures.items():
        print(f"{name:34} {value:12.4f}")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1))
    return int(options.check and figures["export_peak_over_size"] > BAR)


if __name__ == "__main__":
    sys.exit(main())
