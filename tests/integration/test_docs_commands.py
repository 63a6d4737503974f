"""Every shell command of README.md, CONTRIBUTING.md, docs and notebooks is known and names what exists.

`test_command_lines.py` parses those of `cv-lightning`, started by launchers too. Of programs that are not ours only the
name is checked (`OTHERS`). Nothing is run but `bash -n`.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import tomllib
from functools import cache
from pathlib import Path

import pytest
from shell_commands import (
    CHECKED,
    OTHERS,
    PYTHON,
    ROOT,
    Shown,
    own_arguments,
    page_commands,
    page_files,
    shown_commands,
)

COMMANDS = sorted({command for command in shown_commands() if own_arguments(command) is None}, key=str)
MODULES = ("sglang.launch_server", "venv")
"""Modules of others that the documents start."""
PRODUCTS = {".venv/bin/activate": "scripts/environment.sh"}
"""Files that a script of ours makes, and the file that names them."""


def flags(words: list[str]) -> list[str]:
    return [word.partition("=")[0] for word in words if word.startswith("--")]


@cache
def sources(script: Path) -> str:
    """Text of a script and of the modules of ours beside it that it may take its options from."""
    text = script.read_text(encoding="utf-8")
    for module in re.findall(r"^from (cv_lightning[\w.]*) import", text, re.MULTILINE):
        if (file := ROOT.joinpath(*module.split(".")).with_suffix(".py")).is_file():
            text += file.read_text(encoding="utf-8")
    return text


@cache
def parses(script: Path) -> bool:
    return subprocess.run(["bash", "-n", str(script)], capture_output=True).returncode == 0


def check_script(words: list[str]) -> None:
    """A script of ours: it is there, its syntax is right, and it knows its options."""
    script = ROOT / words[0]
    assert script.is_file(), f"there is no {words[0]}"
    if script.suffix == ".sh":
        assert parses(script), f"bash cannot parse {words[0]}"
    for flag in flags(words[1:]):
        names = (f"{flag}", f" {flag.removeprefix('--').replace('-', '_')}: ")  # a literal, or a dataclass's field
        assert any(re.search(rf"{re.escape(name)}(?![\w-])", sources(script)) for name in names), f"no option {flag}"


def check_python(words: list[str], document: str) -> None:
    """`python FILE`: a script of ours, or a file that the page gives; `python -m`: a module of ours or of another."""
    if words[:1] == ["-m"]:
        module = words[1].removeprefix("cv_lightning.")
        if module != words[1]:
            check_script([f"{module.replace('.', '/')}.py", *words[2:]])  # the wheel has scripts/ inside the package
        else:
            assert module in MODULES, f"nothing is known of {module}"
    elif words[0] not in page_files((ROOT / document).read_text(encoding="utf-8")):
        check_script(words)


def check_pytest(words: list[str]) -> None:
    """Paths exist, a word of -k selects something, and options are pytest's or ours."""
    folders = [ROOT / word for word in words if "/" in word]
    assert folders and all(path.exists() for path in folders), f"not all of {folders} exist"
    assert set(flags(words)) <= {"--run-slow"}
    if "-k" in words:
        files = [file for path in folders for file in ([path] if path.is_file() else path.rglob("test_*.py"))]
        word = words[words.index("-k") + 1]
        assert any(word in file.name or word in file.read_text(encoding="utf-8") for file in files), (
            f"-k {word}: no test"
        )


def check_sbatch(words: list[str]) -> None:
    """The batch script exists; the arguments that it hands on to fit are parsed with the others."""
    at = next(number for number, word in enumerate(words) if word.endswith(".sbatch"))
    assert parses(ROOT / words[at]) and set(flags(words[:at])) <= {"--nodes"}


def check_packages(words: list[str], document: str) -> None:
    """pip and uv: subcommands that the documents use, with extras that exist."""
    words = words[1:] if words[0] == "pip" else words
    if words[0] == "run":
        return check(Shown(document, shlex.join(words[1:])))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert words[0] in ("build", "install", "lock", "sync", "uninstall"), f"nothing is known of {words[0]}"
    extras = {name for word in words for names in re.findall(r"\[([\w,-]+)\]", word) for name in names.split(",")}
    extras |= {words[at + 1] for at, word in enumerate(words) if word == "--extra"}
    unknown = extras - project["optional-dependencies"].keys()
    assert not unknown, f"pyproject.toml has no extra {unknown}"
    return None


def check_file_arguments(words: list[str], subcommands: set[str]) -> None:
    """A tool with a configuration of ours: the subcommand is one that the documents use, and files exist."""
    assert not subcommands or words[0] in subcommands, f"nothing is known of {words[0]}"
    for word in words:
        if re.fullmatch(r"[\w./-]+\.(yaml|yml|cfg|toml)", word):
            assert (ROOT / word).is_file(), f"there is no {word}"


def check(command: Shown) -> None:
    """Check one command.

    Raises:
        AssertionError: It cannot work as it is shown, or nothing is known of its program.
    """
    program, *words = command.words
    if program.startswith("scripts/"):
        check_script([program, *words])
    elif program == "bash":
        check_script(words)
    elif re.fullmatch(PYTHON, program):
        check_python(words, command.document)
    elif program == "source":
        made = PRODUCTS.get(words[0])
        assert (ROOT / words[0]).is_file() or (made and ".venv" in (ROOT / made).read_text(encoding="utf-8"))
    elif program == "pytest":
        check_pytest(words)
    elif program == "sbatch":
        check_sbatch(words)
    elif program in ("pip", "uv"):
        check_packages(words, command.document)
    elif program == "mkdocs":
        check_file_arguments(["mkdocs.yml", *words[1:]], set())
        assert words[0] in ("serve", "build")
    elif program in ("wandb", "pre-commit", "lint-imports"):
        check_file_arguments(
            words, {"wandb": {"sweep", "agent", "sync"}, "pre-commit": {"install"}}.get(program, set())
        )
    else:
        assert program in OTHERS, f"{command.document} shows {program}: nothing is known of it"


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: f"{command.document}: {command.text}")
def test_documented_shell_command_names_what_exists(command: Shown) -> None:
    check(command)


def test_every_program_that_the_documents_show_is_shown() -> None:
    """Else a name would stay in the lists of `shell_commands` after its last use."""
    programs = {command.program.removeprefix(".venv/bin/") for command in shown_commands()}
    unused = {*OTHERS, *CHECKED} - programs
    assert not unused, f"no document shows {unused}"


@pytest.mark.parametrize(
    "line",
    [
        "bash scripts/no_such.sh",
        "bash scripts/quickstart.sh --fast",
        "python scripts/bench/data.py --jsonl FILE",
        "python no_such_file.py",
        "pytest tests/no_such_folder",
        "pytest tests/integration -k " + "z" * 20,
        "pip install 'cv-lightning[maths]'",
        "uv sync --extra maths",
        "uv run python scripts/no_such.py",
        "python -m cv_lightning.scripts.no_such",
        "wandb sweep configs/sweeps/no_such.yaml",
        "mkdocs deploy",
        "make quickstart",
    ],
)
def test_a_command_that_cannot_work_is_refused(line: str) -> None:
    """Else the tests above could not fail. The line stands in a block, where any first word counts as a program."""
    (command,) = page_commands("README.md", f"```bash\n{line}\n```\n")
    with pytest.raises(AssertionError):
        check(command)


def test_variables_of_a_page_are_replaced_by_each_of_their_values() -> None:
    page = '```bash\nA=x\nB="--b 1"\nrun $A $B\n```\n```bash\nA=y\nB=""\n```\n```bash\nrun again $A $B\n```\n'
    assert [command.text for command in page_commands("p", page)] == ["run x --b 1", "run again x --b 1", "run again y"]
