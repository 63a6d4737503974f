"""A user's policy loss and advantage estimator, named in YAML alone, train a policy."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch
import yaml
from sapo import SAPO

from cv_lightning.cli import main
from cv_lightning.rl.losses import PPOClip, TokenBatch
from cv_lightning.types import Task, Trajectory

CONFIG = """
seed_everything: 1
trainer:
  accelerator: cpu
  devices: 1
  max_epochs: 1
  enable_progress_bar: false
  enable_checkpointing: false
rollout:
  num_samples: 3
  agent: {max_turns: 1, max_turn_tokens: 8, max_images: 2, prompt: {system: none, state_size: false}}
  engine: {kind: transformers, max_model_len: 512, max_num_seqs: 8, max_images: 2}
  reward:
    terms:
      - {class_path: FunctionTerm, init_args: {name: ids, weight: 1.0, function: test_algorithm_plugins.ids}}
  store: {share: 1.0}
model:
  class_path: GRPOModule
  init_args:
    policy: {dtype: float32}
    optimizer: {lr: 1.0e-3}
    algorithm:
      advantage: {class_path: median_baseline.MedianBaseline, init_args: {scale: 0.5}}
      loss: {class_path: sapo.SAPO, init_args: {tau_negative: 1.5}}
      num_minibatches: 1
data:
  class_path: cv_lightning.digits.modules.DigitTaskDataModule
  init_args: {num_iterations: 2, tasks_per_iteration: 2}
"""


def ids(trajectory: Trajectory, task: Task) -> float:
    """A reward that differs within a group of a policy that knows nothing."""
    return float(sum(trajectory.token_ids) % 4)


def write_config(folder: Path, policy: Path) -> str:
    config = yaml.safe_load(CONFIG)
    config["trainer"]["default_root_dir"] = str(folder / "run")
    config["model"]["init_args"]["policy"]["path"] = str(policy)
    (folder / "fit.yaml").write_text(yaml.safe_dump(config))
    return str(folder / "fit.yaml")


@pytest.mark.filterwarnings("ignore:LightningCLI's args parameter is intended")
def test_a_loss_and_an_estimator_from_outside_the_package_train(tiny_checkpoint: Path, tmp_path: Path) -> None:
    main(["fit", "--config", write_config(tmp_path, tiny_checkpoint)])
    run = tmp_path / "run"
    with (run / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 and all(0 < float(row["policy/gate_mean"]) <= 1 for row in rows)
    assert all(float(row["policy/pg_loss"]) and float(row["policy/grad_norm"]) for row in rows)
    algorithm = json.loads((run / "fit_run.json").read_text())["settings"]["GRPOModule"]["algorithm"]
    assert algorithm["loss"] == "SAPO(tau_positive=1.0, tau_negative=1.5)"
    stored = [json.loads(line) for path in (run / "trajectories").glob("*.jsonl") for line in path.open()]
    members = [sorted(t["advantage"] for t in group["trajectories"]) for group in stored]
    assert len(members) == 4 and all(advantages[1] == 0.0 for advantages in members), "the median has none"
    assert any(advantages[2] > 0 for advantages in members)


def test_on_policy_it_is_the_policy_gradient() -> None:
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
def test_what_its_constructor_refuses_is_an_error_of_the_command_line(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path, tiny_checkpoint)
    with pytest.raises(SystemExit) as stopped:
        main(["fit", "--config", config, "--model.init_args.algorithm.loss.init_args.tau_negative=0"])
    assert "SAPO: tau_positive 1.0 and tau_negative 0" in str(stopped.value) + capsys.readouterr().err
