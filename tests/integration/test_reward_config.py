"""Reward configs on the command line: recipes, user terms, and no key in saved configs."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonargparse
import pytest

sys.path.append(str(Path(__file__).parents[1] / "unit"))

from reward_samples import Recorder, group, task

from cv_lightning.rewards import JudgeConfig, RewardConfig, RewardModule, RewardTerm
from cv_lightning.rewards.metrics import means, reward_sums
from cv_lightning.types import Trajectory

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "configs" / "reward").glob("*.yaml")) + sorted(
    (ROOT / "configs" / "quickstart").glob("reward*")
)

OWN = '''
from cv_lightning.rewards import RewardTerm
from cv_lightning.types import Trajectory


def few_turns(trajectory: Trajectory, score: float) -> float:
    return score / len(trajectory.turns)


class Brevity(RewardTerm):
    """1 for a response of at most so many sampled tokens."""

    def __init__(self, name: str = "brevity", weight: float = 0.2, most_tokens: int = 100) -> None:
        super().__init__(name, weight)
        self.most_tokens = most_tokens

    def value(self, trajectory: Trajectory, score: float) -> float:
        return float(sum(turn.num_tokens for turn in trajectory.turns) <= self.most_tokens)
'''

REWARD = """
emerge: 0.1
terms:
  - class_path: own_reward.Brevity
    init_args:
      weight: 0.3
      most_tokens: 7
  - class_path: cv_lightning.rewards.FunctionTerm
    init_args: {name: few_turns, weight: -0.5, function: own_reward.few_turns}
"""


@pytest.fixture
def own_reward(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A reward file that names a module beside it."""
    (tmp_path / "own_reward.py").write_text(OWN)
    (tmp_path / "reward.yaml").write_text(REWARD)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path / "reward.yaml"


def rollout_parser() -> Any:
    """The rollout's arguments as the command line takes them."""
    from lightning.pytorch.cli import LightningArgumentParser

    from cv_lightning.callbacks.rollout import RolloutCallback

    parser = LightningArgumentParser()
    parser.add_argument("--config", action="config")
    parser.add_class_arguments(RolloutCallback, "rollout", sub_configs=True)
    return parser


def rollout_callback(parser: Any, arguments: list[str]) -> tuple[Any, Any]:
    """The rollout callback that the arguments make, and the parsed arguments."""
    given = parser.parse_args(arguments)
    return parser.instantiate(given).rollout, given


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_the_callback_takes_every_recipe_as_a_file(path: Path) -> None:
    flags = [f"--rollout.reward={path}", "--rollout.reward.format=0.3"]
    callback, _ = rollout_callback(rollout_parser(), flags)
    assert isinstance(callback.reward, RewardConfig)
    parser = jsonargparse.ArgumentParser()
    parser.add_argument("--reward", type=RewardConfig)
    alone = parser.instantiate(parser.parse_args([f"--reward={path}"])).reward
    assert callback.reward == replace(alone, format=0.3)  # a flag behind the file wins, all else is the file's


def test_a_judge_is_added_by_flags() -> None:
    judge = ["--rollout.reward.judge.base_url=http://judge:8000/v1", "--rollout.reward.judge.model=m"]
    callback, _ = rollout_callback(rollout_parser(), [f"--rollout.reward={RECIPES[0]}", *judge])
    assert callback.reward.judge == JudgeConfig(base_url="http://judge:8000/v1", model="m")


def test_user_terms_are_configured_by_class_path(own_reward: Path, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(f"rollout: {{reward: {own_reward.name}}}\n")
    parser = rollout_parser()
    callback, given = rollout_callback(parser, [f"--config={tmp_path / 'run.yaml'}"])
    module = RewardModule(callback.reward)
    short, long = Recorder(task(box=None)).answer(), Recorder(task(box=None)).call("contrast_up").answer()
    scored = group(short, long)
    module.score_group(scored)
    assert short.reward is not None and long.reward is not None
    assert short.reward.components["brevity"] == 1.0
    assert short.reward.total == pytest.approx(1.0 + 0.1 + 0.3 - 0.5)
    assert long.reward.total == pytest.approx(1.0 + 0.1 + 0.1 - 0.5 / 2)
    metrics = means(reward_sums([scored]))
    assert metrics["reward/brevity"] == 0.5
    assert metrics["reward/by_source/digits/few_turns"] == 0.75
    module.close()
    (tmp_path / "saved.yaml").write_text(parser.dump(given))  # what is written beside a run gives the same reward again
    again, _ = rollout_callback(rollout_parser(), [f"--config={tmp_path / 'saved.yaml'}"])
    assert again.reward.weights == callback.reward.weights
    assert again.reward.terms[0].most_tokens == 7


@pytest.mark.parametrize(
    ("terms", "said"),
    [
        ("[{class_path: own_reward.NotThere}]", "NotThere"),
        ("[{class_path: own_reward.Brevity, init_args: {weight: much}}]", "weight"),
        ("[{class_path: own_reward.Brevity, init_args: {name: mandatory}}]", "taken"),
        ("[{class_path: own_reward.Brevity, init_args: {name: total}}]", "taken"),
    ],
)
def test_an_invalid_term_is_named(own_reward: Path, terms: str, said: str) -> None:
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--reward", type=RewardConfig)
    with pytest.raises((jsonargparse.ArgumentError, ValueError), match=said):
        parser.instantiate(parser.parse_args([f"--reward.terms={terms}"]))


class Broken(RewardTerm):
    """Gives no number."""

    def value(self, trajectory: Trajectory, score: float) -> float:
        return float("nan")


def test_a_term_that_is_not_finite_stops_the_run() -> None:
    module = RewardModule(RewardConfig(terms=[Broken("broken", 1.0)]))
    with pytest.raises(ValueError, match=r"'broken' gives nan for task 't'"):
        module.score_group(group(Recorder(task(box=None)).answer()))


def test_saved_configs_do_not_contain_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_API_KEY", "sk-very-secret")
    parser = jsonargparse.ArgumentParser(default_env=True)
    parser.add_argument("--reward", type=RewardConfig)
    given = parser.parse_args(["--reward.judge.max_parallel=3", "--reward.judge.api_key_env=JUDGE_API_KEY"])
    module = RewardModule(parser.instantiate(given).reward)
    assert "max_parallel" in parser.dump(given)
    assert "sk-very-secret" not in parser.dump(given) + repr(module.config) + repr(module.judge)
    module.close()


@pytest.mark.parametrize("key", ["sk-abc-123", "Bearer x", ""])
def test_a_key_instead_of_its_variable_is_refused_and_not_shown(key: str) -> None:
    with pytest.raises(ValueError, match="api_key_env") as caught:
        JudgeConfig(api_key_env=key)
    assert not key or key not in str(caught.value)
