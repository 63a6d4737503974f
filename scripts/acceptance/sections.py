"""The parts of the acceptance run; `run.py` starts one process for each.

    python scripts/acceptance/sections.py SECTION UNIT FILE [--cpu] [--model NAME] [--work FOLDER]

Findings are appended to FILE as they are made, so that a part that is cut off keeps those before.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

HERE = Path(__file__).resolve().parent
for folder in (HERE, HERE.parent / "bench", HERE.parents[1] / "tests" / "integration", HERE.parents[1]):
    sys.path.insert(0, str(folder))

from results import ROOT, Line, environment, has  # noqa: E402

Lines = Iterator[Line]


def tests(unit: str, options: argparse.Namespace) -> Lines:
    """The tests that are marked gpu."""
    files = [path for path in sorted(ROOT.glob("tests/**/test_*.py")) if "mark.gpu" in path.read_text()]
    report = options.work / "tests.xml"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-m",
        "gpu",
        "-q",
        "--run-slow",
        "--junitxml",
        str(report),
        *map(str, files),
    ]
    done = subprocess.run(command, cwd=ROOT, env=environment(), check=False)
    cases = list(ElementTree.parse(report).iter("testcase")) if report.exists() else []
    for case in cases:
        bad, skipped = [node for node in case if node.tag in ("failure", "error")], case.find("skipped")
        verdict = "fail" if bad else "skip" if skipped is not None else "pass"
        said = bad[0].get("message", "") if bad else "" if skipped is None else skipped.get("message", "")
        seconds = f"{float(case.get('time', 0)):.1f} s"
        yield Line(
            check=case.get("name", ""),
            verdict=verdict,
            value=seconds,
            detail=said.splitlines()[0][:160] if said else "",
        )
    if not cases:
        yield Line(check="tests", verdict="fail", detail=f"pytest ended with code {done.returncode} and no result")


def engine(unit: str, options: argparse.Namespace) -> Lines:
    """VLLM against the trainer under one model runner, with or without async scheduling."""
    from engine_part import cpu_engine, cycles

    runner, scheduling = unit.split("-")
    if not options.cpu:
        if reason := has("vllm"):
            yield Line(check=unit, verdict="skip", detail=reason)
            return
        yield from cycles(unit, options, async_scheduling=scheduling == "async")
        return
    yield from cycles(unit, options, async_scheduling=scheduling == "async", stand_in=True)
    reason = f"model runner {runner}, {scheduling} scheduling and sleep need a GPU"
    yield Line(check=unit, verdict="skip", detail=f"{reason}; the lines above are a stand-in engine's")
    if unit == "v2-async" and not has("vllm"):
        yield from cpu_engine(options)


def sync(unit: str, options: argparse.Namespace) -> Lines:
    """Seconds of a weight sync."""
    from engine_part import sync_seconds

    if reason := has("vllm"):
        yield Line(check="sync", verdict="skip", detail=reason)
        return
    yield from sync_seconds(options)


def update(unit: str, options: argparse.Namespace) -> Lines:
    """The packed update."""
    from update_part import update_figures

    yield from update_figures(options)


def zero(unit: str, options: argparse.Namespace) -> Lines:
    """ZeRO-3 on all GPUs against one process."""
    import torch

    ranks = 2 if options.cpu else torch.cuda.device_count()
    if reason := has("deepspeed"):
        yield Line(check="zero", verdict="skip", detail=reason)
        return
    if ranks < 2:
        yield Line(check="zero", verdict="skip", detail="one GPU: ZeRO-3 against one process needs two or more")
        return
    found = {}
    for world in (1, ranks):
        file = options.work / f"zero{world}.json"
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
        command = [*launch, str(HERE / "zero_ranks.py"), str(file), *(["--cpu"] if options.cpu else [])]
        subprocess.run(command, cwd=ROOT, env=environment(), check=True)
        found[world] = json.loads(file.read_text())
    for name in ("loss", "weights"):
        alone, shared = found[1][name], found[ranks][name]
        worst = max(abs(a - b) / max(abs(a), 1e-3) for a, b in zip(alone, shared, strict=True))
        verdict = "pass" if worst <= 1e-3 else "fail"
        yield Line(check=f"{name} on {ranks} ranks", verdict=verdict, value=f"{worst:.1e}", detail="relative, <= 1e-3")


def quickstart(unit: str, options: argparse.Namespace) -> Lines:
    """The quickstart's smoke run."""
    if options.cpu:
        yield Line(check="smoke run", verdict="skip", detail="scripts/test.sh runs it on the CPU")
        return
    out = options.work / "quickstart"
    command = [sys.executable, "-m", "cv_lightning", "quickstart", "--smoke", "--force", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False)
    print(done.stdout, done.stderr)
    whole = done.returncode == 0 and (out / "summary.json").is_file()
    said = re.sub(r"\s+", " ", done.stderr)[-160:]
    yield Line(check="smoke run", verdict="pass" if whole else "fail", detail="" if whole else said)


SECTIONS = {part.__name__: part for part in (tests, engine, sync, update, zero, quickstart)}


def main() -> int:
    """Append what a part finds to the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("section", choices=list(SECTIONS))
    parser.add_argument("unit")
    parser.add_argument("file", type=Path)
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--model", default="Qwen/Qwen3-VL-8B")
    parser.add_argument("--work", type=Path, required=True)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    if options.cpu:
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    from cv_lightning.environment import prepare_environment

    prepare_environment()
    with options.file.open("a") as file:
        for line in SECTIONS[options.section](options.unit, options):
            file.write(json.dumps(asdict(line)) + "\n")
            file.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
