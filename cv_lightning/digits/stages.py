"""The stages of a quickstart run: names, order and time."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from cv_lightning.digits.scenes import ALL_KINDS
from cv_lightning.evaluation.runs import read_json

FULL, REDUCED = "rl", "rl_accuracy"
"""RL with and without the process reward."""
STAGES = {
    "base": "before training",
    "sft": "SFT",
    FULL: "RL",
    REDUCED: "RL, accuracy reward only",
    "sft_images": "SFT, no text",
    "rl_images": "RL, no text",
}
"""Names for people, in order."""
EVALUATION_NAME = re.compile(r"(?P<stage>\w+)_(?P<mode>greedy|sampled)_(?P<tool>tool|notool)")
"""Names of the folders of the quickstart's tests."""
TIMED = ("sft", "sft_eval", FULL, "rl_eval")
"""Keys of `timing.json` that add up to the minutes of training."""
NOT_SECONDS = ("seed", "ranks", "smoke", "iterations", "per_kind")
"""What `timing.json` holds besides seconds."""


def stage_label(stage: str) -> str:
    """Name of a stage for people."""
    return STAGES.get(stage, stage.replace("_", " "))


def stage_order(stage: str) -> tuple[int, str]:
    """Sort key of stages: the known ones in their order, then the others by name."""
    return _order(stage, list(STAGES))


def kind_order(kind: str) -> tuple[int, str]:
    """Sort key of kinds of tasks."""
    return _order(kind, list(ALL_KINDS))


def _order(name: str, known: Sequence[str]) -> tuple[int, str]:
    return (known.index(name) if name in known else len(known), name)


def read_timing(run: Path) -> dict[str, float]:
    """Numbers of `timing.json`: seconds by stage, and `NOT_SECONDS`; empty where there is none.

    Raises:
        DataError: it is not JSON.
    """
    path = run / "timing.json"
    found = read_json(path) if path.is_file() else {}
    return {name: value for name, value in found.items() if isinstance(value, int | float)}


def training_minutes(timing: dict[str, float]) -> float | None:
    """Minutes of SFT, RL and their evaluations; None unless each of them was timed."""
    if not all(name in timing for name in TIMED):
        return None
    return round(sum(timing[name] for name in TIMED) / 60, 2)
