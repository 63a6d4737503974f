"""A user's benchmark, metric and reward term, named in YAML alone, in an evaluation."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from judge_server import JudgeServer
from PIL import Image
from plugin_run import run, stored_groups

from cv_lightning.evaluation.scoring import metric_of, official_score
from cv_lightning.types import DataError

CONFIG = """
rollout:
  evaluations: [{name: greedy, temperature: 0.0}]
  reward:
    judge: {model: any}
    terms:
      - {class_path: judged_term.Grounded, init_args: {name: grounded, weight: 0.5}}
data:
  class_path: TaskDataModule
  init_args:
    reader:
      format: {class_path: receipts.Receipts, init_args: {currency: CHF}}
      metric: {class_path: receipts.AmountWithin, init_args: {tolerance: 0.01}}
"""


@pytest.mark.filterwarnings("ignore:LightningCLI's args parameter is intended")
def test_a_benchmark_a_metric_and_a_term_from_outside_the_package(tiny_checkpoint: Path, tmp_path: Path) -> None:
    for number in range(2):
        Image.new("RGB", (64, 64), (200, 40 * number, 90)).save(tmp_path / f"{number}.png")
    (tmp_path / "receipts.txt").write_text("0.png | 12.50\n1.png | 130\n")
    files = f"--data.init_args.eval_files=[{tmp_path / 'receipts.txt'}]"
    with JudgeServer() as judge:
        folder = run("test", CONFIG, tiny_checkpoint, tmp_path, files, f"--rollout.reward.judge.base_url={judge.url}")
    groups = stored_groups(folder / "eval" / "greedy")
    assert [group["task"]["question"] for group in groups] == ["How much was paid, in CHF?"] * 2
    rewards = [trajectory["reward"] for group in groups for trajectory in group["trajectories"]]
    assert [reward["components"]["grounded"] for reward in rewards] == [
        0.5,
        0.5,
    ]  # halved, because each is alone in its group
    assert len(judge.answered) == 2 and all("what is seen in the image" in prompt for prompt in judge.answered)
    results = json.loads((folder / "eval" / "results.json").read_text())["evaluations"]["greedy"]["breakdown"]
    assert results["metrics"] == ["AmountWithin"] and results["by_category"].keys() == {"large", "small"}
    metadata = groups[0]["task"]["metadata"]
    scores = [official_score(answer, metadata) for answer in ("12.6CHF", "12.7", "13", "much", None)]
    assert scores == [1.0, 0.5, 0.0, 0.0, 0.0], "scored again from the stored metadata"


def test_a_metric_that_cannot_be_imported_is_named() -> None:
    metadata = {"metric": {"class_path": "no_such.Metric", "init_args": {}}, "accepted_answers": ["1"]}
    assert metric_of(metadata) == "Metric"
    with pytest.raises(DataError, match=r"no_such\.Metric.*PYTHONPATH"):
        official_score("1", metadata)
