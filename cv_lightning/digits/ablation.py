"""The same RL with the accuracy and format reward only: what is compared, beside the run with the process reward."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from cv_lightning.digits.stages import FULL, REDUCED
from cv_lightning.evaluation.curves import mean_between
from cv_lightning.evaluation.runs import Curve, read_curves

NEEDLESS = "rollout/spurious"
"""Metric: share of the trajectories of upright tasks in which an orientation operation ran."""
FIRST, LAST = 6, 25
"""Iterations, both included, in which needless turns are compared: later both runs have few."""
LABELS = {FULL: "with process reward", REDUCED: "without process reward"}


class Needless(NamedTuple):
    """Needless turns of one run."""

    stage: str
    label: str
    mean: float
    """Mean over iterations of the share, in [0, 1]."""
    num_iterations: int
    """How many of them logged it: an iteration without upright tasks does not."""

    @property
    def note(self) -> str:
        """What the mean was taken over."""
        all_of_them = self.num_iterations == LAST - FIRST + 1
        some = "" if all_of_them else f", {self.num_iterations} of which had upright tasks"
        return f"mean of iterations {FIRST}\N{EN DASH}{LAST}{some}"


def needless_turns(curves: dict[str, list[Curve]]) -> list[Needless]:
    """Needless turns on upright tasks while sampling, with the process reward and without.

    Args:
        curves: by stage.

    Returns:
        Empty unless both stages are there; a stage that logged nothing in these iterations is left out.
    """
    if FULL not in curves or REDUCED not in curves:
        return []
    found = []
    for stage, label in LABELS.items():
        mean, count = mean_between(curves[stage], NEEDLESS, FIRST, LAST)
        if count:
            found.append(Needless(stage, label, mean, count))
    return found


def needless_while_sampling(run: Path) -> list[Needless]:
    """`needless_turns` of a run folder."""
    files = {stage: run / stage / "metrics.csv" for stage in (FULL, REDUCED)}
    return needless_turns({stage: read_curves(path) for stage, path in files.items() if path.is_file()})
