"""The settings of fit, validate and test, read from an index without importing the classes that define them.

`settings_index.json` is written by `scripts/settings.py`, from the parsers and the docstrings of the code.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import Any, NamedTuple

FILE = Path(__file__).with_name("settings_index.json")
ITEM = "[]"
"""Part of a key that stands for an entry of a list."""
MIN_SIMILARITY = 0.82
"""From here on two names are close: `num_sample` and `num_samples`, not `batch_size` and `cache_size`."""
MAX_DESCRIBED = 3
"""Docstrings with a wrong key's words (`learning_rate`) suggest a key if they are this few."""


class Setting(NamedTuple):
    """One key, as its parser knows it."""

    type: str
    default: Any
    doc: str
    values: Sequence[Any] = ()
    """All values that it can have, where they are listed."""
    range: Mapping[str, Any] = {}
    """Bounds of a number; `Range(**bounds)` is the range."""
    fields: str = ""
    """Class whose settings are directly below the key."""
    classes: Sequence[str] = ()
    """Classes of the package that `class_path` can name; their settings are below `init_args`."""
    open: bool = False
    """A class that the index does not have may be named as well."""
    many: str = ""
    """`list` or `dict` if the value is several objects of the class."""
    set_by: str = ""
    """The key that determines this one, which cannot be set itself."""

    @property
    def is_nullable(self) -> bool:
        """True if null is a value."""
        return "null" in self.type.split(" | ")

    @property
    def is_required(self) -> bool:
        """True if it has no default."""
        return self.default is None and not self.is_nullable


class Level(NamedTuple):
    """The keys of a verb or of a class, each relative to it."""

    settings: Mapping[str, Setting]
    groups: Collection[str]
    doc: str = ""

    def children(self, parts: Sequence[str]) -> list[str]:
        """Names one level below a group."""
        start = "".join(f"{part}." for part in parts)
        names = [key.removeprefix(start) for key in (*self.settings, *self.groups) if key.startswith(start)]
        return list(dict.fromkeys(name.partition(".")[0] for name in names))


class Entry(NamedTuple):
    """A setting under its whole key."""

    key: str
    """Dotted, as in a flag; `[]` is an entry of a list, `*` a name of the user's choice."""
    setting: Setting
    of: tuple[str, ...]
    """Names of the classes that have it, where the nearest `class_path` above it can also name others."""


class SettingsIndex:
    """The index.

    Args:
        index: Content of the file.
    """

    def __init__(self, index: Mapping[str, Any]) -> None:
        root = _level(index["root"])
        own = {key: Setting(**value) for found in index["verbs"].values() for key, value in found.items()}
        self.root = Level({**root.settings, **own}, root.groups)
        self.classes = {path: _level(value) for path, value in index["classes"].items()}

    @cached_property
    def entries(self) -> tuple[Entry, ...]:
        """Every setting that can be set, below every class that can be named."""
        return tuple(_unique(list(self._expanded(self.root, "", ()))))

    def class_named(self, given: str, among: Collection[str]) -> str | None:
        """The path in the index of a class that a config names; None if it may be another one.

        Args:
            given: Its path (that of the module, or of a package that re-exports it), or its bare name.
            among: Paths of the classes that it may be.
        """
        module, _, name = given.rpartition(".")
        found = [path for path in among if path.rpartition(".")[2] == name]
        is_ours = not module or module.partition(".")[0] == __package__
        return found[0] if is_ours and len(found) == 1 else None

    def close_keys(self, key: str, count: int = 1, similarity: float = MIN_SIMILARITY) -> list[str]:
        """Keys that a wrong key may have meant: with the same last part, or similar ones; best first."""
        last = key.rpartition(".")[2]
        by_last: dict[str, list[str]] = {}
        for known in self._keys_and_groups():
            by_last.setdefault(known.rpartition(".")[2], []).append(known)
        names = [last] if last in by_last else difflib.get_close_matches(last, by_last, 3, similarity)
        plain = {found.replace("init_args.", ""): found for name in names for found in by_last[name]}
        wanted = key.replace("init_args.", "")
        ranked = sorted(plain, key=lambda found: -difflib.SequenceMatcher(None, wanted, found).ratio())
        if not ranked and len(described := self.find([last])) <= MAX_DESCRIBED:
            return [entry.key for entry in described[:1]]
        return [plain[found] for found in ranked[:count]]

    def _keys_and_groups(self) -> Collection[str]:
        found: dict[str, None] = {}
        for entry in self.entries:
            parts = entry.key.split(".")
            ends = (end for end in range(1, len(parts) + 1) if parts[end - 1] != "init_args")
            found |= dict.fromkeys(".".join(parts[:end]) for end in ends)
        return found

    def find(self, words: Sequence[str]) -> list[Entry]:
        """Entries whose key, docstring or class has all words; those with a word as the key's last part come first."""
        ranked = [(_rank(entry, [word.lower() for word in words]), entry) for entry in self.entries]
        found = [(rank, entry) for rank, entry in ranked if rank > 0]
        return [entry for _, entry in sorted(found, key=lambda pair: -pair[0])]

    def _expanded(self, level: Level, prefix: str, of: tuple[str, ...]) -> Iterator[Entry]:
        for key, setting in level.settings.items():
            if setting.set_by:
                continue
            place = f"{prefix}{key}"
            yield Entry(place, setting, of)
            inner = place + {"list": ITEM, "dict": ".*"}.get(setting.many, "")
            if setting.fields:
                yield from self._expanded(self.classes[setting.fields], f"{inner}.", of)
            for path in setting.classes:
                yield from self._expanded(self.classes[path], f"{inner}.init_args.", (short_path(path),))


@cache
def load() -> SettingsIndex:
    """The package's index."""
    return SettingsIndex(json.loads(FILE.read_text(encoding="utf-8")))


def short_path(path: str) -> str:
    """The name of a class without its module."""
    return path.rpartition(".")[2]


def shown(value: Any) -> str:
    """A default as YAML has it, on one line."""
    if isinstance(value, str) and value == value.strip() and value and "\n" not in value:
        return value
    return ".inf" if value == float("inf") else json.dumps(value, ensure_ascii=False)


def _level(found: Mapping[str, Any]) -> Level:
    settings = {key: Setting(**value) for key, value in found["settings"].items()}
    return Level(settings, frozenset(found["groups"]), found.get("doc", ""))


def _unique(entries: Sequence[Entry]) -> Iterator[Entry]:
    """One entry for what several classes of one key have in common."""
    classes = {entry.key: set(map(short_path, entry.setting.classes)) for entry in entries}
    owners: dict[tuple[str, str], list[str]] = {}
    for entry in entries:
        owners.setdefault((entry.key, json.dumps(entry.setting)), []).extend(entry.of)
    for entry in entries:
        of = owners.pop((entry.key, json.dumps(entry.setting)), None)
        if of is not None:
            outer = entry.key.rpartition(".init_args.")[0].removesuffix(ITEM).removesuffix(".*")
            yield entry._replace(of=() if set(of) == classes.get(outer) else tuple(dict.fromkeys(of)))


def _rank(entry: Entry, words: Sequence[str]) -> float:
    key, last = entry.key.lower(), entry.key.lower().rpartition(".")[2]
    text = f"{entry.setting.doc} {' '.join(entry.of)} {' '.join(entry.setting.classes)}".lower()
    total = 0.0
    for word in (word.strip("-").replace("-", "_") for word in words):
        if last == word or key == word:
            total += 8
        elif last.startswith(word):
            total += 5
        elif word in last:
            total += 4
        elif word in key:
            total += 3
        elif word in text or word.replace("_", " ") in text:
            total += 1
        else:
            return 0.0
    return total - key.count(".") / 100
