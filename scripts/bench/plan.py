"""Measures the plan against what a run takes: growth of resident memory of SFT and GRPO with a 0.5 B model on the CPU.

    python scripts/bench/plan.py --json FILE [--dtype bfloat16] [--layers 7] [--only sft]

A random Qwen3-VL is trained for two iterations on digits by `fit`, in a process of its own whose libraries are loaded
before the count begins. `plan_over_measured_sft` and `plan_over_measured_grpo` are the plan's peak for the same command
line over the largest growth of resident memory. GRPO has a reference policy and vLLM. It needs 10 and 16 GB of free
memory in float32, and half of that in 16 bits; it refuses to start without.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
BAR = 0.15
NEEDED_GB = {"sft": 10.5, "grpo": 16.5}
"""Main memory that a run in float32 needs."""
SIZES = {"hidden_size": 1280, "head_dim": 64, "num_key_value_heads": 4}
LAYERS = 28
ROLLOUT = "--rollout"
COMMON = [
    "--trainer.accelerator=cpu",
    "--trainer.logger=false",
    "--trainer.enable_checkpointing=false",
    "--export.folder=null",
    "--model.init_args.max_tokens_per_row=256",
]
CHILD = """
import json, resource, sys
sys.path.insert(0, sys.argv[1])
from cv_lightning.environment import prepare_environment
prepare_environment()
import psutil
import cv_lightning.cli, cv_lightning.callbacks.rollout, cv_lightning.engines.vllm, cv_lightning.strategies
import deepspeed, transformers
from transformers import AutoProcessor, AutoModelForImageTextToText
args = json.loads(sys.argv[2])
if len(sys.argv) > 3:  # the plan alone
    from cv_lightning.commands.plan import figures_of
    from cv_lightning.planner.budget import Assumptions, make_plan
    from cv_lightning.planner.run import read_run
    plan = make_plan(read_run(args), Assumptions(image_share=0.3))
    print("FIGURES", json.dumps(figures_of(plan)))
    sys.exit()
before = psutil.Process().memory_info().rss
cv_lightning.cli.main(["fit", *args])
print("FIGURES", json.dumps({"growth": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before}))
"""


def arguments(stage: str, base: Path, run: Path, dtype: str) -> list[str]:
    """What `fit` and the plan are given."""
    config = ROOT / "configs" / "quickstart"
    given = ["--config", str(config / f"{stage}.yaml"), f"--trainer.default_root_dir={run}"]
    given += [f"--model.init_args.policy.path={base}", f"--model.init_args.policy.dtype={dtype}"]
    if stage == "sft":
        given += [*COMMON, "--data.init_args.num_steps=2", "--data.init_args.conversations_per_step=10"]
        return [*given, "--data.init_args.warm_up_share=0"]
    overlay = run.with_suffix(".yaml")
    overlay.write_text(json.dumps({"rollout": _rollout(config)}))  # JSON is YAML
    given += [*COMMON, "--config", str(overlay)]
    given += ["--data.init_args.num_iterations=2", "--data.init_args.tasks_per_iteration=2"]
    return [*given, "--model.init_args.algorithm.kl.weight=0.001", "--model.init_args.algorithm.num_minibatches=1"]


def _rollout(config: Path) -> dict[str, Any]:
    """Short trajectories: a random policy says nothing that is worth more."""
    agent = {"max_turns": 1, "max_turn_tokens": 32, "max_prompt_tokens": 64, "max_response_tokens": 64}
    return {
        "num_samples": 6,
        "agent": agent | {"prompt": str(config / "prompt.yaml"), "max_images": 2},
        "engine": {"kind": "vllm", "max_model_len": 256, "max_num_seqs": 16, "max_images": 2},
        "reward": str(config / "reward.yaml"),
        "mismatch_tolerance": 1e-2,
        "store": {"share": 0.0},
    }


def child(args: list[str], *more: str) -> dict[str, Any]:
    """What a process of its own found."""
    environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1"}
    command = [sys.executable, "-c", CHILD, str(ROOT), json.dumps(args), *more]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        sys.exit(done.stderr[-4000:] + f"\nexit code {done.returncode}")
    line = next(line for line in done.stdout.splitlines() if line.startswith("FIGURES"))
    found: dict[str, Any] = json.loads(line.removeprefix("FIGURES "))
    return found


def check_memory(stage: str, dtype: str, layers: int) -> None:
    """Refuse to push this machine's other processes out of memory."""
    import psutil

    free = psutil.virtual_memory().available / 1e9
    needed = NEEDED_GB[stage] * (1 if dtype == "float32" else 0.5) * (layers + 4) / (LAYERS + 4)
    if free < needed:
        sys.exit(
            f"{stage} in {dtype} needs {needed:.1f} GB, {free:.1f} are free; wait, or take --dtype bfloat16, --layers"
        )


def measure(stages: list[str], dtype: str, layers: int) -> dict[str, float]:
    """All figures."""
    from cv_lightning.commands.tiny import TinyCheckpoint, write
    from cv_lightning.models.adapters.tiny import TinyModelConfig

    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        figures["plan_model_parameters"] = float(
            write(TinyCheckpoint(out=folder / "base", model=TinyModelConfig(num_layers=layers, **SIZES)))
        )
        for stage in stages:
            check_memory(stage, dtype, layers)
            args = arguments(stage, folder / "base", folder / stage, dtype)
            plan, run = child(args, "plan"), child(args)
            peak = max(plan["training_peak"], plan["rollout_peak"])
            figures[f"plan_over_measured_{stage}"] = peak / run["growth"]
            figures |= {f"plan_{stage}_gb": peak / 1e9, f"measured_{stage}_gb": run["growth"] / 1e9}
    return figures


def main() -> int:
    """Print and write the figures; with --check the exit code says whether the bars are met."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the policy")
    parser.add_argument("--layers", type=int, default=LAYERS, help="fewer make a smaller model")
    parser.add_argument("--only", choices=list(NEEDED_GB), help="one of the two")
    parser.add_argument("--check", action="store_true", help="exit code 1 where a bar is missed")
    options = parser.parse_args()
    figures = measure([options.only] if options.only else list(NEEDED_GB), options.dtype, options.layers)
    for name, value in figures.items():
        print(f"{name:34} {value:14.4f}")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1))
    ratios = [value for name, value in figures.items() if "over" in name]
    return int(options.check and any(abs(ratio - 1) > BAR for ratio in ratios))


if __name__ == "__main__":
    sys.exit(main())
