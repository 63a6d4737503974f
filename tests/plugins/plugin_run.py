"""Runs `base.yaml` with a second config that names plugins."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cv_lightning.cli import main

BASE = Path(__file__).with_name("base.yaml")


def run(verb: str, plugins: str, policy: Path, folder: Path, *flags: str) -> Path:
    """Run a verb and return the run's folder.

    Args:
        verb: `fit` or `test`.
        plugins: YAML text of the second config.
        policy: The policy's folder.
        folder: Folder of the config and the run.
        flags: Further flags.
    """
    config = folder / "plugins.yaml"
    config.write_text(plugins)
    paths = ["--trainer.default_root_dir", str(folder / "run"), "--model.init_args.policy.path", str(policy)]
    main([verb, "--config", str(BASE), "--config", str(config), *paths, *flags])
    return folder / "run"


def stored_groups(folder: Path) -> list[dict[str, Any]]:
    """The groups of a store, sorted by the task's id."""
    groups = [json.loads(line) for path in folder.glob("trajectories/*.jsonl") for line in path.open()]
    return sorted(groups, key=lambda group: group["task"]["id"])
