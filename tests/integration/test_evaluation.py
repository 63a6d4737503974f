"""Tests of a checkpoint through Lightning: numbers repeat, interruptions cost nothing, the files tell what was done."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest

from cv_lightning.agent.config import AgentConfig
from cv_lightning.agent.prompt import PromptConfig
from cv_lightning.callbacks.rollout import EvaluationConfig, RolloutCallback
from cv_lightning.data.modules import TaskDataModule
from cv_lightning.engine import EngineConfig, SamplingConfig
from cv_lightning.model.loading import PolicyConfig
from cv_lightning.modules.grpo import GRPOModule
from cv_lightning.rl.losses import PolicyLossConfig
from cv_lightning.trajectory import TrajectoryWriter, read_groups
from cv_lightning.types import Group

AGENT = AgentConfig(max_turns=2, max_turn_tokens=8, max_images=2, prompt=PromptConfig(system="none", state_size=False))
ENGINE = EngineConfig(kind="transformers", max_model_len=512, max_num_seqs=4, max_images=2)
SETTINGS = [
    EvaluationConfig(name="tool", temperature=1.0, num_samples=2),
    EvaluationConfig(name="notool", temperature=1.0, num_samples=2, tool=False),
]


class Pulled(Exception):
    """The plug."""


def evaluate(checkpoint: Path, run: Path, seed: int = 0) -> None:
    module = GRPOModule(PolicyConfig(path=str(checkpoint), dtype="float32"), loss=PolicyLossConfig(kl_weight=0.0))
    callback = RolloutCallback(agent=AGENT, engine=ENGINE, evaluations=SETTINGS, sampling=SamplingConfig(seed=seed))
    trainer = pl.Trainer(
        accelerator="cpu",
        default_root_dir=run,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[callback],
    )
    trainer.test(module, datamodule=TaskDataModule(test_tasks={"upright": 3, "turned": 3}), verbose=False)


def texts(run: Path, setting: str) -> dict[str, list[str]]:
    """What was said, by question."""
    return {
        group.task.id: ["".join(turn.text for turn in trajectory.turns) for trajectory in group.trajectories]
        for group in read_groups(run / "eval" / setting)
    }


def figures(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "eval/results.json").read_text())
    return {name: found[name] for name in ("evaluations", "tool")}


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> Callable[[int | None], list[str]]:
    """Counts the groups that are written; pulls the plug after so many."""
    whole = TrajectoryWriter.write_group

    def start(limit: int | None) -> list[str]:
        seen: list[str] = []

        def write(self: TrajectoryWriter, group: Group, iteration: int) -> None:
            if limit is not None and len(seen) == limit:
                raise Pulled
            whole(self, group, iteration)
            seen.append(group.task.id)

        monkeypatch.setattr(TrajectoryWriter, "write_group", write)
        return seen

    return start


@pytest.fixture(scope="module")
def finished(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An evaluation that nothing interrupted."""
    run = tmp_path_factory.mktemp("finished")
    evaluate(tiny_checkpoint, run)
    return run


def test_the_files_tell_what_was_done(finished: Path, tiny_checkpoint: Path) -> None:
    found = json.loads((finished / "eval/results.json").read_text())
    about = found["about"]
    assert about["model"] == str(tiny_checkpoint) and "model.safetensors" in about["weights"]
    assert about["run"]["versions"]["torch"] and about["seed"] == 0 and about["agent"]["max_turn_tokens"] == 8
    assert [setting["name"] for setting in about["settings"]] == ["tool", "notool"]
    tool = found["evaluations"]["tool"]
    assert (tool["num_tasks"], tool["num_trajectories"]) == (6, 12)
    assert set(tool["breakdown"]["pass_at_k"]) == {"1", "2"}
    assert found["tool"]["tool"]["num_pairs"] == 6
    page = (finished / "eval/results.md").read_text()
    assert "| must-use |" in page and "### What the tool brings" in page
    assert (finished / "eval/results.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((finished / "eval/tool/metrics.json").read_text())["breakdown"] == tool["breakdown"]


def test_an_interrupted_evaluation_goes_on_with_the_questions_that_are_missing(
    finished: Path, tiny_checkpoint: Path, tmp_path: Path, written: Callable[[int | None], list[str]]
) -> None:
    first = written(4)
    with pytest.raises(Pulled):
        evaluate(tiny_checkpoint, tmp_path)
    store = tmp_path / "eval/tool/trajectories/groups.rank0.jsonl"
    with store.open("ab") as file:
        file.write(b'{"schema": 1, "iteration"')  # what a kill leaves behind
    second = written(None)
    evaluate(tiny_checkpoint, tmp_path)
    assert len(first) == 4 and len(second) == 2 * 6 - 4, "nothing was made twice"
    for setting in ("tool", "notool"):
        assert texts(tmp_path, setting) == texts(finished, setting), "same seed, same words"
    assert figures(tmp_path) == figures(finished)


def test_other_settings_start_anew_and_failed_trajectories_are_made_again(
    tiny_checkpoint: Path, tmp_path: Path, written: Callable[[int | None], list[str]]
) -> None:
    with pytest.raises(Pulled):
        written(3)
        evaluate(tiny_checkpoint, tmp_path)
    anew = written(None)
    evaluate(tiny_checkpoint, tmp_path, seed=1)
    assert len(anew) == 12, "another seed, other numbers: nothing is kept"
    store = tmp_path / "eval/tool/trajectories/groups.rank0.jsonl"
    lines = [json.loads(line) for line in store.read_text().splitlines()]
    failed = lines[2]["task"]["id"]
    lines[2]["trajectories"][1] |= {"end_state": "error:judge", "reward": None}
    store.write_text("".join(json.dumps(line) + "\n" for line in lines))
    state = tmp_path / "eval/tool/evaluation.json"
    state.write_text(state.read_text().replace('"finished": true', '"finished": false'))
    again = written(None)
    evaluate(tiny_checkpoint, tmp_path, seed=1)
    assert again.count(failed) == 2 and len(again) == 1 + 6, (
        "one question with the tool; the other setting was finished"
    )
    assert json.loads(state.read_text())["finished"] is True
