"""Runs the sections of `scripts/gpu_acceptance.sh`, each part in a process of its own, and prints what was found."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from results import ROOT, Line, Part, conditions, environment, summary, table

SECTION_S = 480
"""Most seconds of a section."""


@dataclass(frozen=True, kw_only=True)
class Unit:
    """One process of a section."""

    name: str = "all"
    environment: dict[str, str] = field(default_factory=dict)


SECTIONS: dict[str, tuple[str, tuple[Unit, ...]]] = {
    "tests": ("tests marked gpu", (Unit(),)),
    "engine": (
        "vLLM against the trainer in bfloat16: both model runners, async scheduling on and off, three sleeps each",
        tuple(
            Unit(
                name=f"v{runner}-{'async' if scheduling else 'sync'}",
                environment={"VLLM_USE_V2_MODEL_RUNNER": str(runner - 1)},
            )
            for runner in (2, 1)
            for scheduling in (True, False)
        ),
    ),
    "sync": ("weight sync, seconds", (Unit(),)),
    "update": ("packed update: tokens/s, MFU, memory beside the plan's and beside a bare loop", (Unit(),)),
    "zero": ("ZeRO-3 on all GPUs against one process", (Unit(),)),
    "quickstart": ("the quickstart's smoke run", (Unit(),)),
}
"""What every section shows, and its processes."""


def run_unit(
    section: str, unit: Unit, options: argparse.Namespace, known: dict[str, str], timeout_s: float,
    start: Callable[..., subprocess.CompletedProcess[str]] = subprocess.run,
) -> Part:  # fmt: skip
    """Run one process; whatever happens to it is a line."""
    begun = time.monotonic()
    kept = options.out / "lines" / f"{section}.{unit.name}.jsonl"
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.unlink(missing_ok=True)
    command = [sys.executable, str(Path(__file__).with_name("sections.py")), section, unit.name, str(kept)]
    command += ["--model", options.model, "--work", str(options.out / "work"), *(["--cpu"] if options.cpu else [])]
    log = options.out / "logs" / f"{section}.{unit.name}.txt"
    log.parent.mkdir(parents=True, exist_ok=True)
    trouble = "" if timeout_s > 0 else f"the section's {SECTION_S} s were over before it began"
    if not trouble:
        with log.open("w") as output:
            try:
                done = start(
                    command, cwd=ROOT, env=environment(**({} if options.cpu else unit.environment)), stdout=output,
                    stderr=subprocess.STDOUT, timeout=timeout_s, check=False,
                )  # fmt: skip
                trouble = "" if done.returncode == 0 else f"ended with code {done.returncode}: {last_line(log)}"
            except subprocess.TimeoutExpired:
                trouble = f"not finished within {timeout_s:.0f} s; run it alone with --only {section}"
    lines = [Line(**json.loads(text)) for text in kept.read_text().splitlines()] if kept.exists() else []
    if trouble or not lines:
        lines.append(Line(check=unit.name, verdict="fail", detail=f"{trouble or 'found nothing'} ({log})"))
    part = Part(section=section, name=unit.name, seconds=time.monotonic() - begun, lines=tuple(lines), conditions=known)
    part.save(options.out)
    return part


def last_line(log: Path) -> str:
    """The last line of a log that says something."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:200] if lines else "no message"


def run_section(name: str, options: argparse.Namespace, known: dict[str, str]) -> list[Part]:
    """All processes of a section; what is done under the same conditions is kept."""
    begun, parts = time.monotonic(), []
    for unit in SECTIONS[name][1]:
        before = None if options.again else Part.load(options.out, name, unit.name)
        if before is not None and before.is_done and before.conditions == known:
            part = before
        else:
            part = run_unit(name, unit, options, known, SECTION_S - (time.monotonic() - begun))
        parts.append(part)
        print(table([part]), flush=True)
    return parts


def main(arguments: list[str] | None = None) -> int:
    """Entry. Exit code 0: nothing failed; 1: something did; 2: the command line is wrong."""
    parser = argparse.ArgumentParser(prog="gpu_acceptance.sh", description=__doc__, allow_abbrev=False)
    parser.add_argument(
        "--only", action="append", choices=list(SECTIONS), metavar="SECTION", help="run this section only"
    )
    parser.add_argument("--cpu", action="store_true", help="tiny sizes on a CPU")
    parser.add_argument("--out", type=Path, help="folder of the results")
    parser.add_argument("--again", action="store_true", help="run again what is done")
    parser.add_argument("--list", action="store_true", help="name the sections")
    parser.add_argument("--model", default="Qwen/Qwen3-VL-8B", help="published model whose shapes are taken")
    options = parser.parse_args(arguments)
    if options.list:
        print("\n".join(f"{name:10} {shown}" for name, (shown, _) in SECTIONS.items()))
        return 0
    from cv_lightning.environment import prepare_environment

    prepare_environment()
    import torch

    if not options.cpu and not torch.cuda.is_available():
        print("this machine has no GPU: --cpu runs the sections at tiny size", file=sys.stderr)
        return 2
    options.out = (options.out or ROOT / "runs" / f"gpu_acceptance{'_cpu' if options.cpu else ''}").resolve()
    known, begun = conditions(options.cpu, options.model), time.monotonic()
    print("  ".join(f"{name} {value}" for name, value in known.items() if value != "absent"), flush=True)
    parts = [part for name in options.only or SECTIONS for part in run_section(name, options, known)]
    counted = summary(parts)
    result = {
        "conditions": known,
        "seconds": time.monotonic() - begun,
        "summary": counted,
        "parts": [json.loads((options.out / f"{part.section}.{part.name}.json").read_text()) for part in parts],
    }
    (options.out / "result.json").write_text(json.dumps(result, indent=1))
    print(f"\n{', '.join(f'{count} {verdict}' for verdict, count in counted.items())} in {result['seconds']:.0f} s; "
          f"{options.out / 'result.json'}")  # fmt: skip
    return int(counted["fail"] > 0)


if __name__ == "__main__":
    sys.exit(main())
