"""`cv-lightning doctor`: what works on this machine, and the command that adds what does not."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

from cv_lightning.command_line import put_json, run_verb
from cv_lightning.environment import extensions_folder, prepare_environment
from cv_lightning.packaged import packaged_folder, script

Status = Literal["ok", "absent", "failed", "no answer"]
DISTRIBUTION = "cv-lightning"
REINSTALL = (
    "bash scripts/install.sh --force"
    if (packaged_folder("scripts") / "install.sh").is_file()
    else f"pip install 'WHEEL[cpu]' --constraint {script('locks/cpu.txt')} (on a GPU: gpu-core, gpu.txt)"
)
MIN_MEMORY_GB, MIN_DISK_GB = 4.0, 2.0
"""Below these a run of the embedded task may be killed, or cannot store its trajectories."""
PREFIX = "doctor:"
"""Marks a probe's answer among the output of libraries."""


class Check(NamedTuple):
    """One row of the table."""

    name: str
    status: Status
    detail: str
    """Version, figures, or the error."""
    fix: str = ""
    """Command that adds or repairs the part; empty where there is nothing to do."""
    required: bool = False
    """Training cannot work without it."""


class Probe(NamedTuple):
    """An import that is tried in its own process, so that a crash or a hang is a row of the table."""

    name: str
    code: str
    """Python that sets `found`, one line of text."""
    fix: str = REINSTALL
    required: bool = False


PROBES = (
    Probe(
        "torch",
        "import torch; n = torch.cuda.device_count(); found = torch.__version__ + (', ' + ', '.join("
        "torch.cuda.get_device_name(i) for i in range(n)) if n else f', CPU, {torch.get_num_threads()} threads')",
        required=True,
    ),
    Probe(
        "lightning",
        "import lightning.pytorch.cli, lightning, jsonargparse;"
        "found = f'{lightning.__version__}, jsonargparse {jsonargparse.__version__}'",
        required=True,
    ),
    Probe(
        "torchvision",
        "import torchvision; from transformers.video_processing_utils import BaseVideoProcessor; import transformers;"
        "found = f'{torchvision.__version__}, with the processors of transformers {transformers.__version__}'",
        f"python {script('fix_torchvision.py')}",
        required=True,
    ),
    Probe(
        "vllm",
        "import vllm; from vllm import LLM; from vllm.platforms import current_platform;"
        "found = f'{vllm.__version__}, platform {current_platform.device_type}'",
    ),
    Probe(
        "deepspeed",
        "import accelerate, deepspeed; from deepspeed.accelerator import get_accelerator;"
        "found = f'{deepspeed.__version__}, accelerator {get_accelerator().device_name()}'",
    ),
)
ATTENTION = Probe(
    "attention",
    "from cv_lightning.models.attention import attention_kernel_name; found = attention_kernel_name()",
    "pip install --no-build-isolation flash-attn",
)


def import_probe(probe: Probe, timeout_s: float) -> Check:
    """Run one probe."""
    code = f"{probe.code}\nprint({PREFIX!r} + found)"
    try:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=timeout_s)
    except subprocess.TimeoutExpired:
        detail = f"not imported within {timeout_s:g} s: the machine is busy or slow, or the import hangs"
        again = f"cv-lightning doctor --timeout_s {3 * timeout_s:g}"
        return Check(probe.name, "no answer", detail, again, probe.required)
    answers = [line.removeprefix(PREFIX) for line in done.stdout.splitlines() if line.startswith(PREFIX)]
    if done.returncode == 0 and answers:
        return Check(probe.name, "ok", answers[-1], required=probe.required)
    said = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    detail = said[-1] if said else f"ended with code {done.returncode} and no message"
    is_absent = f"No module named '{probe.name}'" in done.stderr
    return Check(probe.name, "absent" if is_absent else "failed", detail, probe.fix, probe.required)


def check_versions(distribution: str = DISTRIBUTION) -> Check:
    """Compare the installed versions with the project's pins."""
    from packaging.requirements import Requirement

    try:
        stated = importlib.metadata.requires(distribution) or []
    except importlib.metadata.PackageNotFoundError:
        return Check("versions", "absent", f"{distribution} itself is not installed", REINSTALL)
    requirements = [
        requirement
        for requirement in map(Requirement, stated)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""})
    ]
    wrong = []
    for requirement in requirements:
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            wrong.append(f"{requirement} (here: none)")
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{requirement.name}{requirement.specifier} (here: {version})")
    if wrong:
        return Check("versions", "failed", "required: " + ", ".join(wrong), REINSTALL)
    return Check("versions", "ok", f"python {sys.version.split()[0]}, {len(requirements)} requirements met")


def check_op(on_gpu: bool) -> Check:
    """Check DeepSpeed's shared-memory op, which the first distributed start on a CPU would compile."""
    name = "deepspeed op"
    if on_gpu:
        return Check(name, "ok", "not needed with a GPU")
    folder = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or extensions_folder() or "~/.cache/torch_extensions")
    built = sorted(folder.expanduser().glob("**/deepspeed_shm_comm*.so"))
    if built:
        return Check(name, "ok", f"built ahead in {built[0].parent}")
    detail = f"not built in {folder}; the first ZeRO start compiles it (about 20 s)"
    return Check(name, "absent", detail, REINSTALL)


def check_attention(on_gpu: bool, timeout_s: float) -> Check:
    """Check the attention kernel of packed rows; PyTorch's own is tried on the GPU."""
    if not on_gpu:
        return Check(ATTENTION.name, "ok", "packed SDPA; variable-length kernels need a GPU")
    found = import_probe(ATTENTION, timeout_s)
    if found.status == "ok" and "SDPA" in found.detail:
        detail = f"{found.detail}, which is slower: no variable-length kernel runs on this GPU"
        return Check(ATTENTION.name, "absent", detail, ATTENTION.fix)
    return found


def check_sandbox() -> list[Check]:
    """Start the sandbox: one row for it and one for each isolation layer."""
    from cv_lightning.sandbox import Sandbox, SandboxConfig
    from cv_lightning.types import CVLightningError

    try:
        with Sandbox(SandboxConfig()) as sandbox:
            layers = sandbox.layers
    except (CVLightningError, OSError) as error:
        return [Check("sandbox", "failed", str(error), "cv-lightning sandbox --self_test", required=True)]
    rows = [Check("sandbox", "ok", describe_layers(layers), required=True)]
    for layer, state in layers.items():
        rows.append(Check(f"  {layer}", "absent" if state.startswith("unavailable") else "ok", state))
    return rows


def describe_layers(layers: Mapping[str, str]) -> str:
    """How many isolation layers are active, and which are not, with what that means."""
    inactive = {name: state for name, state in layers.items() if not state.startswith("active")}
    said = f"{len(layers) - len(inactive)} of {len(layers)} isolation layers are active"
    off = [name for name, state in inactive.items() if state == "off"]
    absent = [name for name in inactive if name not in off]
    if absent:
        said += f"; this host does not offer {', '.join(absent)}, and the others suffice to run model code"
    if off:
        said += f"; {', '.join(off)}: off by default (rollout.sandbox), not needed"
    return said


def check_judge() -> Check:
    """Check the judge's endpoint, if CVL_JUDGE_URL (and CVL_JUDGE_MODEL) name one."""
    url = os.environ.get("CVL_JUDGE_URL", "")
    if not url:
        return Check("judge", "ok", "none configured (CVL_JUDGE_URL, CVL_JUDGE_MODEL); answers are judged by rule")
    from cv_lightning.rewards.judge.check import check_endpoint
    from cv_lightning.rewards.judge.config import JudgeConfig

    model = os.environ.get("CVL_JUDGE_MODEL", JudgeConfig.model)
    try:
        found = check_endpoint(JudgeConfig(base_url=url, timeout_s=10.0, model=model))
    except ValueError as error:  # the config's own check of the address
        return Check("judge", "failed", str(error), "unset CVL_JUDGE_URL")
    fix = "" if found.ok else f"bash {script('serve_judge.sh')}"
    return Check("judge", "ok" if found.ok else "failed", found.message, fix)


def check_space() -> list[Check]:
    """Check free memory, and free disk space under the working folder."""
    import psutil

    memory, disk = psutil.virtual_memory(), shutil.disk_usage(Path.cwd())
    rows = []
    for name, free, total, least in (
        ("memory", memory.available / 1e9, memory.total / 1e9, MIN_MEMORY_GB),
        ("disk", disk.free / 1e9, disk.total / 1e9, MIN_DISK_GB),
    ):
        detail = f"{free:.1f} of {total:.1f} GB free" + ("" if free >= least else f"; a run needs about {least:g}")
        rows.append(Check(name, "ok" if free >= least else "failed", detail))
    return rows


def examine(timeout_s: float) -> list[Check]:
    """Run all checks.

    Args:
        timeout_s: Most seconds that one import may take.
    """
    on_gpu = shutil.which("nvidia-smi") is not None and Path("/dev/nvidiactl").exists()
    # Two at once: an import of vLLM or torch keeps a core busy, and small machines have two.
    with ThreadPoolExecutor(max_workers=2) as pool:
        imported = list(pool.map(lambda probe: import_probe(probe, timeout_s), PROBES))
    checks = [check_versions(), *imported, check_op(on_gpu), check_attention(on_gpu, timeout_s)]
    return [*checks, *check_sandbox(), check_judge(), *check_space()]


def conclusion(checks: list[Check]) -> str:
    """The line under the table."""
    if can_train(checks):
        return "training works here"
    if all(check.status in ("ok", "no answer") for check in checks if check.required):
        return "not known yet whether training works here: an import did not end in time, see above"
    return "training cannot work here yet"


def can_train(checks: list[Check]) -> bool:
    """True if no required part is missing."""
    return all(check.status == "ok" for check in checks if check.required)


def doctor(json: Path | None = None, timeout_s: float = 120.0) -> int:
    """Show what works on this machine. Exit code 0: training works; 1: it does not.

    Args:
        json: Write the table into this file; - prints it as JSON.
        timeout_s: Most seconds that one import may take.
    """
    if timeout_s <= 0:
        raise ValueError(f"--timeout_s {timeout_s:g}: must be above 0")
    prepare_environment()
    checks = examine(timeout_s)
    if not put_json(json, {"can_train": can_train(checks), "checks": [check._asdict() for check in checks]}):
        show(checks)
    return 0 if can_train(checks) else 1


def show(checks: list[Check]) -> None:
    """Print the table and, under it, the commands that fix what does not work."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("", "", "", box=None, show_header=False, pad_edge=False)
    colours = {"ok": "green", "absent": "yellow", "no answer": "yellow", "failed": "red"}
    for check in checks:
        table.add_row(check.name, Text(check.status, colours[check.status]), Text(check.detail))
    console = Console()
    console.print(table)
    for check in checks:
        if check.fix and check.status != "ok":
            console.print(Text(f"{check.name.strip()}: {check.fix}"))
    console.print(conclusion(checks), style="bold")


main = partial(run_verb, doctor, name="doctor")
