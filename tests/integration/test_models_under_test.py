"""`test` accepts a model folder or a checkpoint beside its base; others and an unreachable judge are errors."""

from __future__ import annotations

import json
import logging
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from export_samples import fit_in_process
from judge_server import JudgeServer, completion, respond

from cv_lightning.agent.dialogue import DialogueEncoder
from cv_lightning.callbacks import rollout as rollout_callback
from cv_lightning.cli import main
from cv_lightning.commands.tiny import TinyCheckpoint, write
from cv_lightning.models.adapters.tiny import TinyModelConfig
from cv_lightning.trajectory import read_groups

sys.path.append(str(Path(__file__).parents[1] / "unit"))
from test_loop import ScriptedEngine

CONFIGS = Path(__file__).parents[2] / "configs"
AGENT = {"max_turns": 2, "max_turn_tokens": 16, "max_images": 2, "prompt": {"system": "none", "state_size": False}}
ENGINE = {"kind": "transformers", "max_model_len": 512, "max_num_seqs": 4, "max_images": 2}


def arguments(model: Path, run: Path, *more: str, **rollout: Any) -> list[str]:
    """`test` on five digits, sampled: another policy says other words."""
    rollout = {
        "agent": AGENT,
        "engine": ENGINE,
        "evaluations": [{"name": "tool", "temperature": 1.0}],
    } | rollout
    config = {
        "trainer": {
            "accelerator": "cpu",
            "devices": 1,
            "default_root_dir": str(run),
            "logger": False,
            "enable_progress_bar": False,
        },
        "rollout": rollout,
        "model": {
            "class_path": "cv_lightning.modules.grpo.GRPOModule",
            "init_args": {"policy": {"path": str(model), "dtype": "float32"}, "algorithm": {"kl": {"weight": 0.0}}},
        },
        "data": {
            "class_path": "cv_lightning.digits.modules.DigitTaskDataModule",
            "init_args": {"test_tasks": {"upright": 3, "turned": 2}},
        },
    }
    run.mkdir(parents=True, exist_ok=True)
    file = run.parent / f"{run.name}.yaml"
    file.write_text(yaml.safe_dump(config))
    return ["test", "--config", str(file), *more]


def words(run: Path) -> dict[str, str]:
    """What was said, by question."""
    groups = read_groups(run / "eval/tool")
    return {group.task.id: "".join(turn.text for turn in group.trajectories[0].turns) for group in groups}


def results(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "eval/results.json").read_text())
    return found


@pytest.fixture(scope="module")
def trained(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two SFT steps: a checkpoint, and the same weights as a folder."""
    return fit_in_process(tiny_checkpoint, tmp_path_factory.mktemp("trained"), "--model.init_args.optimizer.lr=0.05")


def checkpoint_of(run: Path) -> Path:
    [found] = (run / "checkpoints").glob("*.ckpt")
    return found


# ------------------------------------------------------------------------------------ a Lightning checkpoint
def test_a_checkpoint_says_what_its_exported_folder_says(
    trained: Path, tiny_checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    main(arguments(trained / "model", tmp_path / "folder"))
    with caplog.at_level(logging.WARNING):
        main(arguments(tiny_checkpoint, tmp_path / "checkpoint", "--ckpt_path", str(checkpoint_of(trained))))
    main(arguments(tiny_checkpoint, tmp_path / "base"))
    assert words(tmp_path / "checkpoint") == words(tmp_path / "folder")
    assert words(tmp_path / "checkpoint") != words(tmp_path / "base"), "the checkpoint's weights were never loaded"
    about = results(tmp_path / "checkpoint")["about"]
    assert about["checkpoint"] == str(checkpoint_of(trained)) and about["checkpoint_weights"]
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING], "nothing to warn of"


def test_a_checkpoint_of_another_family(trained: Path, tmp_path: Path) -> None:
    write(TinyCheckpoint(out=tmp_path / "other", model=TinyModelConfig(family="qwen2_5_vl")))
    with pytest.raises(SystemExit) as ended:
        main(arguments(tmp_path / "other", tmp_path / "run", "--ckpt_path", str(checkpoint_of(trained))))
    said = str(ended.value)
    assert "--ckpt_path" in said and "does not fit the qwen2_5_vl" in said and "policy.path" in said
    assert len(said) < 600, "one difference, not every name"


def test_a_checkpoint_folder_of_deepspeed_on_one_process(tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "iteration_1.ckpt/checkpoint").mkdir(parents=True)
    (tmp_path / "iteration_1.ckpt/latest").write_text("checkpoint")
    with pytest.raises(SystemExit) as ended:
        main(arguments(tiny_checkpoint, tmp_path / "run", "--ckpt_path", str(tmp_path / "iteration_1.ckpt")))
    assert "`export` it and give the folder as --model.init_args.policy.path" in str(ended.value)


# ------------------------------------------------------------------------------------ a judge that is down
def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def test_a_judge_that_is_down_leaves_answers_unscored_and_is_asked_again(
    tiny_checkpoint: Path, tmp_path: Path, encoder: DialogueEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model says what the rule calls wrong; the judge, once it is up, calls it right."""
    scripted = ScriptedEngine(encoder, lambda *_: "<answer>none</answer>", 512)
    monkeypatch.setattr(rollout_callback, "build_engine", lambda *_, **__: scripted)
    judge = JudgeServer(lambda _, writer, __: respond(writer, completion("1")), port=free_port())
    reward = yaml.safe_load((CONFIGS / "reward/accuracy_judge.yaml").read_text())
    reward["judge"] |= {"base_url": judge.url, "model": "judge", "give_up_s": 1.0}
    asked = arguments(tiny_checkpoint, tmp_path / "run", reward=reward, max_failed_frac=1.0)

    main(asked)
    down = results(tmp_path / "run")["evaluations"]["tool"]
    assert down["breakdown"]["num_unjudged"] == 5
    assert down["breakdown"]["accuracy_judged"]["n"] == 0 and down["breakdown"]["score"]["n"] == 0, "never wrong"
    state = json.loads((tmp_path / "run/eval/tool/evaluation.json").read_text())
    assert state["finished"] is False

    with judge:
        main(asked)
    up = results(tmp_path / "run")["evaluations"]["tool"]
    assert len(judge.requests) == 5
    assert (up["breakdown"]["num_judged"], up["breakdown"]["num_unjudged"]) == (5, 0)
    assert (up["breakdown"]["score"]["value"], up["breakdown"]["score"]["n"]) == (1.0, 5)
    assert up["breakdown"]["accuracy_rule"]["value"] == 0.0, "rule and judge are never mixed"
