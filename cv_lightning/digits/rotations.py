"""Unnecessary rotations in the RL of the quickstart, with and without the process reward."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from cv_lightning.digits.stages import FULL, REDUCED
from cv_lightning.evaluation.curves import mean_between
from cv_lightning.evaluation.runs import Curve, read_curves

METRIC = "rollout/spurious"
"""Fraction of the trajectories of upright tasks in which an orientation operation ran."""
FIRST, LAST = 6, 25
"""Iterations, both included, that are compared: later both runs have few unnecessary rotations."""
LABELS = {FULL: "with process reward", REDUCED: "without process reward"}


class UnnecessaryRotations(NamedTuple):
    """Unnecessary rotations of one run."""

    label: str
    mean: float
    """Mean of `METRIC` over the iterations, in [0, 1]."""
    num_iterations: int
    """Number of iterations that had upright tasks."""

    @property
    def note(self) -> str:
        """The iterations that the mean is taken over."""
        all_of_them = self.num_iterations == LAST - FIRST + 1
        some = "" if all_of_them else f", {self.num_iterations} of which had upright tasks"
        return f"mean of iterations {FIRST}\N{EN DASH}{LAST}{some}"


def unnecessary_rotations(curves: Mapping[str, list[Curve]]) -> list[UnnecessaryRotations]:
    """Unnecessary rotations on upright images while sampling, with the process reward and without.

    Args:
        curves: Curves by stage.

    Returns:
        Empty unless both stages are there; a stage that logged nothing in these iterations is left out.
    """
    if not LABELS.keys() <= curves.keys():
        return []
    found = [UnnecessaryRotations(LABELS[stage], *mean_between(curves[stage], METRIC, FIRST, LAST)) for stage in LABELS]
    return [entry for entry in found if entry.num_iterations]


def rotations_while_sampling(run: Path) -> list[UnnecessaryRotations]:
    """`unnecessary_rotations` of a run folder."""
    files = {stage: run / stage / "metrics.csv" for stage in LABELS}
    return unnecessary_rotations({stage: read_curves(path) for stage, path in files.items() if path.is_file()})
