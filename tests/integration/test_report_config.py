"""The report reads how a run was trained from configs as LightningCLI stores them."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from cv_lightning.cli import ConfigOnly, main
from cv_lightning.digits.training import training_story

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def in_the_project(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def resolved(*arguments: str) -> str:
    return yaml.safe_dump(main(["fit", *arguments], ConfigOnly).as_dict())


def test_story_of_sft_has_the_values_of_the_command_line() -> None:
    share = ["--data.init_args.demonstrations.tool_share", "0.25", "--data.init_args.warm_up_share", "0.5"]
    text = resolved("--config", "configs/quickstart/sft.yaml", *share, "--data.init_args.num_steps", "60")
    ((_, sentences),) = training_story({"sft/fit_config.yaml": text})
    told = " ".join(sentences)
    assert "Of the tasks that need the tool, 25 % demonstrate it" in told
    assert "Warm-up: the first 50 % of the steps (30) show clean single turns only" in told


@pytest.mark.parametrize(("recipe", "formula"), [("reward", "mandatory"), ("reward_accuracy", None)])
def test_story_of_rl_has_the_formula_of_the_reward(recipe: str, formula: str | None) -> None:
    reward = ["--rollout.reward", f"configs/quickstart/{recipe}.yaml"]
    text = resolved("--config", "configs/quickstart/grpo.yaml", *reward)
    ((_, sentences),) = training_story({"rl/fit_config.yaml": text})
    told = " ".join(sentences)
    assert "GRPO: " in told
    assert "Reward: accuracy + 0.1 format" in told
    assert (formula is None and "mandatory" not in told) or f"+ {formula}" in told
