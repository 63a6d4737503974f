"""Rescoring of stored trajectories with the same and with another recipe."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from judge_server import JudgeServer

sys.path.append(str(Path(__file__).parents[1] / "unit"))

from reward_samples import BOX, Recorder, group, task

from cv_lightning.commands.rescore import main
from cv_lightning.rewards import RewardModule
from cv_lightning.trajectory import StoreConfig, TrajectoryWriter, path_of, read_groups
from cv_lightning.types import EndState, Trajectory

RECIPES = Path(__file__).parents[2] / "configs" / "reward"


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """Three groups, scored by the default recipe; the judge of one trajectory has failed."""
    turned, plain = task("rotate_90", "crop"), task(box=None, truth="stop sign")
    groups = [
        group(
            Recorder(turned).call("rotate_270").call((30.0, 200.0, 150.0, 360.0)).answer(),
            Recorder(turned).call("rotate_270").answer(),
            Recorder(turned).call(BOX).call("grayscale").call("sharpen").call("contrast_up").answer(),
            Recorder(turned).answer("7"),
            Recorder(turned).fail("rotate_90").answer(None, end=EndState.NO_ANSWER, raw="well"),
        ),
        group(Recorder(plain).call("rotate_180").answer("stop sign"), Recorder(plain).answer("yield")),
        group(Recorder(plain).answer("Stop sign, a red one", end=EndState.ERROR_JUDGE), Recorder(plain).answer("no")),
    ]
    rewards = RewardModule()
    with TrajectoryWriter(tmp_path / "store") as writer:
        for each in groups:
            rewards.score_group(each)
            for trajectory in each.trajectories:
                trajectory.advantage = 0.5
            writer.write_group(each, 3)
    rewards.close()
    return tmp_path / "store"


def lines(folder: Path) -> list[dict]:
    (file,) = (folder / "trajectories").iterdir()
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_rescoring_with_the_same_recipe_gives_the_same_rewards(store: Path, tmp_path: Path) -> None:
    assert main([str(store), "--out", str(tmp_path / "new")]) == 0
    old, new = lines(store), lines(tmp_path / "new")
    retried = new[2]["trajectories"][0]
    assert retried["end_state"] == "answered" and retried["reward"]["scored_by"] == "rule"
    for before, after in zip(old, new, strict=True):
        for one, other in zip(before.pop("trajectories"), after.pop("trajectories"), strict=True):
            assert (one.pop("advantage"), other.pop("advantage")) == (0.5, None)
            assert one == other or other is retried
        assert before == after
    (image,) = {path_of(group.task.images[0]) for group in read_groups(tmp_path / "new") if group.task.box}
    assert image.is_file(), "the images are in the old store"


def test_stored_tokens_are_kept_also_behind_a_trajectory_without_any(tmp_path: Path) -> None:
    """A rollout that is truncated before a trajectory begins leaves it without tokens."""
    turned = task("rotate_90", "crop")
    answered = group(Recorder(turned).answer("7", end=EndState.TRUNCATED), Recorder(turned).answer("7"))
    member = answered.trajectories[1]
    member.token_ids, member.loss_mask, member.logprobs = [1, 2], [False, True], [0.0, -0.5]
    first = answered.trajectories[0]
    first.token_ids, first.loss_mask, first.logprobs = [], [], []
    with TrajectoryWriter(tmp_path / "store", StoreConfig(tokens=True)) as writer:
        writer.write_group(answered, 0)
    assert main([str(tmp_path / "store"), "--out", str(tmp_path / "new")]) == 0
    (found,) = read_groups(tmp_path / "new")
    assert found.trajectories[1].token_ids == [1, 2]


def test_rescoring_with_another_recipe_equals_its_module(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--reward", str(RECIPES / "accuracy.yaml"), "--reward.usage", "0.25"]
    assert main([str(store), *options, "--out", str(tmp_path / "new")]) == 0
    groups = list(read_groups(tmp_path / "new"))
    changed = 0
    for before, after in zip(read_groups(store), groups, strict=True):
        for one, other in zip(before.trajectories, after.trajectories, strict=True):
            assert other.reward is not None
            weighed = other.reward.components["accuracy"] - 0.25 * other.reward.components["usage"]
            assert other.reward.total == pytest.approx(weighed)
            changed += one.reward is None or one.reward.total != other.reward.total
    rewards = [t.reward for each in groups for t in each.trajectories]
    printed = capsys.readouterr().out
    assert f"{changed} rewards" in printed and changed >= 5
    mean = sum(reward.components["accuracy"] for reward in rewards if reward) / len(rewards)
    assert f"{mean:.4f}" in next(line for line in printed.splitlines() if "accuracy" in line)
    assert "8" in next(line for line in printed.splitlines() if "trajectories scored" in line)


def test_rescoring_asks_the_judge_and_uses_its_cache(store: Path, tmp_path: Path) -> None:
    with JudgeServer() as server:
        options = [f"--reward.judge.base_url={server.url}", f"--reward.judge.cache_folder={tmp_path / 'cache'}"]
        assert main([str(store), *options, "--out", str(tmp_path / "new")]) == 0
        asked = len(server.requests)
        assert asked > 0
        assert main([str(store), *options, "--out", str(tmp_path / "again")]) == 0
        assert len(server.requests) == asked
    assert lines(tmp_path / "new") == lines(tmp_path / "again")
    reward = list(read_groups(tmp_path / "new"))[2].trajectories[0].reward
    assert reward is not None and (reward.correct, reward.scored_by) == (True, "judge")


def bright(trajectory: Trajectory, score: float) -> float:
    """A component that looks at pixels."""
    return float(trajectory.images[0].original.convert("L").getpixel((0, 0)) > 0)


def test_a_user_term_sees_the_stored_images(store: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    term = {"class_path": "cv_lightning.rewards.terms.FunctionTerm"}
    term["init_args"] = {"name": "bright", "weight": 1.0, "function": f"{__name__}.bright"}
    recipe.write_text(json.dumps({"terms": [term]}))
    assert main([str(store), "--reward", str(recipe), "--out", str(tmp_path / "new")]) == 0
    rewards = [t.reward for each in read_groups(tmp_path / "new") for t in each.trajectories]
    assert {reward.components["bright"] for reward in rewards if reward} == {1.0}


def test_impossible_rescoring_is_refused(store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(store), "--out", str(store)]) == 2
    assert "exists" in capsys.readouterr().err
    assert main([str(tmp_path / "nowhere"), "--out", str(tmp_path / "new")]) == 2
    assert "no trajectories" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
