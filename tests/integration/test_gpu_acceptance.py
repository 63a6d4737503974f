"""`scripts/gpu_acceptance.sh --cpu` executes the script itself; the whole of it with the slow tests."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


def accepted(out: Path, *arguments: str, timeout_s: float) -> dict[str, list[dict[str, Any]]]:
    """Lines by section of a run that must be green."""
    command = ["bash", "scripts/gpu_acceptance.sh", "--cpu", "--out", str(out), *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout_s, check=False)
    logs = "".join(log.read_text()[-2000:] for log in (out / "logs").glob("*.txt")) if done.returncode else ""
    assert done.returncode == 0, done.stdout + done.stderr[-2000:] + logs
    sections: dict[str, list[dict[str, Any]]] = {}
    for part in json.loads((out / "result.json").read_text())["parts"]:
        sections.setdefault(part["section"], []).extend(part["lines"])
    return sections


def test_the_script_runs_a_section_on_a_cpu(tmp_path: Path) -> None:
    lines = {line["check"]: line for line in accepted(tmp_path, "--only", "update", timeout_s=600)["update"]}
    assert float(lines["tokens/s"]["value"]) > 0 and lines["tokens/s"]["verdict"] == "measured"
    assert lines["MFU"]["verdict"] == "skip" and lines["MFU"]["detail"]


@pytest.mark.slow
def test_every_section_runs_on_a_cpu_or_says_why_not(tmp_path: Path) -> None:
    sections = accepted(tmp_path, timeout_s=1500)
    assert set(sections) == {"tests", "engine", "sync", "update", "zero", "quickstart"}
    lines = [line for section in sections.values() for line in section]
    assert all(line["detail"] for line in lines if line["verdict"] == "skip")
    stand_in = [line for line in sections["engine"] if "stand-in" in line["check"]]
    assert len(stand_in) == 4 * 2 * 5 and all(line["verdict"] == "pass" for line in stand_in)
    assert {line["check"] for line in sections["engine"] if line["check"].startswith("CPU build")} == {
        "CPU build, sync 1", "CPU build, sync 2", "CPU build, stale weights are noticed",
    }  # fmt: skip
