"""The stages of a quickstart run: what they are called, in which order they come, and how long they took."""

from __future__ import annotations

import re
from pathlib import Path

from cv_lightning.digits.scenes import KINDS
from cv_lightning.evaluation.runs import read_json

FULL, REDUCED = "rl", "rl_accuracy"
"""RL with and without the process reward."""
STAGES = {"base": "before training", "sft": "SFT", FULL: "RL", REDUCED: "RL, accuracy reward only"}
"""Names for people, in order."""
EVALUATION_NAME = re.compile(r"(?P<stage>\w+)_(?P<mode>greedy|sampled)_(?P<tool>tool|notool)")
"""Of the folders in which the quickstart's tests are."""
TIMED = ("sft", "sft_eval", FULL, "rl_eval")
"""Keys of `timing.json` that add up to the minutes of training."""
NOT_SECONDS = ("seed", "ranks", "iterations", "per_kind")
"""What `timing.json` holds besides seconds."""


def stage_label(stage: str) -> str:
    """Name of a stage for people."""
    return STAGES.get(stage, stage.replace("_", " "))


def stage_order(stage: str) -> tuple[int, str]:
    """Sort key of stages: the known ones as they follow each other, then the others by name."""
    known = list(STAGES)
    return (known.index(stage) if stage in known else len(known), stage)


def kind_order(kind: str) -> tuple[int, str]:
    """Sort key of kinds of tasks."""
    known: list[str] = list(KINDS)
    return (known.index(kind) if kind in known else len(known), kind)


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
