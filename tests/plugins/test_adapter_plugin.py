"""A user's model adapter, named in YAML alone, sizes the images of rollout and training."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import yaml
from even_sides import EvenSidesAdapter

from cv_lightning.cli import main
from cv_lightning.models.loading import PolicyConfig, load_adapter
from cv_lightning.types import CheckpointError

CONFIG = """
seed_everything: 1
trainer:
  accelerator: cpu
  devices: 1
  max_epochs: 1
  enable_progress_bar: false
  enable_checkpointing: false
rollout:
  num_samples: 2
  agent: {max_turns: 1, max_turn_tokens: 8, max_images: 2, prompt: {system: none, state_size: false}}
  engine: {kind: transformers, max_model_len: 512, max_num_seqs: 8, max_images: 2}
  store: {share: 1.0}
model:
  class_path: cv_lightning.modules.grpo.GRPOModule
  init_args:
    policy:
      dtype: float32
      min_pixels: 4096   # the processor itself must not enlarge what the adapter has sized
      adapter: {class_path: even_sides.EvenSidesAdapter, init_args: {max_tokens: 8}}
data:
  class_path: cv_lightning.digits.modules.DigitTaskDataModule
  init_args: {num_iterations: 1, tasks_per_iteration: 2}
"""


@pytest.mark.filterwarnings("ignore:LightningCLI's args parameter is intended")
def test_an_image_rule_from_outside_the_package_holds_in_engine_and_trainer(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    """The start-up check of the run compares engine and trainer under this rule."""
    config = yaml.safe_load(CONFIG)
    config["trainer"]["default_root_dir"] = str(tmp_path / "run")
    config["model"]["init_args"]["policy"]["path"] = str(tiny_checkpoint)
    (tmp_path / "fit.yaml").write_text(yaml.safe_dump(config))
    main(["fit", "--config", str(tmp_path / "fit.yaml")])
    with (tmp_path / "run/metrics.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert float(row["policy/parity_max"]) <= 1e-4
    stored = [json.loads(line) for path in (tmp_path / "run/trajectories").glob("*.jsonl") for line in path.open()]
    sizes = {tuple(image["model_size"]) for group in stored for t in group["trajectories"] for image in t["images"]}
    assert sizes == {(64, 64)}, "the processor's own rule shows the digits at 96x96"


def test_a_checkpoint_of_no_known_family_names_the_key_that_takes_an_adapter(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    for file in tiny_checkpoint.iterdir():
        if "safetensors" not in file.name:
            (tmp_path / file.name).write_bytes(file.read_bytes())
    known = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(known | {"model_type": "another_vl"}))
    with pytest.raises(CheckpointError, match=r"another_vl; this project knows qwen2_5_vl, qwen3_vl.*policy\.adapter"):
        load_adapter(PolicyConfig(path=str(tmp_path)))
    assert load_adapter(PolicyConfig(path=str(tmp_path), adapter=EvenSidesAdapter())).image_rule.factor == 64
