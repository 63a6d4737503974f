"""What a checkpoint was trained by: the classes of module and data, and the settings of its run."""

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
"""Key of our own part in a checkpoint."""
SHOWN = 20
"""Changed settings that a message lists."""
NOT_OF_THE_RECIPE = ("ckpt_path", "config", "take_over", "trainer.default_root_dir", "trainer.logger", "verbose")


def describe_classes(module: pl.LightningModule, data: object) -> dict[str, str]:
    """Names of the classes that a run is made of."""
    return {"module": type(module).__name__, "data": type(data).__name__}


def settings_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a resolved config that make its recipe, by dotted name."""
    flat = flatten(dict(config))
    return {name: value for name, value in flat.items() if not name.startswith(NOT_OF_THE_RECIPE)}


def read_recipe(checkpoint: Path) -> dict[str, Any]:
    """What a checkpoint says of its recipe; empty where it says nothing, as older ones do.

    Raises:
        CheckpointError: it cannot be read.
    """
    parts = sorted(checkpoint.glob("checkpoint/*_model_states.pt")) if checkpoint.is_dir() else [checkpoint]
    if not parts:
        return {}
    try:
        loaded = torch.load(parts[0], map_location="cpu", mmap=True, weights_only=False)
    except Exception as error:  # a pickle may fail in any way
        raise CheckpointError(f"{checkpoint} cannot be read as a checkpoint ({error!r})") from error
    own = loaded.get(KEY) if isinstance(loaded, dict) else None
    found = own.get("recipe") if isinstance(own, dict) else None
    return found if isinstance(found, dict) else {}


def check_recipe(checkpoint: Path, classes: Mapping[str, str], settings: Mapping[str, Any]) -> None:
    """Refuse to continue a run of other classes; say which settings differ from the checkpoint's.

    Args:
        checkpoint: to resume from.
        classes: `module` and `data`, names of the classes of this run.
        settings: of this run, by dotted name.

    Raises:
        CheckpointError: it is of another module or other data.
    """
    stored = read_recipe(checkpoint)
    before = migrate_settings(stored.get("settings") or {})
    found = _changes(before, settings)
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
    if not old or not new:
        return []
    unset = {name for name, value in old.items() if value is None and any(n.startswith(f"{name}.") for n in new)}
    parts = {name.partition(".")[0] for name in old}
    names = [
        name
        for name in changed(old, new)
        if old.get(name) != new.get(name)  # an absent one is None
        and name.partition(".")[0] in parts  # an earlier version stored no settings of this part
        and not any(name == part or name.startswith(f"{part}.") for part in unset)  # and of this one null for defaults
    ]
    return [f"{name} {old.get(name)} -> {new.get(name)}" for name in names if not _is_same_class(name, old, new)]


def _is_same_class(name: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    """True for a class path, unless two differ in more than where the class is; module and data are compared before."""
    paths = old.get(name), new.get(name)
    if not name.endswith("class_path") or name in ("model.class_path", "data.class_path"):
        return name.endswith("class_path")
    return None in paths or len({str(path).rpartition(".")[2] for path in paths}) == 1
