"""The notebooks run from top to bottom on what the smoke run left, and say something sensible about so little."""

from __future__ import annotations

import os
from pathlib import Path

import nbclient
import nbformat
import pytest

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
PICTURES = {"01_trajectories": 4, "02_rewards": 4, "03_robustness": 2, "04_tool_use": 2}
"""At least so many are drawn."""
ELSEWHERE = ("05_your_own",)
"""Run by test_docs_your_own.py, on the run of the page that it belongs to."""


@pytest.fixture(scope="module")
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A smoke run with the ablation: the one that scripts/test.sh made before, or one of our own."""
    made = Path(os.environ.get("CVL_SMOKE_RUN", "nowhere"))
    if (made / "report.html").is_file():
        return made
    if not request.config.getoption("--run-slow"):
        pytest.skip("there is no smoke run: scripts/test.sh makes one; --run-slow makes its own")
    from cv_lightning.digits.quickstart import main

    folder = tmp_path_factory.mktemp("notebooks") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(NOTEBOOKS.parent)
        patch.setenv("OMP_WAIT_POLICY", "PASSIVE")
        assert main(["--smoke", "--ablation", "--out", str(folder)]) == 0
    return folder


@pytest.mark.parametrize("name", PICTURES)
def test_a_notebook_runs_from_top_to_bottom(name: str, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CVL_RUN", str(run))
    notebook = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(NOTEBOOKS)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert [output.text for output in outputs if output.output_type == "stream"] == []  # no warnings either
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= PICTURES[name]


def test_notebooks_are_stored_without_outputs() -> None:
    files = sorted(NOTEBOOKS.glob("*.ipynb"))
    assert [path.stem for path in files] == sorted([*PICTURES, *ELSEWHERE])
    for path in files:
        cells = nbformat.read(path, as_version=4).cells
        assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells), path
