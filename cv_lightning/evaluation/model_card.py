"""The model card of an exported policy: what it began as, the run's resolved config, commit and figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from cv_lightning.evaluation.runs import read_curves, read_figures
from cv_lightning.types import DataError

TRAINING_FIGURES = (
    "sft/loss",
    "reward/",
    "rollout/tool_use_success",
    "rollout/accuracy",
    "policy/parity_max",
    "policy/kl",
)
"""Beginnings of the names of training metrics that a card shows."""
LAST_ROWS = 10


def model_card(base: str, dtype: str, run: Path | None, state: str) -> str:
    """Text of README.md.

    Args:
        base: folder or hub name of the model that training began with.
        dtype: of the weights.
        run: the run's folder, as far as it is known.
        state: which of the run's states this is.
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
        except DataError:  # no reason to go without the export
            continue
        for name, figure in figures.items():
            if isinstance(figure, dict) and {"value", "low", "high", "n"} <= figure.keys() and figure["n"]:
                interval = f"[{figure['low']:.3f}, {figure['high']:.3f}]"
                rows.append([path.parent.name, name, f"{figure['value']:.3f}", interval, str(figure["n"])])
    return _table("Evaluation", ["setting", "metric", "value", "95 % interval", "n"], rows)


def _training(run: Path) -> str:
    """Means of the last rows of the training curves."""
    path = run / "metrics.csv"
    curves = read_curves(path) if path.is_file() else []
    rows = []
    for curve in curves:
        if curve.name.startswith(TRAINING_FIGURES):
            last = curve.values[-LAST_ROWS:]
            rows.append([curve.name, f"{sum(last) / len(last):.4g}"])
    return _table(f"Training, mean of the last {LAST_ROWS} iterations", ["metric", "value"], rows)


def _table(title: str, head: list[str], rows: list[list[str]]) -> str:
    """Markdown; empty where there are no rows."""
    if not rows:
        return ""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join([f"## {title}", "", *(f"| {' | '.join(line)} |" for line in lines)])


def _record(run: Path) -> str:
    path = run / "fit_run.json"
    return f"## Run\n\n```json\n{path.read_text().strip()}\n```" if path.is_file() else ""


def _config(run: Path) -> str:
    path = run / "fit_config.yaml"
    return f"## Resolved config\n\n```yaml\n{path.read_text().strip()}\n```" if path.is_file() else ""
