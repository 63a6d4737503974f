"""Old names in stored and in users' files."""

from __future__ import annotations

from typing import Any

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
    assert changes["trainer.callbacks: cv_lightning.callbacks.rollout.RolloutCallback"] == "rollout"
    assert OLD["trainer"]["callbacks"][0]["init_args"] == {"keep": 1}, "the given config is left as it is"
    assert migrate_config(new) == (new, {})


def test_flags_and_settings_have_one_new_name() -> None:
    assert new_key("trainer.callbacks.init_args.reward.judge.base_url") == "rollout.reward.judge.base_url"
    assert new_key("trainer.callbacks.RolloutCallback.num_samples") == "rollout.num_samples"
    assert new_key("trainer.max_epochs") == "trainer.max_epochs"
