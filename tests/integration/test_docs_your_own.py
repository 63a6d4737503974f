"""docs/your_own.md and notebooks/05_your_own.ipynb, run as a reader would: in an empty folder, block after block.

Only these blocks are not run: the one of settings for a GPU, and `chat`, which starts another engine.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import nbclient
import nbformat
import pytest
from shell_commands import page_files
from verb_server import bin_folder

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "notebooks" / "05_your_own.ipynb"
BLOCK = re.compile(r"^```bash\n(.*?)^```$", re.DOTALL | re.MULTILINE)
NOT_RUN = ("# With a GPU", "cv-lightning chat")


class Followed(NamedTuple):
    """The reader's folder after the page, and what the shell has printed."""

    folder: Path
    printed: str


@pytest.fixture(scope="module")
def followed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Followed]:
    folder = tmp_path_factory.mktemp("reader")
    script = ["set -euo pipefail"]
    page = (ROOT / "docs" / "your_own.md").read_text(encoding="utf-8")
    for name, text in page_files(page).items():
        (folder / name).write_text(text)
    script += [block for block in BLOCK.findall(page) if not block.startswith(NOT_RUN)]
    with bin_folder(tmp_path_factory.mktemp("s")) as programs:
        environment = os.environ | {"PATH": f"{programs}:{os.environ['PATH']}", "OMP_WAIT_POLICY": "PASSIVE"}
        done = subprocess.run(
            ["bash", "-c", "\n".join(script)], cwd=folder, env=environment, text=True, capture_output=True
        )
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    yield Followed(folder, done.stdout + done.stderr)


def test_the_page_leads_to_a_trained_evaluated_and_reported_model(followed: Followed) -> None:
    run = followed.folder / "runs" / "mine"
    for folder in (run / "sft" / "model", run / "grpo" / "model", followed.folder / "my_model"):
        assert (folder / "model.safetensors").is_file() and (folder / "README.md").is_file()
    weights = {
        path: (path / "model.safetensors").read_bytes() for path in (run / "sft" / "model", run / "grpo" / "model")
    }
    assert len({followed.folder.joinpath("tiny", "model.safetensors").read_bytes(), *weights.values()}) == 3
    results = json.loads((run / "eval" / "results.json").read_text())["evaluations"]
    assert results.keys() == {"greedy_tool", "greedy_notool"}
    assert all(found["num_trajectories"] == 6 for found in results.values()), results
    page = (run / "report.html").read_text()
    assert "Which number is on the card?" in page and "digits_only" in page
    assert (run / "eval" / "compare_greedy_notool_greedy_tool" / "compare.html").is_file()
    assert "24 of 24 rows usable" in followed.printed and "verified from the file: 8 of 8" in followed.printed


def test_the_reward_term_and_the_tool_of_the_page_took_part(followed: Followed) -> None:
    lines = (followed.folder / "runs" / "mine" / "grpo" / "metrics.csv").read_text().splitlines()
    assert any(name.startswith("reward/digits_only") for name in lines[0].split(","))
    stored = list((followed.folder / "runs" / "mine" / "grpo" / "trajectories").glob("*.jsonl"))
    groups = [json.loads(line) for path in stored for line in path.read_text().splitlines()]
    rewards = [trajectory["reward"] for group in groups for trajectory in group["trajectories"]]
    assert len({reward["components"]["digits_only"] for reward in rewards}) > 1, "the term tells trajectories apart"
    assert "own_parts.Contrast" in (followed.folder / "runs" / "mine" / "grpo" / "fit_config.yaml").read_text()
    shown = int(re.findall(r"^(\d+) tokens, 0 of them trained on", followed.printed, re.MULTILINE)[0])
    lengths = [trajectory["num_prompt_tokens"] for group in groups for trajectory in group["trajectories"]]
    assert min(lengths) > shown, "the prompt of the run describes the second tool, that of `data show` does not"


def test_the_notebook_reads_the_run_of_the_page(followed: Followed) -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbclient.NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(followed.folder)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert [output.text for output in outputs if output.output_type == "stream"] == []  # no warnings either
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 4
