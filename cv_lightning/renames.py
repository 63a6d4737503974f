"""Old names of config keys, class paths and metrics, and their names today.

The table is `renames.json`. Files that a run has stored (configs, checkpoints, evaluations) are read through it
silently. A flag or a user's YAML file with an old name is refused with the new one; `config migrate` rewrites the file.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("renames.json")
CALLBACKS = "trainer.callbacks"
MODULE = "model.init_args"
ALGORITHM = f"{MODULE}.algorithm"
PUBLISHED_CLIPS: dict[Any, dict[str, float]] = {
    "ppo_clip": {"clip_low": 0.2, "clip_high": 0.28, "dual_clip": 10.0},
    "gspo": {"clip_low": 3e-4, "clip_high": 4e-4, "dual_clip": float("inf")},
    "cispo": {"clip_low": 1.0, "clip_high": 4.0},
    "dppo": {"clip_low": 0.15, "clip_high": 0.15, "ratio_cap": 20.0},
}
"""Values that null stood for when the loss was a setting."""
NULL_IS_DEFAULT = (f"{MODULE}.prompt", f"{MODULE}.tools")
"""Old keys whose null stood for the default that the new key has."""
STORED = ("fit_config.yaml", "validate_config.yaml", "test_config.yaml")
"""Files of a run that hold its resolved config."""


@cache
def table(section: str) -> dict[str, Any]:
    """A section of the table: new names by old ones.

    Args:
        section: `class_paths`, `split_class_paths`, `config_keys`, `metrics` or `implied`.
    """
    found: dict[str, Any] = json.loads(FILE.read_text())[section]
    return found


def new_key(key: str) -> str:
    """The name of a dotted config key today; the key itself where it has not changed.

    Args:
        key: As in a flag without its dashes, or as `settings_of` names it: `trainer.callbacks.RolloutCallback.agent`.
            A flag for the last callback of the list used to mean the rollout callback.
    """
    listed = re.escape(CALLBACKS)
    plain = re.sub(rf"^({listed}\.[A-Z]\w*)\.init_args\.", r"\1.", key)
    plain = re.sub(rf"^{listed}\.(?:init_args\.)?(?=[a-z])(?!class_path)", f"{CALLBACKS}.RolloutCallback.", plain)
    renamed = table("config_keys")
    parts = plain.split(".")
    for length in range(len(parts), 0, -1):
        start, rest = ".".join(parts[:length]), parts[length:]
        if start in renamed:
            return new_key(".".join([renamed[start], *rest]))
    return key


def new_metric(name: str) -> str:
    """The name of a stored metric today: a column of `metrics.csv`, or a figure of an evaluation's `metrics.json`.

    An entry of the table without a `/` renames this figure of every evaluation and of the rollouts.
    """
    renamed = table("metrics")
    stage, slash, figure = name.rpartition("/")
    return str(renamed.get(name, f"{stage}{slash}{renamed.get(figure, figure)}"))


def new_class_path(path: str, arguments: Collection[str] = ()) -> str:
    """The class path of a class today.

    Args:
        path: Old class path, or the name alone.
        arguments: Names of its arguments. Where a class has become several, they determine which one is meant.
    """
    for old, became in table("split_class_paths").items():
        if path in (old, old.rpartition(".")[2]) and not set(became["arguments"]).isdisjoint(arguments):
            return str(became["class_path"])
    return str(table("class_paths").get(path, path))


def may_be_class(old: str, name: str) -> bool:
    """True if a class of one name, stored by an earlier version, may be the class of another name today."""
    names = [(path, became["class_path"]) for path, became in table("split_class_paths").items()]
    return old == name or (old, name) in [(a.rpartition(".")[2], b.rpartition(".")[2]) for a, b in names]


def migrate_config(config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """A config under the names of today.

    Args:
        config: Config of one verb, as loaded from YAML; it is not changed.

    Returns:
        The config, of the same class if that is a kind of dict, and its old names with the new ones.
    """
    migrated: dict[str, Any] = deepcopy(config) if isinstance(config, dict) else dict(config)
    changes = _migrate_class_paths(migrated)
    changes |= _drop_implied(migrated)
    moved = _migrate_callbacks(migrated)
    table_of_keys = table("config_keys")
    for old in sorted(table_of_keys, key=len, reverse=True):
        listed = next((name for name in moved if old.startswith(f"{name}.")), None)
        place = old if listed is None else f"{table_of_keys[listed]}{old.removeprefix(listed)}"
        if old not in moved and _has(migrated, place):
            value = _take(migrated, place)
            if value is not None or old not in NULL_IS_DEFAULT:
                _put(migrated, new_key(old), value)
            changes[old] = new_key(old)
    _complete_algorithm(migrated, changes)
    return migrated, changes | {old: table_of_keys[old] for old in moved}


def _drop_implied(value: Any) -> dict[str, str]:
    """Remove settings that another setting of their group implies today, where they have the implied value.

    `implied` of the table names group and setting, the other setting, and the value that each of its values implies,
    its default first. A setting with another value stays, and is refused when the config is parsed.
    """
    changes: dict[str, str] = {}
    for part in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        changes |= _drop_implied(part)
    for key, rule in table("implied").items() if isinstance(value, dict) else ():
        group, _, name = key.partition(".")
        settings = value.get(group)
        for other, follows in rule.items() if isinstance(settings, dict) and name in settings else ():
            if settings[name] == follows.get(settings.get(other, next(iter(follows)))):
                del settings[name]
                changes[key] = f"{group}.{other}"
    return changes


def migrate_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Stored settings of a checkpoint under the names of today.

    Args:
        settings: Values by dotted name, as `settings_of` returns them.
    """
    found = {new_key(name): value for name, value in settings.items()}
    for key, rule in table("implied").items():
        for name in [name for name in found if f".{name}".endswith(f".{key}")]:
            for other, follows in rule.items():
                given = found.get(f"{name.rpartition('.')[0]}.{other}", next(iter(follows)))
                if found[name] == follows.get(given):
                    del found[name]
    for part in (f"{ALGORITHM}.loss", f"{ALGORITHM}.advantage"):
        if found.get(f"{part}.class_path") in table("class_paths"):
            arguments = f"{part}.init_args."
            own = {name.removeprefix(arguments): found.pop(name) for name in list(found) if name.startswith(arguments)}
            spec = {"class_path": found[f"{part}.class_path"], "init_args": own}
            _name_class(spec)
            found[f"{part}.class_path"] = spec["class_path"]
            found |= {f"{arguments}{name}": value for name, value in spec.get("init_args", {}).items()}
    return found


def _migrate_class_paths(value: Any) -> dict[str, str]:
    changes: dict[str, str] = {}
    if isinstance(value, dict):
        path, arguments = value.get("class_path"), value.get("init_args")
        if isinstance(path, str) and (new := new_class_path(path, arguments or ())) != path:
            value["class_path"] = changes[path] = new
    for part in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        changes |= _migrate_class_paths(part)
    return changes


def _migrate_callbacks(config: dict[str, Any]) -> list[str]:
    """Move single callbacks from `trainer.callbacks` to their own keys; of several of a kind the last one holds.

    Returns:
        The old names of those that were moved.
    """
    moved: list[str] = []
    trainer = config.get("trainer")
    if not isinstance(trainer, dict):
        return moved
    for name in ("callbacks", "callbacks+"):
        listed = trainer.get(name)
        if not isinstance(listed, list):
            continue
        kept = []
        for entry in listed:
            spec = entry if isinstance(entry, Mapping) else {"class_path": entry}
            path, arguments = spec.get("class_path"), spec.get("init_args") or {}
            old = f"{CALLBACKS}.{str(path).rpartition('.')[2]}"
            if old not in table("config_keys"):
                kept.append(entry)
                continue
            moved.append(old)
            for argument in [name for name, value in arguments.items() if value is None]:
                del arguments[argument]  # null stood for the defaults, which have become the values
            _put(config, table("config_keys")[old], arguments)
        if kept and len(kept) < len(listed):
            trainer[name] = kept
        elif len(kept) < len(listed):
            del trainer[name]
    return moved


def _complete_algorithm(config: dict[str, Any], changes: Mapping[str, str]) -> None:
    """Finish what moved into `algorithm`: policy loss and advantages were settings once, and are classes.

    Args:
        config: Its keys have moved; changed in place.
        changes: Old keys to new ones.
    """
    for emptied in (f"{MODULE}.loss", "rollout.advantage"):
        if _has(config, emptied) and not _get(config, emptied):
            _take(config, emptied)
    if not any(new.startswith(ALGORITHM) for new in changes.values()):
        return
    whole = "class_path" in config["model"]
    if whole and str(config["model"]["class_path"]).endswith("SFTModule"):
        _take(config, ALGORITHM)  # a config of SFT named defaults of what RL reads
        return
    algorithm = _get(config, ALGORITHM)
    for part, default in (("loss", "ppo_clip"), ("advantage", "grpo")):
        spec = algorithm.get(part)
        if isinstance(spec, dict):
            if whole:
                spec.setdefault("class_path", default)
            _name_class(spec)
    for name in [name for name, value in algorithm.items() if value is None and name != "tis_clip"]:
        del algorithm[name]


def _name_class(spec: dict[str, Any]) -> None:
    """Name the class of a loss or of advantages by its path, with the arguments that it has."""
    given = spec.get("class_path")
    if given is not None:
        spec["class_path"] = new_class_path(given)
    arguments = spec.setdefault("init_args", {})
    if given == "dppo" and "dual_clip" in arguments:
        arguments["ratio_cap"] = arguments.pop("dual_clip")
    if given in ("grpo_no_std", "rloo"):  # which never read it
        arguments.pop("epsilon", None)
    for name in [name for name, value in arguments.items() if value is None]:
        if name in PUBLISHED_CLIPS.get(given, {}):
            arguments[name] = PUBLISHED_CLIPS[given][name]
        else:
            del arguments[name]
    if not arguments:
        del spec["init_args"]


def _get(config: Any, key: str) -> Any:
    for part in key.split("."):
        config = config[part]
    return config


def _has(config: Any, key: str) -> bool:
    for part in key.split("."):
        if not isinstance(config, dict) or part not in config:
            return False
        config = config[part]
    return True


def _take(config: dict[str, Any], key: str) -> Any:
    *outer, last = key.split(".")
    for part in outer:
        config = config[part]
    return config.pop(last)


def _put(config: dict[str, Any], key: str, value: Any) -> None:
    *outer, last = key.split(".")
    for part in outer:
        inner = config.get(part)
        if not isinstance(inner, dict):
            inner = config[part] = {}
        config = inner
    if isinstance(value, dict) and isinstance(config.get(last), dict):
        config[last].update(value)
    else:
        config[last] = value
