"""The ablation study: what each arm changes, and its table."""

from __future__ import annotations

import json
import math
import subprocess
from pathlib import Path

import pytest
import yaml

from cv_lightning.digits.ablations import ARMS, stages
from cv_lightning.digits.quickstart import Timing, run_stages
from cv_lightning.digits.study import markdown, study, to_json
from cv_lightning.rewards import RewardConfig

ROOT = Path(__file__).parents[2]


def reward(path: str) -> RewardConfig:
    return RewardConfig(**yaml.safe_load((ROOT / path).read_text()))


def test_arm_changes_only_the_named_weights() -> None:
    rewards = {name: reward(arm.reward or "configs/quickstart/reward.yaml") for name, arm in ARMS.items()}
    full = rewards["full"].weights

    def changed(name: str) -> set[str]:
        return {part for part, weight in rewards[name].weights.items() if weight != full[part]}

    assert changed("no_process") == changed("rare_no_process") == {"mandatory", "exact"} and not changed("rare")
    assert not rewards["no_process"].gate
    assert changed("no_penalty") == changed("needless_no_penalty") == {"usage", "spurious"} and not changed("needless")


def test_stages_run_with_threads_that_wait_without_spinning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    policies = []

    def record(command: list[str], env: dict[str, str]) -> subprocess.CompletedProcess[str]:
        policies.append(env["OMP_WAIT_POLICY"])
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", record)
    wanted = stages(tmp_path, seed=0, arms=["full"], tests=False)
    assert run_stages(wanted[:1], Timing(tmp_path / "first", seed=0)) == 0
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")  # the user's own value counts
    assert run_stages(wanted[:1], Timing(tmp_path / "second", seed=0)) == 0
    assert policies == ["PASSIVE", "ACTIVE"]


def test_stages_of_a_seed() -> None:
    found = {s.name: s.arguments for s in stages(Path("r"), seed=3, arms=["full", "no_sft"], iterations=7, per_kind=5)}
    assert list(found) == ["tiny", "sft", "sft_eval", "full", "full_eval", "no_sft", "no_sft_eval"]
    assert "r/tiny" in found["no_sft"] and "r/sft/model" in found["full"]
    assert found["full"][found["full"].index("--data.init_args.num_iterations") + 1] == "7"
    needless = {s.name: s.arguments for s in stages(Path("r"), seed=0, arms=["needless", "needless_no_penalty"])}
    assert list(needless)[:3] == ["tiny", "sft_needless", "sft_needless_eval"] and "sft" not in needless
    assert "r/sft_needless/model" in needless["needless"] and "r/sft_needless/model" in needless["needless_no_penalty"]
    trained = stages(Path("r"), seed=3, arms=["paper"], tests=False)
    assert [stage.name for stage in trained] == ["tiny", "sft", "paper"]


def test_table_shows_mean_and_range_over_seeds(tmp_path: Path) -> None:
    for seed, (found_at, calls) in enumerate(((2, 1.0), (None, 3.0))):
        folder = tmp_path / f"seed{seed}"
        (folder / "full/model").mkdir(parents=True)
        rows = ["iteration,rollout/tool_use_success,rollout/tool_calls_mean,rollout/accuracy,rollout/spurious"]
        rows += [f"{i},{0.9 if found_at and i >= found_at else 0.1},{calls},0.5," for i in range(1, 9)]
        (folder / "full/metrics.csv").write_text("\n".join(rows) + "\n")
    for mode in ("greedy", "sampled"):
        test = tmp_path / f"seed0/eval/full_{mode}_tool"
        test.mkdir(parents=True)
        rate = {"value": 0.75}
        figures = {"tool_use_success": rate, "accuracy": rate, "spurious": {"value": None}, "tool_calls_mean": 2.0}
        (test / "metrics.json").write_text(json.dumps(figures))
    found = study(tmp_path, ["sft", "full"])
    assert list(found) == ["full"]
    assert found["full"]["seed0"]["tool_use_success_early"] == 0.9  # of iterations 6 to 8: there are no more
    assert found["full"]["seed0"]["tool_use_success_training"] == 0.9 and math.isinf(found["full"]["seed1"]["found_at"])
    assert "tool_use_success_greedy" not in found["full"]["seed1"] and "spurious_training" not in found["full"]["seed0"]
    row = markdown(found, str.upper).splitlines()[2]
    assert row.startswith(
        "| FULL | 2 | 0.50 (0.10-0.90) | 0.50 (0.50-0.50) | 2.00 (1.00-3.00) | - | 0.50 (0.10-0.90) | 2, never | 0.75 |"
    )
    assert to_json(found)["full"]["seed1"]["found_at"] is None
