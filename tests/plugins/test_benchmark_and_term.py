"""A user's benchmark, metric and reward term, named in YAML alone, in an evaluation."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from judge_server import JudgeServer
from PIL import Image

from cv_lightning.cli import main
from cv_lightning.evaluation.scoring import metric_of, official_score
from cv_lightning.types import DataError

CONFIG = """
seed_everything: 1
trainer: {accelerator: cpu, devices: 1, enable_progress_bar: false}
rollout:
  agent: {max_turns: 1, max_turn_tokens: 8, max_images: 2, prompt: {system: none, state_size: false}}
  engine: {kind: transformers, max_model_len: 512, max_num_seqs: 8, max_images: 2}
  evaluations: [{name: greedy, temperature: 0.0}]
  reward:
    judge: {model: any}
    terms:
      - {class_path: judged_term.Grounded, init_args: {name: grounded, weight: 0.5}}
model:
  class_path: cv_lightning.modules.grpo.GRPOModule
  init_args:
    policy: {dtype: float32}
data:
  class_path: cv_lightning.data.modules.TaskDataModule
  init_args:
    reader:
      format: {class_path: receipts.Receipts, init_args: {currency: CHF}}
      metric: {class_path: receipts.AmountWithin, init_args: {tolerance: 0.01}}
"""


def evaluate(folder: Path, policy: Path, judge: str) -> Path:
    for number in range(2):
        Image.new("RGB", (64, 64), (200, 40 * number, 90)).save(folder / f"{number}.png")
    (folder / "receipts.txt").write_text("0.png | 12.50\n1.png | 130\n")
    config = yaml.safe_load(CONFIG)
    config["trainer"]["default_root_dir"] = str(folder / "run")
    config["rollout"]["reward"]["judge"]["base_url"] = judge
    config["model"]["init_args"]["policy"]["path"] = str(policy)
    config["data"]["init_args"]["eval_files"] = [str(folder / "receipts.txt")]
    (folder / "test.yaml").write_text(yaml.safe_dump(config))
    main(["test", "--config", str(folder / "test.yaml")])
    return folder / "run"


def stored(run: Path) -> Iterator[dict[str, Any]]:
    for file in sorted((run / "eval" / "greedy" / "trajectories").glob("*.jsonl")):
        yield from (json.loads(line) for line in file.read_text().splitlines())


@pytest.mark.filterwarnings("ignore:LightningCLI's args parameter is intended")
def test_a_benchmark_a_metric_and_a_term_from_outside_the_package(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with JudgeServer() as judge:
        run = evaluate(tmp_path, tiny_checkpoint, judge.url)
    groups = sorted(stored(run), key=lambda group: group["task"]["id"])
    assert [group["task"]["question"] for group in groups] == ["How much was paid, in CHF?"] * 2
    rewards = [trajectory["reward"] for group in groups for trajectory in group["trajectories"]]
    assert [reward["components"]["grounded"] for reward in rewards] == [0.5, 0.5]  # alone in its group: halved
    assert len(judge.answered) == 2 and all("what is seen in the image" in prompt for prompt in judge.answered)
    results = json.loads((run / "eval" / "results.json").read_text())["evaluations"]["greedy"]["breakdown"]
    assert results["metrics"] == ["AmountWithin"] and results["by_category"].keys() == {"large", "small"}
    metadata = groups[0]["task"]["metadata"]
    scores = [official_score(answer, metadata) for answer in ("12.6CHF", "12.7", "13", "much", None)]
    assert scores == [1.0, 0.5, 0.0, 0.0, 0.0], "recounted from what was stored"


def test_a_metric_that_cannot_be_imported_is_named() -> None:
    metadata = {"metric": {"class_path": "no_such.Metric", "init_args": {}}, "accepted_answers": ["1"]}
    assert metric_of(metadata) == "Metric"
    with pytest.raises(DataError, match=r"no_such\.Metric.*PYTHONPATH"):
        official_score("1", metadata)
