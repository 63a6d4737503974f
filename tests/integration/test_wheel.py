"""The wheel, installed where the checkout is not seen, works in an empty folder."""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
CLEAN = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV", "CONDA_PREFIX")}
LIGHT = (
    "aiolimiter diskcache jsonargparse[signatures] jsonschema msgspec numpy openai opencv-python-headless packaging "
)
LIGHT += "pillow psutil pyyaml"
"""What the rooms without torch import."""
ROOMS = "types images environment background files endpoint sandbox trajectory rewards tools agent __main__ "
ROOMS += "commands.configs commands.sandbox"
TERM = """
from cv_lightning.rewards import RewardTerm

class Short(RewardTerm):
    def value(self, task, trajectory):
        return 1.0
"""


def run(command: list[str | Path], **options: Any) -> subprocess.CompletedProcess[str]:
    settings = {"env": CLEAN, "capture_output": True, "text": True, "timeout": 900} | options
    return subprocess.run(list(map(str, command)), check=False, **settings)


def uv(*arguments: str | Path, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run uv: from its cache alone where that has everything; otherwise from the index, if that can be reached."""
    environment = {name: value for name, value in CLEAN.items() if name != "PIP_FIND_LINKS"}
    command = [Path(sys.executable).with_name("uv"), *arguments]
    done = run([*command, "--offline"], cwd=cwd, env=environment)
    if done.returncode:
        done = run(command, cwd=cwd, env=environment)
    if done.returncode and re.search("dns error|error sending request|connect|timed out", done.stderr):
        pytest.skip(f"no package index: {done.stderr.strip().splitlines()[-1]}")
    return done


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    done = uv("build", "--wheel", "--no-config", "--out-dir", folder)
    assert done.returncode == 0, done.stderr
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def command(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The installed command, in an environment that sees the packages of this one but not the checkout."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    done = uv("pip", "install", "--no-deps", "--no-config", "--python", folder / "bin/python", wheel)
    assert done.returncode == 0, done.stderr
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "below.pth").write_text(
        sysconfig.get_path("purelib")
    )  # its own .pth files, the checkout's, are not read
    return folder / "bin/cv-lightning"


@pytest.fixture
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_wheel_has_what_users_call(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    for folder in ("configs", "notebooks"):
        files = [path.relative_to(ROOT).as_posix() for path in (ROOT / folder).rglob("*.*") if path.is_file()]
        assert files and {f"cv_lightning/{name}" for name in files} <= set(names)
    scripts = sorted(name for name in names if name.startswith("cv_lightning/scripts/"))
    assert [name.partition("/scripts/")[2] for name in scripts] == [
        *("environment.sh", "fix_torchvision.py", "locks/cpu.txt", "locks/gpu.txt", "serve_judge.sh"),
        *("slurm/grpo.sbatch", "slurm/sft.sbatch", "slurm/torchrun.sh"),
    ]
    assert not any(name.startswith(("tests", "configs", "docs")) for name in names)


def test_configs_are_listed_and_copied_into_an_empty_folder(command: Path, empty: Path) -> None:
    listed = run([command, "configs", "list"])
    assert "  grpo/qwen3_vl_8b " in listed.stdout, listed.stderr
    assert run([command, "configs", "copy", "eval/digits", "--out", "mine.yaml"]).returncode == 0
    assert sorted(path.name for path in empty.iterdir()) == [
        *("agent.yaml", "engine.yaml", "mine.yaml", "prompt.yaml", "reward.yaml"),
    ]
    refused = run([command, "configs", "copy", "eval/digit"])
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "did you mean eval/digits?" in refused.stderr


def test_a_run_is_planned_and_configured_in_an_empty_folder(
    command: Path, empty: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """By packaged names, by a copy, and with a reward term of the current folder's own."""
    (empty / "my_terms.py").write_text(TERM)
    assert run([command, "configs", "copy", "eval/digits", "--out", "mine.yaml"]).returncode == 0
    program = (
        tmp_path_factory.mktemp("elsewhere") / "program.py"
    )  # as with the command, its folder is first on sys.path
    program.write_text(PROGRAM)
    done = run([command.with_name("python"), program, command])
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    printed, _, rest = done.stdout.partition("--- plan\n")
    config = yaml.safe_load(printed)
    assert config["model"]["init_args"]["policy"]["path"] == "runs/qwen3_vl_8b/sft/model"
    assert config["rollout"]["reward"]["credit"] == "steps"
    assert config["rollout"]["reward"]["terms"][0]["class_path"] == "my_terms.Short"
    assert "GRPO of runs/qwen3_vl_8b/sft/model" in rest
    folders = {"fit": ["runs/q/sft", "runs/q/rl", "runs/q/rl_accuracy"], "test": ["runs/q"]}
    assert json.loads(rest.splitlines()[-1]) == folders


PROGRAM = """
import json, runpy, sys
from pathlib import Path

command = sys.argv[1]
terms = "[{class_path: my_terms.Short, init_args: {name: short, weight: 0.5}}]"
sys.argv = [command, "fit", "--config", "grpo/qwen3_vl_8b", "--rollout.reward", "reward/paper"]
sys.argv += ["--rollout.reward.terms", terms, "--print_config"]
try:
    runpy.run_path(command, run_name="__main__")
except SystemExit as ended:
    assert not ended.code, ended.code
print("--- plan")

from cv_lightning.__main__ import main
from cv_lightning.cli import ConfigOnly, main as fit
from cv_lightning.digits.quickstart import stages

assert main(["plan", "--config", "grpo/qwen3_vl_8b", "--config", "hardware/8gpu"]) == 0
mine = fit(["test", "--config", "mine.yaml"], ConfigOnly).config["test"]
assert mine.rollout.agent.prompt.one_call == "", mine.rollout.agent
found = {}
for stage in stages(Path("runs/q"), seed=0, smoke=True, ablation=True):
    verb = stage.arguments[0]
    if verb == "fit" or (verb == "test" and verb not in found):
        folder = fit(stage.arguments, ConfigOnly).config[verb].trainer.default_root_dir
        found.setdefault(verb, []).append(folder)
print(json.dumps(found))
"""
"""Every command in one process, which imports torch and vLLM once."""


@pytest.mark.slow
def test_the_quickstart_runs_in_an_empty_folder(command: Path, empty: Path) -> None:
    done = run([command, "quickstart", "--smoke"], timeout=1200)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert (empty / "runs/quickstart-smoke/report.html").is_file()


# ------------------------------------------------------------------------------------------------ metadata
def metadata_of(wheel: Path) -> str:
    archive = zipfile.ZipFile(wheel)
    (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
    return archive.read(name).decode()


def test_the_page_of_the_wheel_has_no_relative_links(wheel: Path) -> None:
    metadata = metadata_of(wheel)
    assert "Description-Content-Type: text/markdown" in metadata
    assert "# cv_lightning" in metadata
    text = re.sub(r"`[^`\n]*`", "code", re.sub(r"^```.*?^```", "", metadata, flags=re.M | re.S))
    targets = re.findall(r"\]\(([^)\s]+)\)", text)
    assert all(target.startswith(("https://", "#")) for target in targets), targets


def test_citation_and_release_notes_are_of_this_version(wheel: Path) -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    (version,) = re.findall(r"^Version: (.+)$", metadata_of(wheel), re.M)
    assert citation["version"] == version
    assert f"\n## {version} " in (ROOT / "docs/releases.md").read_text()
    assert citation["references"][0]["title"] in (ROOT / "README.md").read_text()


def test_links_and_images_lead_to_the_repository_where_its_address_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    hook = ModuleType("interface")
    hook.MetadataHookInterface = object  # type: ignore[attr-defined]  # hatchling is installed only where it builds
    for name in ("hatchling", "hatchling.metadata", "hatchling.metadata.plugin", "hatchling.metadata.plugin.interface"):
        monkeypatch.setitem(sys.modules, name, hook)
    module = runpy.run_path(str(ROOT / "scripts/package_metadata.py"))
    text = "![A figure](docs/images/a.png)\n\n*Caption*\n\n"
    text += "[Page](docs/a.md#part), [paper](https://arxiv.org), [below](#use)\n"
    assert module["long_description"](text, "https://host/o/r/", "1.2") == (
        "![A figure](https://host/o/r/raw/v1.2/docs/images/a.png)\n\n*Caption*\n\n"
        "[Page](https://host/o/r/blob/v1.2/docs/a.md#part), [paper](https://arxiv.org), [below](#use)\n"
    )
    assert module["long_description"](text, "", "1.2") == "Page, [paper](https://arxiv.org), [below](#use)\n"
    assert module["urls"]("https://host/o/r/")["Issues"] == "https://host/o/r/issues"
    assert module["urls"]("") == {}


# ------------------------------------------------------------------------------------------------ Python versions
def interpreter(version: str) -> Path:
    """An interpreter of a version of Python, of pyenv or on the path; skips where there is none."""
    found = sorted(Path.home().glob(f".pyenv/versions/{version}*/bin/python"))
    done = (
        run([found[-1] if found else f"python{version}", "-c", "import sys; print(sys.executable)"]) if found else None
    )
    if done is None or done.returncode:
        pytest.skip(f"no Python {version}")
    return Path(done.stdout.strip())


@pytest.mark.parametrize("version", ["3.12", "3.13"])
def test_rooms_without_torch_import(version: str, wheel: Path, tmp_path: Path) -> None:
    python = interpreter(version)
    options = ["--python", python, "--target", tmp_path / "packages", "--no-config"]
    done = uv("pip", "install", *options, "--constraint", ROOT / "scripts/locks/gpu.txt", *LIGHT.split())
    assert done.returncode == 0, done.stderr
    assert uv("pip", "install", *options, "--no-deps", wheel).returncode == 0
    code = f"""
import importlib, pkgutil, sys
for room in "{ROOMS}".split():
    module = importlib.import_module("cv_lightning." + room)
    for found in pkgutil.walk_packages(getattr(module, "__path__", []), module.__name__ + "."):
        importlib.import_module(found.name)
assert "torch" not in sys.modules
from cv_lightning.__main__ import main
sys.exit(main(["configs", "list"]))
"""
    done = run(
        [python, "-W", "error::SyntaxWarning", "-c", code], env=CLEAN | {"PYTHONPATH": str(tmp_path / "packages")}
    )
    assert done.returncode == 0, done.stderr
    assert "grpo/qwen3_vl_8b" in done.stdout


def test_uv_resolves_both_stacks_for_every_python(tmp_path: Path) -> None:
    """By pyproject.toml's own settings, with empty wheels in place of PyTorch's index, which need not be reachable."""
    text = (ROOT / "pyproject.toml").read_text()
    project = tomllib.loads(text)
    (index,) = project["tool"]["uv"]["index"]
    (pin,) = (each for each in project["project"]["optional-dependencies"]["cpu"] if each.startswith("torch=="))
    version = f"{Requirement(pin).specifier}+cpu".removeprefix("==")
    stand_in = tmp_path / "simple/torch"
    stand_in.mkdir(parents=True)
    for tag in ("cp311", "cp312", "cp313"):
        with zipfile.ZipFile(stand_in / f"torch-{version}-{tag}-{tag}-manylinux_2_28_x86_64.whl", "w") as archive:
            archive.writestr(
                f"torch-{version}.dist-info/METADATA", f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n"
            )
            archive.writestr(f"torch-{version}.dist-info/WHEEL", "Wheel-Version: 1.0\n")
            archive.writestr(f"torch-{version}.dist-info/RECORD", "")
    links = [f'<a href="{path.name.replace("+", "%2B")}">{path.name}</a>' for path in sorted(stand_in.glob("*.whl"))]
    (stand_in / "index.html").write_text("<!DOCTYPE html><html><body>" + "\n".join(links) + "</body></html>")
    copy = tmp_path / "project"
    for name in ("README.md", "LICENSE", "cv_lightning/__init__.py", "scripts/package_metadata.py"):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_text((ROOT / name).read_text())
    (copy / "pyproject.toml").write_text(text.replace(index["url"], (tmp_path / "simple").as_uri()))
    done = uv("lock", cwd=copy)
    assert done.returncode == 0, done.stderr
    locked = tomllib.loads((copy / "uv.lock").read_text())
    found = {(package["name"], package.get("version")) for package in locked["package"]}
    for extra in ("cpu", "gpu-core"):
        for pin in map(Requirement, project["project"]["optional-dependencies"][extra]):
            (clause,) = pin.specifier
            wanted = version if (extra, pin.name) == ("cpu", "torch") else clause.version
            assert (pin.name, wanted) in found or clause.operator != "=="
    assert locked["requires-python"] == ">=3.11"
