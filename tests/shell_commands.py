"""The shell commands that README.md, CONTRIBUTING.md, docs and notebooks show, and what is known about each program.

A command is a line of a `bash` block, a line of another block or of an indented one that begins with a known program,
code within a line that does so and has an argument, or a `!` line of a notebook.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "CONTRIBUTING.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")))
NOTEBOOKS = tuple(sorted(f"notebooks/{path.name}" for path in (ROOT / "notebooks").glob("*.ipynb")))
OURS = ("cv-lightning", "cv_lightning")
OTHERS = {
    "export": "a variable of the shell",
    "hf": "the hub's client, to log in",
    "ssh": "a port of another host",
    "vllm": "a server that the reader runs",
    "wc": "a count of lines",
}
"""Programs that only their names are known of, and what they are shown for."""
CHECKED = (
    "bash",
    "lint-imports",
    "mkdocs",
    "pip",
    "pre-commit",
    "pytest",
    "python",
    "sbatch",
    "source",
    "torchrun",
    "uv",
    "wandb",
)
"""Programs whose arguments are checked."""
PYTHON = r"python(3\.\d+)?"
ASSIGNMENT = re.compile(r"([A-Z_]+)=(.*)", re.DOTALL)
FILE = re.compile(r"^```(?:python|yaml)\n# (\w+\.(?:py|yaml))\n(.*?)^```$", re.DOTALL | re.MULTILINE)
FENCE = re.compile(r"\s*```(\w*)")


class Shown(NamedTuple):
    """A command, and where it is shown."""

    document: str
    text: str
    """One line, without comments and the explanation beside it; variables are replaced by their values."""

    @property
    def words(self) -> list[str]:
        """As a shell would split them, without variables that are set for this command alone."""
        found = shlex.split(self.text)
        while found and ASSIGNMENT.fullmatch(found[0]):
            del found[0]
        return found

    @property
    def program(self) -> str:
        """First word: a program, or a script of ours."""
        return self.words[0] if self.words else ""


def shown_commands() -> list[Shown]:
    """All commands of all documents."""
    found = [command for name in PAGES for command in page_commands(name, (ROOT / name).read_text(encoding="utf-8"))]
    for name in NOTEBOOKS:
        cells = json.loads((ROOT / name).read_text(encoding="utf-8"))["cells"]
        lines = [line for cell in cells if cell["cell_type"] == "code" for line in "".join(cell["source"]).splitlines()]
        found += [Shown(name, cleaned(line.lstrip()[1:])) for line in lines if line.lstrip().startswith("!")]
    return found


def page_commands(name: str, text: str) -> Iterator[Shown]:
    """The commands of a Markdown page; one with a variable occurs once for each value that the page gives it."""
    kind, values = None, dict[str, list[str]]()
    for line in text.replace("\\\n", " ").splitlines():
        if fence := FENCE.match(line):
            kind = fence[1] if kind is None else None
        elif kind == "bash":
            for part in re.split(r" && | ; ", cleaned(line)):
                if (given := ASSIGNMENT.fullmatch(part)) and len(shlex.split(part)) == 1:
                    values.setdefault(given[1], []).append(shlex.split(given[2])[0] if given[2] != '""' else "")
                elif part:
                    yield from (Shown(name, text) for text in expanded(part, values))
        elif kind is not None or line.startswith("    "):
            if is_known(command := cleaned(line)):
                yield Shown(name, command)
        else:
            for span in re.findall(r"`([^`]+)`", line):
                if is_known(command := cleaned(span)) and " " in command:
                    yield from (Shown(name, text) for text in expanded(command, values))


def expanded(command: str, values: dict[str, list[str]]) -> list[str]:
    """The command with the first values of all variables, with the second ones, and so on."""
    named = [name for name in re.findall(r"\$(\w+)", command) if name in values]
    count = max([len(values[name]) for name in named], default=1)
    return list(
        dict.fromkeys(
            " ".join(re.sub(r"\$(\w+)", lambda m: pick(values.get(m[1], [m[0]]), number), command).split())  # noqa: B023
            for number in range(count)
        )
    )


def pick(given: list[str], number: int) -> str:
    """The value of that number, or the last; a value that names another variable is that one's business."""
    return given[min(number, len(given) - 1)]


def page_files(text: str) -> dict[str, str]:
    """Files that a page gives its reader, by name: blocks of Python or YAML whose first line is a comment with it."""
    return {name: f"# {name}\n{rest}" for name, rest in FILE.findall(text)}


def is_known(command: str) -> bool:
    """True if the first word is a program that the documents may show, or a script of ours."""
    try:
        program = Shown("", command).program
    except ValueError:  # an apostrophe of prose
        return False
    name = program.removeprefix(".venv/bin/")
    return name in (*OURS, *OTHERS, *CHECKED) or bool(re.fullmatch(PYTHON + r"|scripts/\S+\.\w+", name))


def cleaned(command: str) -> str:
    """One space between words, without what explains the command."""
    command = re.sub(r"(^|\s)#.*", "", command)
    command = re.sub(r"(?<=\S) {3,}(?=[a-z]\w* \w+).*", "", command)  # a column of prose
    return " ".join(command.split())


def own_arguments(command: Shown) -> list[str] | None:
    """The arguments of `cv-lightning`, however it is started; None for another program."""
    words = command.words
    if words and words[0].removeprefix(".venv/bin/") in OURS:
        return words[1:]
    if "-m" in words and words[(at := words.index("-m")) + 1 :][:1] == ["cv_lightning"]:
        return words[at + 2 :]
    return None
