"""The import rules of docs/architecture.md hold."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RULES = """
[importlinter]
root_package = cv_lightning
include_external_packages = True

[importlinter:contract:broken]
name = the command line never reaches types
type = forbidden
source_modules = cv_lightning.commands
forbidden_modules = cv_lightning.types
"""


def lint_imports(config: Path) -> subprocess.CompletedProcess[str]:
    command = shutil.which("lint-imports", path=str(Path(sys.executable).parent))
    assert command is not None, "import-linter is missing: bash scripts/install.sh"
    arguments = [command, "--config", str(config), "--no-cache"]
    return subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, check=False)


def test_the_import_rules_hold() -> None:
    done = lint_imports(ROOT / "setup.cfg")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 broken" in done.stdout


def test_a_broken_rule_is_found(tmp_path: Path) -> None:
    config = tmp_path / "setup.cfg"
    config.write_text(RULES)
    done = lint_imports(config)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "1 broken" in done.stdout


@pytest.mark.parametrize("folder", [path.name for path in (ROOT / "cv_lightning").iterdir() if path.is_dir()])
def test_every_folder_has_a_floor(folder: str) -> None:
    floors = (ROOT / "setup.cfg").read_text().split("layers =")[1].split("[importlinter")[0]
    if (ROOT / "cv_lightning" / folder / "__init__.py").is_file():
        assert f"cv_lightning.{folder}" in floors.replace(")", " ").split() or f"(cv_lightning.{folder}" in floors


def test_the_package_keeps_its_shape() -> None:
    """No class name twice, no import circle, no private attribute of Lightning, nothing too long."""
    done = subprocess.run([sys.executable, str(ROOT / "scripts/house.py")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
