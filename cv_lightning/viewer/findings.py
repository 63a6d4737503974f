"""Section of the report that says which trainings of the run did not learn, and what to change."""

from __future__ import annotations

from pathlib import Path

from cv_lightning.evaluation.health import Finding, find
from cv_lightning.evaluation.runs import METRICS, Run, read_rows, read_settings

CONFIG = "fit_config.yaml"


def findings_of(run: Run, *, ended: bool) -> dict[str, list[Finding]]:
    """Findings by stage of the run, as the training itself computes them; stages without any are left out.

    Args:
        run: The run.
        ended: False for a page that is shown while the run trains.
    """
    found = {}
    for stage in run.curves:
        folder = Path() if stage == "run" else Path(stage)
        rows = read_rows(run.folder / folder / METRICS)
        found[stage] = find(rows, read_settings(run.configs.get(str(folder / CONFIG), "")), ended=ended)
    return {stage: listed for stage, listed in found.items() if listed}
