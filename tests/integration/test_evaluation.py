"""Tests of a checkpoint through Lightning: numbers repeat, interruptions cost nothing, the files tell what was done."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest

from cv_lightning.agent.config import AgentConfig
from cv_lightning.agent.prompt import PromptConfig
from cv_lightning.callbacks.rollout import EvaluationConfig, RolloutCallback
from cv_lightning.data.rows import ReaderConfig
from cv_lightning.digits.modules import DigitTaskDataModule
from cv_lightning.engines import EngineConfig, SamplingConfig
from cv_lightning.models.loading import PolicyConfig
from cv_lightning.modules.grpo import GRPOModule
from cv_lightning.rewards import RewardConfig
from cv_lightning.rewards.terms import FunctionTerm
from cv_lightning.trajectory import TrajectoryWriter, read_groups
from cv_lightning.types import CVLightningError, Group, Trajectory

sys.path.append(str(Path(__file__).parents[1] / "unit"))
from trajectory_samples import digit_task

AGENT = AgentConfig(max_turns=2, max_turn_tokens=8, max_images=2, prompt=PromptConfig(system="none", state_size=False))
ENGINE = EngineConfig(kind="transformers", max_model_len=512, max_num_seqs=4, max_images=2)
SETTINGS = [
    EvaluationConfig(name="tool", temperature=1.0, num_samples=2),
    EvaluationConfig(name="notool", temperature=1.0, num_samples=2, tool=False),
]


class Pulled(Exception):
    """The plug."""


def evaluate(
    checkpoint: Path,
    run: Path,
    seed: int = 0,
    data: dict[str, Any] | None = None,
    reward: RewardConfig = RewardConfig(),  # noqa: B008 (frozen)
    max_pixels: int | None = None,
    verb: str = "test",
    settings: list[EvaluationConfig] = SETTINGS,
    look: int | None = None,
) -> None:
    """`test` or `validate` three upright and three turned digits, or the `data`."""
    policy = PolicyConfig(path=str(checkpoint), dtype="float32", max_pixels=max_pixels)
    module = GRPOModule(policy)
    callback = RolloutCallback(
        agent=AGENT, engine=ENGINE, evaluations=settings, sampling=SamplingConfig(seed=seed), reward=reward
    )
    trainer = pl.Trainer(
        accelerator="cpu",
        default_root_dir=run,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[callback],
        limit_test_batches=look,
    )
    digits = {"upright": 3, "turned": 3}
    source = DigitTaskDataModule(**data) if data else DigitTaskDataModule(test_tasks=digits, val_tasks=digits)
    getattr(trainer, verb)(module, datamodule=source, verbose=False)


def benchmark(folder: Path, answers: list[str], cut: int | None = None) -> dict[str, Any]:
    """A file of questions, each with its own image; the image of question `cut` is truncated."""
    folder.mkdir(exist_ok=True)
    rows = []
    for number, answer in enumerate(answers):
        path = folder / f"{number}.png"
        digit_task(number, "upright").images[0].save(path)
        if number == cut:
            path.write_bytes(path.read_bytes()[:-200])
        rows.append({"question": f"Question {number}?", "answer": answer, "image": path.name})
    (folder / "asked.json").write_text(json.dumps(rows))
    return {"eval_files": [str(folder / "asked.json")], "reader": ReaderConfig(format="fields", data_source="asked")}


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


def test_the_files_describe_the_evaluation(finished: Path, tiny_checkpoint: Path) -> None:
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
    assert "| tool-use success |" in page and "### What the tool brings" in page
    assert (finished / "eval/results.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((finished / "eval/tool/metrics.json").read_text())["breakdown"] == tool["breakdown"]


def test_an_interrupted_evaluation_asks_only_the_missing_questions(
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


def test_a_test_does_not_replace_another_one(
    finished: Path, tiny_checkpoint: Path, tmp_path: Path, written: Callable[[int | None], list[str]]
) -> None:
    before = texts(finished, "tool")
    with pytest.raises(CVLightningError, match=r"holds another evaluation \(it differs in seed\).*eval_prefix"):
        evaluate(tiny_checkpoint, finished, seed=1)
    with pytest.raises(CVLightningError, match=r"notool holds another .*differs in setting\.temperature\)"):
        evaluate(tiny_checkpoint, finished, settings=[SETTINGS[0], replace(SETTINGS[1], temperature=0.5)])
    assert texts(finished, "tool") == before, "nothing is cleared before all may be"
    with pytest.raises(Pulled):
        written(3)
        evaluate(tiny_checkpoint, tmp_path)
    with pytest.raises(CVLightningError, match="max_pixels"):
        evaluate(tiny_checkpoint, tmp_path, max_pixels=64 * 96)
    assert len(texts(tmp_path, "tool")) == 3


def test_failed_trajectories_are_repeated(
    tiny_checkpoint: Path, tmp_path: Path, written: Callable[[int | None], list[str]]
) -> None:
    evaluate(tiny_checkpoint, tmp_path, seed=1)
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


def test_a_broken_image_is_skipped_and_reported(tiny_checkpoint: Path, tmp_path: Path) -> None:
    data = benchmark(tmp_path / "files", ["1", "2", "3", "4"], cut=2)
    evaluate(tiny_checkpoint, tmp_path / "run", data=data)
    assert list(texts(tmp_path / "run", "tool")) == ["asked:0", "asked:1", "asked:3"]
    found = json.loads((tmp_path / "run/eval/results.json").read_text())
    tool = found["evaluations"]["tool"]
    assert (tool["num_tasks"], tool["num_trajectories"]) == (3, 6)
    [skipped] = found["about"]["data"]["skipped"]
    assert (skipped["row"], skipped["kind"]) == (2, "unreadable image")
    assert (
        "1 rows of the files could not be used and count nowhere: 1 x unreadable image."
        in (tmp_path / "run/eval/results.md").read_text()
    )


def test_a_changed_question_is_asked_again_and_a_removed_one_dropped(
    tiny_checkpoint: Path, tmp_path: Path, written: Callable[[int | None], list[str]]
) -> None:
    data = benchmark(tmp_path / "files", ["1", "2", "3", "4", "5"])
    first = written(4)
    with pytest.raises(Pulled):
        evaluate(tiny_checkpoint, tmp_path / "run", data=data)
    changed = benchmark(tmp_path / "files", ["another", "2", "3", "4"])
    again = written(None)
    evaluate(tiny_checkpoint, tmp_path / "run", data=changed)
    kept = sorted(set(first) - {"asked:0", "asked:4"})
    asked = [f"asked:{number}" for number in range(4)]
    assert sorted(again) == sorted([*(name for name in asked if name not in kept), *asked])
    groups = list(read_groups(tmp_path / "run/eval/tool"))
    assert sorted(group.task.id for group in groups) == asked, "each once, and none that is not asked"
    assert {group.task.id: group.task.ground_truth for group in groups}["asked:0"] == "another"


def brief(trajectory: Trajectory, score: float) -> float:
    """A component of a user's own."""
    return float(len(trajectory.turns) == 1)


def test_a_users_reward_component_does_not_block_the_results(
    tiny_checkpoint: Path, tmp_path: Path, written: Callable[[int | None], list[str]]
) -> None:
    reward = RewardConfig(terms=[FunctionTerm("brief", 0.1, f"{__name__}.brief")])
    written(3)
    with pytest.raises(Pulled):
        evaluate(tiny_checkpoint, tmp_path, reward=reward)
    rest = written(None)
    evaluate(tiny_checkpoint, tmp_path, reward=RewardConfig(terms=[FunctionTerm("brief", 0.1, f"{__name__}.brief")]))
    assert len(rest) == 12 - 3, "the same function is the same reward"
    about = json.loads((tmp_path / "eval/results.json").read_text())["about"]
    assert f"{__name__}.brief" in str(about["reward"]["terms"])


def test_a_test_is_finished_when_its_results_are_written(
    tiny_checkpoint: Path,
    tmp_path: Path,
    written: Callable[[int | None], list[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr("cv_lightning.rollout.evaluator.write_results", lambda *_: (_ for _ in ()).throw(OSError))
        with pytest.raises(OSError):
            evaluate(tiny_checkpoint, tmp_path)
    again = written(None)
    evaluate(tiny_checkpoint, tmp_path)
    assert again == [] and (tmp_path / "eval/results.json").is_file()


def test_validate_leaves_a_test_unchanged(finished: Path, tiny_checkpoint: Path) -> None:
    before = texts(finished, "tool")
    evaluate(tiny_checkpoint, finished, verb="validate")
    assert texts(finished, "tool") == before
    assert len(texts(finished, "validation_tool")) == 6


def test_other_questions_do_not_replace_a_finished_test(finished: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    before = texts(finished, "tool")
    with pytest.raises(CVLightningError, match=r"differs in .*questions"):
        evaluate(tiny_checkpoint, finished, data=benchmark(tmp_path / "files", ["1", "2"]))
    assert texts(finished, "tool") == before


def test_a_partial_run_keeps_the_answers_to_other_questions(
    tiny_checkpoint: Path, tmp_path: Path, written: Callable[[int | None], list[str]]
) -> None:
    data = {"test_tasks": {"upright": 3, "turned": 3}, "tasks_per_eval_batch": 2}
    written(8)  # two batches of two questions, each asked with and without the tool
    with pytest.raises(Pulled):
        evaluate(tiny_checkpoint, tmp_path, data=data)
    for _ in range(2):
        written(None)
        evaluate(tiny_checkpoint, tmp_path, data=data, look=1)
        assert len(texts(tmp_path, "tool")) == 4, "two of the four were asked again, none was lost"
    evaluate(tiny_checkpoint, tmp_path, data=data)
    assert len(texts(tmp_path, "tool")) == len(texts(tmp_path, "notool")) == 6
    evaluate(tiny_checkpoint, tmp_path, data=data, look=1)
    assert len(texts(tmp_path, "tool")) == 6, "nor of a finished one"
    assert json.loads((tmp_path / "eval/tool/evaluation.json").read_text())["finished"] is True
