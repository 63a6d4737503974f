"""The model card of an exported policy: its base model, the run's resolved config, commit and figures."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

from cv_lightning.evaluation.runs import read_curves, read_figures
from cv_lightning.evaluation.tables import Grid
from cv_lightning.types import DataError

TRAINING_FIGURES = (
    "sft/loss",
    "reward/",
    "rollout/tool_use_success",
    "rollout/accuracy",
    "policy/mismatch_max",
    "policy/kl",
)
"""Prefixes of the training metrics that a card shows."""
LAST_ROWS = 10


def model_card(base: str, dtype: str, run: Path | None, state: str) -> str:
    """Text of README.md.

    Args:
        base: Folder or hub name of the model that training began with.
        dtype: Data type of the weights.
        run: The run's folder; None: unknown.
        state: The checkpoint's description, as in `iteration 100`.
    """
    header: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "image-text-to-text"}
    header["tags"] = ["cv_lightning", "thinking-with-images"]
    if not Path(base).exists():
        header["base_model"] = base
    parts = [
        f"---\n{yaml.safe_dump(header, sort_keys=False)}---",
        "# A vision-language model that thinks with images by writing code",
        f"Trained with cv_lightning from `{base}`; {state}; weights in {dtype}. Its chat template opens nothing in the "
        "generation prompt: the model writes `<think>` itself.",
    ]
    if run is not None:
        parts += [part for part in (_evaluations(run), _training(run), _record(run), _config(run)) if part]
    return "\n\n".join(parts) + "\n"


def _evaluations(run: Path) -> str:
    """Figures with 95 % intervals of every evaluation in the run's folder."""
    rows = []
    for path in sorted(run.glob("eval/*/metrics.json")):
        try:
            figures = read_figures(path)
        except DataError:  # the export does not need them
            continue
        for name, figure in figures.items():
            if isinstance(figure, dict) and {"value", "low", "high", "n"} <= figure.keys() and figure["n"]:
                interval = f"[{figure['low']:.3f}, {figure['high']:.3f}]"
                rows.append([path.parent.name, name, f"{figure['value']:.3f}", interval, str(figure["n"])])
    headings = ["setting", "metric", "value", "95 % interval", "n"]
    return Grid("Evaluation", headings, rows).markdown(2).strip() if rows else ""


def _training(run: Path) -> str:
    """Means of the last rows of the training curves."""
    path = run / "metrics.csv"
    rows = [
        [curve.name, f"{fmean(curve.values[-LAST_ROWS:]):.4g}"]
        for curve in (read_curves(path) if path.is_file() else [])
        if curve.name.startswith(TRAINING_FIGURES)
    ]
    title = f"Training, mean of the last {LAST_ROWS} iterations"
    return Grid(title, ["metric", "value"], rows).markdown(2).strip() if rows else ""


def _record(run: Path) -> str:
    path = run / "fit_run.json"
    return f"## Run\n\n```json\n{path.read_text().strip()}\n```" if path.is_file() else ""


def _config(run: Path) -> str:
    path = run / "fit_config.yaml"
    return f"## Resolved config\n\n```yaml\n{path.read_text().strip()}\n```" if path.is_file() else ""
