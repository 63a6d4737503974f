"""What a command line and its config files set, key by key, with the place of each; nothing heavy is imported."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from cv_lightning.command_line import underscored
from cv_lightning.packaged import close_configs, resolve_config
from cv_lightning.renames import STORED, migrate_config

LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
MAX_DEPTH = 30
"""Configs that refer to themselves have no end."""
MAX_NAMED = 3
"""Old keys that one message names."""


class Mistake(Exception):
    """A config file that cannot be read, or has old keys; the message is for the user."""


class Given(NamedTuple):
    """A key that a flag or a file sets."""

    parts: tuple[str, ...]
    """The dotted key; `[2]` is the third entry of a list."""
    node: yaml.Node | None
    """The value as YAML has it; None if it cannot be read as YAML."""
    source: str
    """The file; empty for a flag."""
    line: int
    """Its line in the file; 0 for a flag, and where a stored file was rewritten."""
    folder: Path
    """Where relative paths of the value start."""

    @property
    def key(self) -> str:
        """The key as messages show it."""
        return dotted(self.parts)

    @property
    def text(self) -> str | None:
        """The value if it is a single one."""
        return self.node.value if isinstance(self.node, yaml.ScalarNode) else None

    def named(self, key: str) -> str:
        """A key of the same source: as a flag, or behind file and line."""
        if not self.source:
            return f"--{key}"
        return f"{self.source}, line {self.line}: {key}" if self.line else f"{self.source}: {key}"


def dotted(parts: Sequence[str]) -> str:
    """Parts of a key as one text."""
    return ".".join(parts).replace(".[", "[")


def read_command(words: Sequence[str]) -> Iterator[Given]:
    """The keys that the words behind a verb set, files included, in order.

    Raises:
        Mistake: A config does not exist, is not YAML, or has old keys.
    """
    left = list(words)
    while left:
        flag, equals, value = left.pop(0).partition("=")
        flag = underscored(flag, {})
        if not flag.startswith("-"):
            continue
        if not equals and left and (not left[0].startswith("-") or re.match(r"-\.?\d", left[0])):
            equals, value = "=", left.pop(0)
        if flag in ("-c", "--config"):
            if equals:
                yield from read_config(value)
        elif flag.startswith("--") and flag != "--":
            parts = tuple(flag[2:].removesuffix("+").split("."))
            node = compose(value) if equals else None
            yield Given(parts, node, "", 0, Path())
            yield from _below(node, parts, "", Path(), 0)


def read_config(name: str) -> Iterator[Given]:
    """The keys of a `--config`: a file, the name of a packaged one, or the text of a config.

    Raises:
        Mistake: It does not exist, is not YAML, or has old keys.
    """
    path = resolve_config(name)
    if path is not None:
        yield from read_file(path, ())
    elif isinstance(node := compose(name), yaml.MappingNode):
        yield from _below(node, (), "", Path(), 0)
    elif Path(name).is_dir():
        raise Mistake(f"--config {name} is a folder; name a file in it")
    else:
        close = close_configs(name)
        hint = (
            f". Did you mean {' or '.join(close)}?"
            if close
            else "; `cv-lightning configs list` shows the packaged ones"
        )
        raise Mistake(f"--config {name}: no such file{hint}")


def read_file(path: Path, parts: tuple[str, ...]) -> Iterator[Given]:
    """The keys of a file.

    Args:
        path: The file.
        parts: The key that it is the value of; empty for a `--config`.

    Raises:
        Mistake: It is not YAML, or has old keys.
    """
    try:
        text = path.read_text(encoding="utf-8")
        node = yaml.compose(text, Loader=LOADER)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise Mistake(f"{path}{place}: this is not YAML ({error.problem or error.context})") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return  # the parser's own error says it
    node, lines = _renamed(node, path, parts)
    for given in _below(node, parts, str(path), path.parent, 0):
        yield given if lines else given._replace(line=0)


def compose(text: str) -> yaml.Node | None:
    """The YAML node of a value; None if it is none, or is a text in braces."""
    try:
        node = yaml.compose(text, Loader=LOADER)
    except yaml.YAMLError:
        return None
    is_text = isinstance(node, yaml.MappingNode) and all(value.value == "" for _, value in node.value)
    return None if is_text and node is not None and node.value else node


def value_of(node: yaml.Node | None) -> Any:
    """The Python value of a node; None if it has none."""
    if node is None:
        return None
    try:
        return yaml.SafeLoader("").construct_document(node)
    except (yaml.YAMLError, ValueError, RecursionError):
        return None


def _renamed(node: yaml.Node | None, path: Path, parts: tuple[str, ...]) -> tuple[yaml.Node | None, bool]:
    """The content of a file under the names of today, and whether it still has the lines of the file."""
    content = value_of(node)
    if not isinstance(content, dict):
        return node, True
    whole: dict[str, Any] = content
    for part in reversed(parts):
        whole = {part: whole}
    try:
        migrated, changes = migrate_config(whole)
    except RecursionError as error:
        raise Mistake(f"{path}: an alias (*NAME) stands within the value that it refers to; remove it") from error
    if not changes:
        return node, True
    if path.name in STORED and not parts:
        return yaml.compose(yaml.safe_dump(migrated), Loader=LOADER), False
    named = [f"{old} is now {new}" for old, new in changes.items()]
    more = f" and {len(named) - MAX_NAMED} more" if len(named) > MAX_NAMED else ""
    advice = "rename it in the file" if parts else f"`cv-lightning config migrate {path}` rewrites the file"
    raise Mistake(f"{path}: {'; '.join(named[:MAX_NAMED])}{more}. {advice[0].upper()}{advice[1:]}")


def _below(node: yaml.Node | None, parts: tuple[str, ...], source: str, folder: Path, depth: int) -> Iterator[Given]:
    """The keys within a value."""
    if depth > MAX_DEPTH:
        return
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.value == "<<":
                for merged in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                    yield from _below(merged, parts, source, folder, depth + 1)
                continue
            inner = (*parts, *key.value.removesuffix("+").split("."))
            yield Given(inner, value, source, key.start_mark.line + 1 if source else 0, folder)
            yield from _below(value, inner, source, folder, depth + 1)
    elif isinstance(node, yaml.SequenceNode):
        for number, item in enumerate(node.value):
            if isinstance(item, yaml.MappingNode):
                yield from _below(item, (*parts, f"[{number}]"), source, folder, depth + 1)
