"""A user's model adapter, named in YAML alone, sizes the images of rollout and training."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from even_sides import EvenSidesAdapter
from plugin_run import run, stored_groups

from cv_lightning.models.loading import PolicyConfig, load_adapter
from cv_lightning.types import CheckpointError

CONFIG = """
model:
  init_args:
    policy:
      min_pixels: 4096   # keeps the processor from enlarging what the adapter has resized
      adapter: {class_path: even_sides.EvenSidesAdapter, init_args: {max_tokens: 8}}
"""


@pytest.mark.filterwarnings("ignore:LightningCLI's args parameter is intended")
def test_engine_and_trainer_use_the_image_rule_of_a_plugin(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """The run's start-up self-test compares engine and trainer under this rule."""
    folder = run("fit", CONFIG, tiny_checkpoint, tmp_path)
    with (folder / "metrics.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert float(row["policy/mismatch_max"]) <= 1e-4
    trajectories = [trajectory for group in stored_groups(folder) for trajectory in group["trajectories"]]
    sizes = {tuple(image["model_size"]) for trajectory in trajectories for image in trajectory["images"]}
    assert sizes == {(64, 64)}, "the processor's own rule gives 96x96"


def test_a_checkpoint_of_an_unknown_family_names_the_key_for_an_adapter(tiny_checkpoint: Path, tmp_path: Path) -> None:
    for file in tiny_checkpoint.iterdir():
        if "safetensors" not in file.name:
            (tmp_path / file.name).write_bytes(file.read_bytes())
    known = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(known | {"model_type": "another_vl"}))
    with pytest.raises(CheckpointError, match=r"another_vl; this project knows qwen2_5_vl, qwen3_vl.*policy\.adapter"):
        load_adapter(PolicyConfig(path=str(tmp_path)))
    assert load_adapter(PolicyConfig(path=str(tmp_path), adapter=EvenSidesAdapter())).image_rule.factor == 64
