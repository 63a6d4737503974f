"""The switches of RL and LoRA are reached from the command line, on top of the shipped config, and off in it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
FLAGS = [
    "--model.init_args.algorithm.mask.over_length=true",
    "--rollout.agent.early_stop_fraction=0.95",
    "--model.init_args.policy.lora.rank=4",
    "--model.init_args.algorithm.kl.weight=0.01",
    "--model.init_args.algorithm.kl.every=2",
    "--model.init_args.algorithm.dynamic_sampling.max_oversample=2.5",
    "--model.init_args.optimizer.skip_norm_above=20",
    "--data.init_args.curriculum=[{at: 0, kind_shares: {upright: 1}}, {at: 1, kind_shares: {small: 1}}]",
]


def printed(flags: list[str]) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Init arguments of rollout callback, model and data, as the command line resolves them."""
    command = [sys.executable, "-m", "cv_lightning", "fit", "--config", "configs/quickstart/grpo.yaml", *flags]
    done = subprocess.run([*command, "--print_config"], cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-2000:]
    config = yaml.safe_load(done.stdout)
    return config["rollout"], config["model"]["init_args"], config["data"]["init_args"]


def test_every_health_switch_is_a_flag() -> None:
    rollout, model, data = printed(FLAGS)
    algorithm = model["algorithm"]
    assert algorithm["mask"] == {"over_length": True, "over_turns": False, "broken": False}
    assert rollout["agent"]["early_stop_fraction"] == 0.95
    assert model["policy"]["lora"]["rank"] == 4 and algorithm["kl"]["every"] == 2
    assert model["optimizer"]["skip_norm_above"] == 20
    assert algorithm["dynamic_sampling"]["max_oversample"] == 2.5 and [point["at"] for point in data["curriculum"]] == [
        0,
        1,
    ]


def test_the_quickstart_has_every_health_switch_off() -> None:
    rollout, model, data = printed([])
    algorithm = model["algorithm"]
    assert not any(algorithm["mask"].values()) and rollout["agent"]["early_stop_fraction"] == 1.0
    assert model["policy"]["lora"] is None and model["optimizer"]["skip_norm_above"] is None
    assert algorithm["dynamic_sampling"]["max_oversample"] == 1.0 and not data["curriculum"]
