"""Old names in stored and in users' files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from cv_lightning.commands.config import main
from cv_lightning.renames import migrate_config, new_key

OLD: dict[str, Any] = {
    "trainer": {
        "max_epochs": 1,
        "logger": {"class_path": "cv_lightning.callbacks.wandb.WandbRun", "init_args": {"project": "p"}},
        "callbacks": [
            {"class_path": "cv_lightning.callbacks.checkpoint.CheckpointCallback", "init_args": {"keep": 1}},
            {"class_path": "somebody.Callback", "init_args": {"x": 1}},
            {
                "class_path": "cv_lightning.callbacks.rollout.RolloutCallback",
                "init_args": {"num_samples": 4, "reward": {"judge": {"base_url": "u"}}},
            },
        ],
    },
    "model": {"class_path": "cv_lightning.modules.grpo.GRPOModule", "init_args": {"policy": {"path": "p"}}},
}


def test_single_callbacks_get_keys_of_their_own() -> None:
    new, changes = migrate_config(OLD)
    assert new["checkpoint"] == {"keep": 1}
    assert new["rollout"]["num_samples"] == 4 and new["rollout"]["reward"] == {"judge": {"base_url": "u"}}
    assert new["trainer"]["callbacks"] == [{"class_path": "somebody.Callback", "init_args": {"x": 1}}]
    assert new["trainer"]["logger"]["class_path"] == "cv_lightning.loggers.wandb.WandbRun"
    assert changes["trainer.callbacks.RolloutCallback"] == "rollout"
    assert OLD["trainer"]["callbacks"][0]["init_args"] == {"keep": 1}, "the given config is left as it is"
    assert migrate_config(new) == (new, {})


def test_flags_and_settings_have_one_new_name() -> None:
    assert new_key("trainer.callbacks.init_args.reward.judge.base_url") == "rollout.reward.judge.base_url"
    assert new_key("trainer.callbacks.RolloutCallback.num_samples") == "rollout.num_samples"
    assert new_key("trainer.callbacks.RolloutCallback.init_args.num_samples") == "rollout.num_samples"
    assert new_key("trainer.callbacks.reward.format") == "rollout.reward.format"
    assert new_key("trainer.max_epochs") == "trainer.max_epochs"


COMMENTED = """\
# A recipe of mine.
trainer:
  max_epochs: 1   # of all batches
  callbacks:
    - class_path: cv_lightning.callbacks.rollout.RolloutCallback
      init_args:
        num_samples: 4   # half of the paper's
        agent: {max_turns: 3}
model: {class_path: GRPOModule}
"""


def test_migrate_rewrites_a_file_with_its_comments(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(COMMENTED)
    assert main(["migrate", str(path)]) == 0
    assert "trainer.callbacks.RolloutCallback is now rollout" in capsys.readouterr().out
    text = path.read_text()
    for comment in ("# A recipe of mine.", "# of all batches", "# half of the paper's"):
        assert comment in text
    assert yaml.safe_load(text) == migrate_config(yaml.safe_load(COMMENTED))[0]
    assert (tmp_path / "mine.yaml.old").read_text() == COMMENTED
    assert main(["migrate", str(path)]) == 0
    assert "nothing to change" in capsys.readouterr().out


def test_migrate_leaves_a_file_that_is_not_a_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, text in (("list.yaml", "- 1\n"), ("broken.yaml", "a: [\n")):
        (tmp_path / name).write_text(text)
        assert main(["migrate", str(tmp_path / name)]) == 1
        assert name in capsys.readouterr().err and (tmp_path / name).read_text() == text
    assert main(["migrate", str(tmp_path / "none.yaml")]) == 1


@pytest.mark.parametrize(
    ("credit", "crop_frame", "kept"),
    [("net", "source", False), ("steps", "source", False), ("ran", "call", False), ("ran", "source", True)],
)
def test_settings_that_follow_from_another_are_dropped(credit: str, crop_frame: str, kept: bool) -> None:
    reward = {"credit": credit, "crop_frame": crop_frame, "accuracy": 2.0}
    new, _ = migrate_config({"rollout": {"reward": reward}})
    left = new["rollout"]["reward"]
    assert left == reward if kept else left == {"credit": credit, "accuracy": 2.0}
