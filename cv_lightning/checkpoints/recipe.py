"""The recipe that a checkpoint was trained with: the classes of module and data, and the settings of its run."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from cv_lightning.renames import may_be_class, migrate_settings
from cv_lightning.settings import changed, flatten
from cv_lightning.types import CheckpointError

LOG = logging.getLogger(__name__)
KEY = "cv_lightning"
"""Key of this project's part of a checkpoint."""
SHOWN = 20
"""Most changed settings that a message lists."""
ONCE_OF_SFT = ("rollout.agent.prompt", "rollout.agent.tools")
"""Settings that earlier versions of SFT stored under their module, without other settings of rollouts."""
NOT_OF_THE_RECIPE = ("ckpt_path", "config", "take_over", "trainer.default_root_dir", "trainer.logger", "verbose")


def describe_classes(module: pl.LightningModule, data: object) -> dict[str, str]:
    """Names of the classes of a run's module and data."""
    return {"module": type(module).__name__, "data": type(data).__name__}


def settings_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a resolved config that belong to its recipe, by dotted name."""
    flat = flatten(dict(config))
    return {name: value for name, value in flat.items() if not name.startswith(NOT_OF_THE_RECIPE)}


def read_recipe(checkpoint: Path) -> dict[str, Any]:
    """The recipe in a checkpoint; empty if it has none, like those of earlier versions.

    Raises:
        CheckpointError: The checkpoint cannot be read.
    """
    parts = sorted(checkpoint.glob("checkpoint/*_model_states.pt")) if checkpoint.is_dir() else [checkpoint]
    if not parts:
        return {}
    try:
        loaded = torch.load(parts[0], map_location="cpu", mmap=True, weights_only=False)
    except Exception as error:  # a pickle may fail in any way
        raise CheckpointError(f"{checkpoint} cannot be read as a checkpoint ({error!r})") from error
    own = loaded.get(KEY) if isinstance(loaded, dict) else None
    recipe: dict[str, Any] = (own.get("recipe") if isinstance(own, dict) else None) or {}
    return recipe


def check_recipe(checkpoint: Path, classes: Mapping[str, str], settings: Mapping[str, Any]) -> None:
    """Refuse to resume a run of other classes, and log which settings differ from the checkpoint's.

    Args:
        checkpoint: Checkpoint to resume from.
        classes: Class names of this run's `module` and `data`.
        settings: Settings of this run, by dotted name.

    Raises:
        CheckpointError: The checkpoint is of another module or other data.
    """
    stored = read_recipe(checkpoint)
    found = _changes(migrate_settings(stored.get("settings") or {}), settings)
    shown = "; ".join(found[:SHOWN]) + (f"; and {len(found) - SHOWN} more" if len(found) > SHOWN else "")
    if not all(may_be_class(stored.get(part, name), name) for part, name in classes.items()):
        raise CheckpointError(
            f"{checkpoint} was written by {stored['module']} on {stored['data']}, this config trains "
            f"{classes['module']} on {classes['data']}: resuming would mix two runs. Give the config of that run; "
            "or, to begin with its weights, `export` it, give the folder as --model.init_args.policy.path, and another "
            f"--trainer.default_root_dir{'. Changed settings: ' + shown if shown else ''}"
        )
    if found:
        LOG.warning("resuming with %d changed settings: %s", len(found), shown)


def _changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Differences of settings in words, without those that only another version of this project makes."""
    if not old or not new:
        return []
    # An earlier version may have stored no settings of a part.
    parts = {name.partition(".")[0] for name in old if not name.startswith(ONCE_OF_SFT)}
    # An earlier version may have stored null where defaults are stored today.
    unset = tuple(name for name, value in old.items() if value is None and any(n.startswith(f"{name}.") for n in new))
    return [
        f"{name} {old.get(name)} -> {new.get(name)}"
        for name in changed(old, new)
        if old.get(name) != new.get(name)  # an absent setting is None
        and (name in old or name.partition(".")[0] in parts)
        and not any(name == part or name.startswith(f"{part}.") for part in unset)
        and not _is_same_class(name, old.get(name), new.get(name))
    ]


def _is_same_class(name: str, old: object, new: object) -> bool:
    """True for a class path that differs in its module only, or that `check_recipe` compares."""
    if not name.endswith("class_path"):
        return False
    is_compared = name in ("model.class_path", "data.class_path")
    return is_compared or None in (old, new) or str(old).rpartition(".")[2] == str(new).rpartition(".")[2]
