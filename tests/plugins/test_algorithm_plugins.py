"""A user's policy loss and advantage estimator, named in YAML alone, train a policy."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch
from plugin_run import run, stored_groups
from sapo import SAPO

from cv_lightning.rl.losses import PPOClip, TokenBatch
from cv_lightning.types import Task, Trajectory

CONFIG = """
rollout:
  num_samples: 3
  reward:
    terms:
      - {class_path: FunctionTerm, init_args: {name: ids, weight: 1.0, function: test_algorithm_plugins.ids}}
model:
  init_args:
    optimizer: {lr: 1.0e-3}
    algorithm:
      advantage: {class_path: median_baseline.MedianBaseline, init_args: {scale: 0.5}}
      loss: {class_path: sapo.SAPO, init_args: {tau_negative: 1.5}}
      num_minibatches: 1
data:
  init_args: {num_iterations: 2}
"""


def ids(trajectory: Trajectory, task: Task) -> float:
    """A reward that differs within the groups of an untrained policy."""
    return float(sum(trajectory.token_ids) % 4)


@pytest.mark.filterwarnings("ignore:LightningCLI's args parameter is intended")
def test_a_loss_and_an_estimator_from_outside_the_package_train(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = run("fit", CONFIG, tiny_checkpoint, tmp_path)
    with (folder / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 and all(0 < float(row["policy/gate_mean"]) <= 1 for row in rows)
    assert all(float(row["policy/pg_loss"]) and float(row["policy/grad_norm"]) for row in rows)
    algorithm = json.loads((folder / "fit_run.json").read_text())["settings"]["GRPOModule"]["algorithm"]
    assert algorithm["loss"] == "SAPO(tau_positive=1.0, tau_negative=1.5)"
    members = [sorted(t["advantage"] for t in group["trajectories"]) for group in stored_groups(folder)]
    assert len(members) == 4 and all(advantages[1] == 0.0 for advantages in members), "the median has advantage 0"
    assert any(advantages[2] > 0 for advantages in members)


def test_the_gradient_of_sapo_on_policy_is_the_policy_gradient() -> None:
    logprobs = torch.tensor([-1.0, -2.0, -0.5], dtype=torch.float64, requires_grad=True)
    tokens = TokenBatch(
        logprobs=logprobs,
        old_logprobs=logprobs.detach(),
        advantages=torch.tensor([1.0, -0.5, 0.0], dtype=torch.float64),
        sequence_index=torch.tensor([0, 1, 1]),
        num_tokens=3,
        num_sequences=2,
    )
    gradients = [torch.autograd.grad(loss(tokens)[0], logprobs)[0] for loss in (SAPO(), PPOClip())]
    torch.testing.assert_close(*gradients)


@pytest.mark.filterwarnings("ignore:LightningCLI's args parameter is intended")
def test_an_error_of_a_plugin_constructor_is_a_message_of_the_command_line(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        run("fit", CONFIG, tiny_checkpoint, tmp_path, "--model.init_args.algorithm.loss.init_args.tau_negative=0")
    assert "SAPO: tau_positive 1.0 and tau_negative 0" in str(stopped.value) + capsys.readouterr().err
