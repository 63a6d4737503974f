"""The acceptance run's own control: every trouble is a line, later parts run, and a resumed run keeps what is done."""

from __future__ import annotations

import json
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts" / "acceptance"))
import run as acceptance  # noqa: E402
from results import Line, Part, summary, table  # noqa: E402

KNOWN = {"commit": "a", "torch": "2.14.0"}


@pytest.fixture
def options(tmp_path: Path) -> Namespace:
    return Namespace(out=tmp_path, model="Qwen/Qwen3-VL-8B", cpu=True, again=False)


class Process:
    """Stands for the process of a part: writes lines, then ends as told."""

    def __init__(self, *lines: Line, code: int = 0, error: Exception | None = None) -> None:
        self.lines, self.code, self.error, self.starts = lines, code, error, 0
        self.given: dict[str, Any] = {}

    def __call__(self, command: list[str], **given: Any) -> subprocess.CompletedProcess[str]:
        self.starts, self.given = self.starts + 1, given
        file = Path(next(part for part in command if part.endswith(".jsonl")))
        file.write_text("".join(json.dumps(vars(line)) + "\n" for line in self.lines))
        given["stdout"].write("noise\nRuntimeError: out of memory\n")
        given["stdout"].flush()
        if self.error is not None:
            raise self.error
        return subprocess.CompletedProcess(command, self.code)


GOOD = Line(check="agreement", verdict="pass", value="0.01")


@pytest.mark.parametrize(
    ("process", "said"),
    [
        (Process(GOOD, code=1), "ended with code 1: RuntimeError: out of memory"),
        (
            Process(GOOD, error=subprocess.TimeoutExpired("x", 7)),
            "not finished within 7 s; run it alone with --only engine",
        ),
        (Process(), "found nothing"),
    ],
)
def test_a_part_that_breaks_is_a_failed_line_beside_what_it_found(
    options: Namespace, process: Process, said: str
) -> None:
    part = acceptance.run_unit("engine", acceptance.Unit(name="x"), options, KNOWN, 7, process)
    assert [line.verdict for line in part.lines] == ["pass"] * len(process.lines) + ["fail"]
    assert said in part.lines[-1].detail and not part.is_done
    assert Part.load(options.out, "engine", "x") == part


def test_a_part_for_which_no_time_is_left_is_not_started(options: Namespace) -> None:
    process = Process(GOOD)
    part = acceptance.run_unit("engine", acceptance.Unit(name="x"), options, KNOWN, -1, process)
    assert process.starts == 0 and part.lines[0].verdict == "fail" and "480 s" in part.lines[0].detail


def test_every_process_is_told_its_model_runner_and_no_rank(
    options: Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "3")
    units = {unit.name: unit for unit in acceptance.SECTIONS["engine"][1]}
    assert set(units) == {"v2-async", "v2-sync", "v1-async", "v1-sync"}
    options.cpu = False
    for name, unit in units.items():
        process = Process(GOOD)
        acceptance.run_unit("engine", unit, options, KNOWN, 7, process)
        assert process.given["env"]["VLLM_USE_V2_MODEL_RUNNER"] == {"v2": "1", "v1": "0"}[name[:2]]
        assert "LOCAL_RANK" not in process.given["env"]


def test_a_resumed_run_keeps_what_is_done_and_repeats_the_rest(
    options: Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[str] = []

    def unit(section: str, unit: Any, options: Namespace, known: dict[str, str], timeout_s: float) -> Part:
        started.append(unit.name)
        failed = unit.name == "v1-async" and len(started) <= 4
        line = Line(check=unit.name, verdict="fail" if failed else "pass")
        part = Part(section=section, name=unit.name, seconds=1.0, lines=(line,), conditions=known)
        part.save(options.out)
        return part

    monkeypatch.setattr(acceptance, "run_unit", unit)
    first = acceptance.run_section("engine", options, KNOWN)
    assert [part.is_done for part in first] == [True, True, False, True], "the section continues after a failure"
    started.append("again")
    assert all(part.is_done for part in acceptance.run_section("engine", options, KNOWN))
    assert started[5:] == ["v1-async"]
    acceptance.run_section("engine", options, KNOWN | {"torch": "2.15.0"})
    assert len(started) == 10, "other versions make findings stale"
    (options.out / "engine.v2-sync.json").write_text("{half a file")
    acceptance.run_section("engine", options, KNOWN | {"torch": "2.15.0"})
    assert started[10:] == ["v2-sync"]


def test_the_exit_code_and_the_json_tell_of_failures(
    options: Namespace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def section(name: str, options: Namespace, known: dict[str, str]) -> list[Part]:
        verdict = "fail" if name == "sync" else "skip"
        part = Part(section=name, name="all", seconds=0.0, lines=(Line(check=name, verdict=verdict),), conditions=known)  # type: ignore[arg-type]
        part.save(options.out)
        return [part]

    monkeypatch.setattr(acceptance, "run_section", section)
    monkeypatch.setattr(acceptance, "conditions", lambda *_: KNOWN)
    arguments = ["--cpu", "--out", str(options.out)]
    assert acceptance.main(arguments) == 1
    result = json.loads((options.out / "result.json").read_text())
    assert result["summary"] == {"pass": 0, "measured": 0, "skip": 5, "fail": 1}
    assert [part["section"] for part in result["parts"]] == list(acceptance.SECTIONS)
    assert acceptance.main([*arguments, "--only", "zero", "--only", "update"]) == 0
    capsys.readouterr()
    assert acceptance.main(["--list"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(acceptance.SECTIONS)
    with pytest.raises(SystemExit):
        acceptance.main([*arguments, "--only", "nothing"])


def test_without_a_gpu_it_says_what_to_do(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert acceptance.main([]) == 2
    assert "--cpu" in capsys.readouterr().err


def test_the_table_has_a_verdict_a_line() -> None:
    lines = (GOOD, Line(check="MFU", verdict="skip", detail="no GPU"))
    part = Part(section="engine", name="x", seconds=1.0, lines=lines, conditions=KNOWN)
    rows = table([part]).splitlines()
    assert [row.split()[0] for row in rows] == ["pass", "skip"] and "no GPU" in rows[1]
    assert summary([part]) == {"pass": 1, "measured": 0, "skip": 1, "fail": 0}
    assert table([]) == ""
