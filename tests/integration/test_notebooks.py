"""The notebooks run from top to bottom on a run that the quickstart made."""

from __future__ import annotations

from pathlib import Path

import nbclient
import nbformat
import pytest

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda path: path.name)
def test_runs_from_top_to_bottom(path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    from cv_lightning.commands.quickstart import main

    run = tmp_path_factory.mktemp("notebooks") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(NOTEBOOKS.parent)
        patch.setenv("OMP_WAIT_POLICY", "PASSIVE")
        assert main(["--smoke", "--out", str(run)]) == 0
        patch.setenv("CVL_RUN", str(run))
        notebook = nbformat.read(path, as_version=4)
        nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(NOTEBOOKS)}}).execute()
    pictures = [o for cell in notebook.cells for o in cell.get("outputs", ()) if "image/png" in o.get("data", {})]
    assert len(pictures) >= 4
