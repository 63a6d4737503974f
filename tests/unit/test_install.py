"""The install script without installing, and the fix of torchvision on a package that fails in the same way."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
FILES = (
    "pyproject.toml",
    "scripts/install.sh",
    "scripts/environment.sh",
    "scripts/fix_torchvision.py",
    "scripts/locks/cpu.txt",
    "scripts/locks/gpu.txt",
)
FAILING_INIT = """
import torch
from .extension import _has_ops
torch.library.register_fake("torchvision::nms")(lambda dets, scores, iou_threshold: dets)
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """The install script with what it reads, and an environment without pip."""
    for name in FILES:
        (tmp_path / "project" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / "project" / name)
    venv.create(tmp_path / "environment", with_pip=False)
    return tmp_path / "project"


def install(project: Path, *arguments: str, active: bool = True) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k not in ("VIRTUAL_ENV", "CONDA_PREFIX")}
    if active:
        environment["VIRTUAL_ENV"] = str(project.parent / "environment")
    command = ["bash", str(project / "scripts/install.sh"), "--cpu", "--no-doctor", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)


def test_unknown_option_is_refused(project: Path) -> None:
    done = install(project, "--fast")
    assert done.returncode == 2
    assert "--fast" in done.stderr


def test_the_environment_is_dot_venv_by_default(project: Path) -> None:
    done = install(project, "--check", active=False)
    assert done.returncode == 1
    assert f"{project}/.venv does not exist yet" in done.stdout
    assert not (project / ".venv").exists()


@pytest.mark.parametrize(
    ("active", "expected"),
    [({}, ".venv"), ({"CONDA_PREFIX": "/conda", "CONDA_DEFAULT_ENV": "base"}, ".venv"),
     ({"VIRTUAL_ENV": "/gone"}, ".venv")],
)  # fmt: skip
def test_scripts_use_the_installed_environment(project: Path, active: dict[str, str], expected: str) -> None:
    command = ["bash", "-c", "source scripts/environment.sh; echo $environment"]
    done = subprocess.run(
        command, cwd=project, env={"PATH": os.environ["PATH"]} | active, capture_output=True, text=True
    )
    assert done.stdout.strip() == str(project / expected)
    for script in ("quickstart.sh", "ablations.sh", "test.sh", "install.sh", "slurm/torchrun.sh"):
        assert "source scripts/environment.sh" in (ROOT / "scripts" / script).read_text()


def test_an_unchanged_lock_file_installs_nothing(project: Path) -> None:
    stamp = project.parent / "environment/.cv_lightning_installed"
    before = install(project, "--check")
    assert before.returncode == 1
    stamp.write_text(before.stdout.splitlines()[-1] + "\n")
    again = install(project)
    assert (again.returncode, again.stderr) == (0, "")
    assert "up to date" in again.stdout
    with (project / "pyproject.toml").open("a") as file:
        file.write("# changed\n")
    assert install(project, "--check").returncode == 1


def test_a_changed_lock_file_is_installed_again(project: Path) -> None:
    stamp = project.parent / "environment/.cv_lightning_installed"
    stamp.write_text(install(project, "--check").stdout.splitlines()[-1] + "\n")
    assert install(project, "--check").returncode == 0
    with (project / "scripts/locks/cpu.txt").open("a") as file:
        file.write("# another version\n")
    assert install(project, "--check").returncode == 1


@pytest.mark.parametrize(("stack", "extra"), [("cpu", "cpu"), ("gpu", "gpu-core")])
def test_the_lock_files_meet_the_pins(stack: str, extra: str) -> None:
    """pyproject.toml is the one place of the pins; `scripts/lock.sh` writes the lock files from it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = (ROOT / "scripts/locks" / f"{stack}.txt").read_text().splitlines()
    locked = {canonicalize_name(r.name): r for r in map(Requirement, lines)}
    extras = project["optional-dependencies"]
    wanted = [Requirement(text) for text in [*project["dependencies"], *extras[extra], *extras["dev"]]]
    for requirement in wanted:
        if requirement.name == "cv-lightning":
            continue
        found = locked[canonicalize_name(requirement.name)]
        (version,) = (clause.version for clause in found.specifier)
        assert requirement.specifier.contains(version, prereleases=True), f"{requirement}: locked to {version}"
    assert not re.search(r"torch==\d", (ROOT / "scripts/install.sh").read_text()), "a second place of the pins"


def test_a_failing_pip_ends_the_install_with_its_log(project: Path) -> None:
    done = install(project)
    assert done.returncode == 1
    log = project.parent / "environment/install.log"
    assert "No module named pip" in done.stderr
    assert str(log) in done.stderr
    assert not (project.parent / "environment/.cv_lightning_installed").exists()


def run_fix(packages: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(packages), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, str(ROOT / "scripts/fix_torchvision.py")]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def made_up_torchvision(packages: Path, init: str) -> Path:
    package = packages / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text(init)
    (package / "extension.py").write_text("import torch\n\n\ndef _has_ops():\n    return False\n")
    return package / "extension.py"


def test_the_fix_declares_the_missing_operators_once(tmp_path: Path) -> None:
    extension = made_up_torchvision(tmp_path, FAILING_INIT)
    os.link(extension, tmp_path / "cached.py")  # as uv installs
    first = run_fix(tmp_path)
    assert first.returncode == 0, first.stderr
    assert "fixed" in first.stdout
    fixed = extension.read_text()
    assert (tmp_path / "cached.py").read_text() != fixed
    second = run_fix(tmp_path)
    assert (second.returncode, second.stdout, extension.read_text()) == (0, "", fixed)


def test_a_torchvision_that_imports_is_left_unchanged(tmp_path: Path) -> None:
    extension = made_up_torchvision(tmp_path, "")
    before = extension.read_text()
    assert run_fix(tmp_path).returncode == 0
    assert extension.read_text() == before


def test_another_failure_is_reported(tmp_path: Path) -> None:
    made_up_torchvision(tmp_path, "raise ImportError('something else')")
    done = run_fix(tmp_path)
    assert done.returncode == 1
    assert "still cannot be imported" in done.stderr
