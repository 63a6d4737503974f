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
from verb_server import bin_folder

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "notebooks" / "05_your_own.ipynb"
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
NOT_RUN = ("# With a GPU", "cv-lightning chat")


class Followed(NamedTuple):
    """The reader's folder after the page, and what the shell has printed."""

    folder: Path
    printed: str


@pytest.fixture(scope="module")
def followed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Followed]:
    folder = tmp_path_factory.mktemp("reader")
    script = ["set -euo pipefail"]
    for kind, text in BLOCK.findall((ROOT / "docs" / "your_own.md").read_text(encoding="utf-8")):
        first = text.splitlines()[0]
        if kind in ("python", "yaml"):
            (folder / first.removeprefix("# ")).write_text(text)
        elif not first.startswith(NOT_RUN):
            script.append(text)
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
    weights = {path: (path / "model.safetensors").read_bytes() for path in (run / "sft" / "model", run / "grpo" / "model")}
    assert len({followed.folder.joinpath("tiny", "model.safetensors").read_bytes(), *weights.values()}) == 3
    results = json.loads((run / "eval" / "results.json").read_text())["evaluations"]
    assert results.keys() == {"greedy_tool", "greedy_notool"}
    assert all(found["metrics"]["trajectories"] == 6 for found in results.values()), results
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
    assert "`contrast` stretches the contrast" in followed.printed or "contrast" in (followed.folder / "mine.yaml").read_text()
