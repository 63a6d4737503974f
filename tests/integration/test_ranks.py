"""Two gloo ranks under plain DDP take the step of one process that sees everything, however unequal their shares."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

SCRIPT = Path(__file__).parent / "rank_update.py"


def update(checkpoint: Path, out: Path, shares: list[int]) -> dict[str, Any]:
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(len(shares))]
    command = [sys.executable, *(launch if len(shares) > 1 else []), str(SCRIPT), str(checkpoint), str(out)]
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    # A dead-lock fails the test instead of holding it up.
    done = subprocess.run(
        [*command, json.dumps(shares)], env=environment, capture_output=True, text=True, timeout=500, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result: dict[str, Any] = torch.load(out, weights_only=True)
    return result


@pytest.fixture(scope="module")
def alone(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return update(tiny_checkpoint, tmp_path_factory.mktemp("alone") / "out.pt", [9])


@pytest.mark.parametrize("shares", [[4, 5], [0, 9]])
def test_two_ranks_take_the_step_of_one(
    alone: dict[str, Any], tiny_checkpoint: Path, tmp_path: Path, shares: list[int]
) -> None:
    both = update(tiny_checkpoint, tmp_path / "out.pt", shares)
    assert (alone["weights"] - both["weights"]).abs().max() < 2e-6
    for name in ("loss", "grad_norm", "trajectories", "kl_to_reference", "ratio_mean", "skipped_steps", "parity_max"):
        assert both["metrics"][f"policy/{name}"] == pytest.approx(
            alone["metrics"][f"policy/{name}"], rel=1e-3, abs=1e-6
        )


def test_the_step_is_a_real_one(alone: dict[str, Any], tiny_checkpoint: Path) -> None:
    from module_samples import parameters, policy

    from cv_lightning.model.loading import load_policy
    from cv_lightning.modules.grpo import GRPOModule

    module = GRPOModule(policy(tiny_checkpoint))
    module.policy = load_policy(module.policy_config)
    assert (alone["weights"] - parameters(module)).abs().max() > 1e-3
    assert alone["metrics"]["policy/trajectories"] == 9
