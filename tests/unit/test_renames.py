"""Old names in stored and in users' files."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import jsonargparse
import pytest
import yaml

from cv_lightning.commands.config import main
from cv_lightning.renames import may_be_class, migrate_config, migrate_settings, new_key, new_metric, table
from cv_lightning.rl.algorithm import AlgorithmConfig
from cv_lightning.rl.losses import DPPO
from cv_lightning.settings import flatten

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


def test_metrics_have_one_new_name() -> None:
    assert new_metric("rollout/signal_frac") == "rollout/reward_variance_frac"
    old = ("must_use", "rollout/must_use", "greedy/turned/must_use")
    assert {new_metric(name).rpartition("/")[2] for name in old} == {"tool_use_success"}
    assert new_metric("greedy/turned/must_use") == "greedy/turned/tool_use_success"
    assert new_metric("rollout/accuracy") == "rollout/accuracy"


def test_a_config_with_keys_of_the_digits_gets_their_data_module() -> None:
    files = {"data": {"class_path": "TaskDataModule", "init_args": {"train_files": ["a.parquet"], "num_iterations": 3}}}
    assert migrate_config(files) == (files, {})
    old = {"data": {"class_path": "cv_lightning.data.modules.SFTDataModule", "init_args": {"warm_up_share": 0.5}}}
    new, changes = migrate_config(old)
    path = "cv_lightning.digits.modules.DigitSFTDataModule"
    assert new["data"] == {"class_path": path, "init_args": {"warm_up_share": 0.5}}
    assert changes == {"cv_lightning.data.modules.SFTDataModule": path}
    assert may_be_class("SFTDataModule", "DigitSFTDataModule") and may_be_class("SFTDataModule", "SFTDataModule")
    assert not may_be_class("TaskDataModule", "DigitSFTDataModule")


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
    assert main([str(path)]) == 0
    assert "trainer.callbacks.RolloutCallback is now rollout" in capsys.readouterr().out
    text = path.read_text()
    for comment in ("# A recipe of mine.", "# of all batches", "# half of the paper's"):
        assert comment in text
    assert yaml.safe_load(text) == migrate_config(yaml.safe_load(COMMENTED))[0]
    assert (tmp_path / "mine.yaml.old").read_text() == COMMENTED
    assert main([str(path)]) == 0
    assert "nothing to change" in capsys.readouterr().out


def test_migrate_leaves_a_file_that_is_not_a_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, text in (("list.yaml", "- 1\n"), ("broken.yaml", "a: [\n")):
        (tmp_path / name).write_text(text)
        assert main([str(tmp_path / name)]) == 2
        assert name in capsys.readouterr().err and (tmp_path / name).read_text() == text
    assert main([str(tmp_path / "none.yaml")]) == 2


@pytest.mark.parametrize(
    ("credit", "crop_frame", "kept"),
    [("net", "source", False), ("steps", "source", False), ("ran", "call", False), ("ran", "source", True)],
)
def test_settings_that_follow_from_another_are_dropped(credit: str, crop_frame: str, kept: bool) -> None:
    reward = {"credit": credit, "crop_frame": crop_frame, "accuracy": 2.0}
    new, _ = migrate_config({"rollout": {"reward": reward}})
    left = new["rollout"]["reward"]
    assert left == reward if kept else left == {"credit": credit, "accuracy": 2.0}


DEFAULTS = {
    "policy": "ppo_clip", "clip_low": None, "clip_high": None, "clip_dual": None, "aggregation": "token_mean",
    "constant_length": None, "kl_weight": 0.0, "kl": "k3", "kl_in": "loss", "kl_importance": False,
    "entropy_weight": 0.0, "importance_cap": 2.0, "importance_band": None,
}  # fmt: skip
"""A loss as a run's resolved config told it."""


def with_algorithm(loss: Any, rollout: Any = None, module: str = "grpo.GRPOModule", **more: Any) -> dict[str, Any]:
    """A config from when loss and advantages were settings of module and rollout callback."""
    callback = {"class_path": "cv_lightning.callbacks.rollout.RolloutCallback", "init_args": rollout or {}}
    return {
        "trainer": {"callbacks": [callback]},
        "model": {"class_path": f"cv_lightning.modules.{module}", "init_args": {"loss": loss, **more}},
        "data": {"init_args": {"oversample": 1.0}},
    }


def algorithm_of(config: dict[str, Any]) -> tuple[dict[str, Any], AlgorithmConfig]:
    """The block as it is after the move, and what it builds."""
    block = migrate_config(config)[0]["model"]["init_args"]["algorithm"]
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--value", type=AlgorithmConfig)
    return block, parser.instantiate(parser.parse_object({"value": block})).value


def test_resolved_defaults_become_the_default_algorithm() -> None:
    rollout = {"advantage": {"method": "grpo", "epsilon": 1e-6}, "mask": None}
    more = {"num_minibatches": 2, "old_logprobs": "engine", "reference_path": None, "reference_every": 1}
    block, built = algorithm_of(with_algorithm(DEFAULTS, rollout, **more))
    assert block["loss"] == {
        "class_path": "cv_lightning.rl.losses.PPOClip",
        "init_args": {"clip_low": 0.2, "clip_high": 0.28, "dual_clip": 10.0},
    }
    assert repr(built.resolved()) == repr(AlgorithmConfig().resolved())


@pytest.mark.parametrize("part", [None, {}])
def test_empty_loss_block_is_removed(part: Any) -> None:
    new, _ = migrate_config(with_algorithm(part, {"advantage": None}))
    assert "loss" not in new["model"]["init_args"] and "advantage" not in new["rollout"]
    assert new["model"]["init_args"]["algorithm"] == {"dynamic_sampling": {"max_oversample": 1.0}}


def test_every_setting_of_the_algorithm_is_kept() -> None:
    loss = DEFAULTS | {"policy": "dppo", "clip_low": 0.1, "clip_dual": 30.0, "kl_weight": 0.1, "importance_cap": None}
    rollout = {"advantage": {"method": "rloo", "epsilon": 1e-6}, "mask": {"over_length": True}}
    config = with_algorithm(loss, rollout, num_minibatches=4, old_logprobs="trainer", reference_every=2)
    config["data"]["init_args"]["oversample"] = 3.0
    _, built = algorithm_of(config)
    assert repr(built.loss) == repr(DPPO(clip_low=0.1, ratio_cap=30.0)) and repr(built.advantage) == "RLOO()"
    assert built.mask.over_length and built.dynamic_sampling.max_oversample == 3.0
    assert (built.kl.weight, built.kl.every, built.tis_clip, built.num_minibatches) == (0.1, 2, None, 4)


def test_a_config_of_sft_gets_no_algorithm() -> None:
    new, _ = migrate_config(with_algorithm(None, {"advantage": None, "mask": None}, "sft.SFTModule"))
    assert "algorithm" not in new["model"]["init_args"]


def test_overlay_does_not_select_the_loss() -> None:
    new, changes = migrate_config({"model": {"init_args": {"loss": {"clip_low": 0.1}}}})
    assert new["model"]["init_args"] == {"algorithm": {"loss": {"init_args": {"clip_low": 0.1}}}}
    assert migrate_config(new) == (new, {}) and len(changes) == 1
    assert new_key("trainer.callbacks.init_args.advantage.method") == "model.init_args.algorithm.advantage.class_path"


@pytest.mark.parametrize("policy", ["ppo_clip", "gspo", "cispo", "dppo"])
def test_settings_of_a_checkpoint_are_those_of_its_config(policy: str) -> None:
    config = with_algorithm(DEFAULTS | {"policy": policy}, {"advantage": {"method": "rloo", "epsilon": 1e-6}})
    new, _ = migrate_config(config)
    algorithm = {name: value for name, value in flatten(new).items() if ".algorithm." in name}
    found = migrate_settings(flatten(config))
    assert algorithm.items() <= found.items()
    assert {name for name in found if ".algorithm.loss" in name} == {n for n in algorithm if ".algorithm.loss" in n}


def test_every_new_class_path_exists() -> None:
    for old, new in table("class_paths").items():
        module, _, name = new.rpartition(".")
        assert old != new and hasattr(importlib.import_module(module), name), new
