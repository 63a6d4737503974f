"""The rename table: what is called otherwise today than where a fixture was recorded.

`tests/fixtures/renames.json` maps old names to new ones, in five sections:

    class_paths    cv_lightning.callbacks.rollout.RolloutCallback, in configs and command lines
    config_keys    trainer.callbacks.init_args.sampling.seed, as on the command line, and of stored configs as
                   trainer.callbacks.RolloutCallback.sampling.seed
    metrics        columns of metrics.csv and dotted names of an evaluation's metrics.json
    stored_fields  trajectories[].turns[].num_tokens, of a stored line; `[]` stands for every item of a list
    modules        cv_lightning.trajectory.store, in command lines, and the names of files there

An entry renames its name and everything below it (behind the next `.`, `/` or `[`); one `*` in it stands for anything,
as in `reward/*/mandatory`; the longest entry wins. Null says that it is gone on purpose. What is recorded and neither
found under its name nor in the table fails a test; what is new does not.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

FIXTURES = Path(__file__).parent / "fixtures"
Section = Literal["class_paths", "config_keys", "metrics", "stored_fields", "modules"]
SECTIONS: tuple[Section, ...] = ("class_paths", "config_keys", "metrics", "stored_fields", "modules")
INDEX = re.compile(r"\[(\d+)\]")


@dataclass(frozen=True)
class Renames:
    """Old names to new ones, by section."""

    table: Mapping[str, Mapping[str, str | None]]

    def of(self, section: Section, name: str) -> str | None:
        """What a name is called today; None: it is gone on purpose. Indices of lists stay where they are."""
        plain, indices = INDEX.sub("[]", name), INDEX.findall(name)
        fitting = {old: found for old in self.table[section] if (found := _pattern(old).fullmatch(plain))}
        if not fitting:
            return name
        old = max(fitting, key=len)
        new = self.table[section][old]
        if new is None:
            return None
        *middle, rest = fitting[old].groups()
        parts = (new.replace("*", "".join(middle)) + rest).split("[]")
        assert len(parts) == len(indices) + 1, f"renames.json: {old} -> {new} changes the number of lists"
        return parts[0] + "".join(f"[{index}]{part}" for index, part in zip(indices, parts[1:], strict=True))

    def flat(self, section: Section, values: Mapping[str, Any]) -> dict[str, Any]:
        """Recorded values under today's names."""
        named = ((self.of(section, name), value) for name, value in values.items())
        return {name: value for name, value in named if name is not None}

    def text(self, words: str) -> str:
        """A command line, or other text, with today's class paths, modules and config keys in it."""
        for section in ("class_paths", "modules", "config_keys"):
            for old in sorted(self.table[section], key=len, reverse=True):
                words = re.sub(rf"(?<![\w.]){re.escape(old)}(?![\w])", self.table[section][old] or "", words)
        return words


@cache
def _pattern(old: str) -> re.Pattern[str]:
    return re.compile(re.escape(old).replace(r"\*", "(.*)") + r"((?:[./\[].*)?)")


@cache
def renames() -> Renames:
    """The table as it is.

    Raises:
        AssertionError: another section than the five.
    """
    table = json.loads((FIXTURES / "renames.json").read_text())
    assert set(table) == set(SECTIONS), f"renames.json: sections {sorted(table)}, wanted {sorted(SECTIONS)}"
    return Renames(table)


def flatten(value: Any, name: str = "") -> dict[str, Any]:
    """Dotted names to the leaves of JSON values: `a.b[0].c`. Empty lists and objects are leaves."""
    if isinstance(value, Mapping) and value:
        return {k: v for key in value for k, v in flatten(value[key], f"{name}.{key}" if name else str(key)).items()}
    if isinstance(value, list | tuple) and value:
        return {k: v for at, item in enumerate(value) for k, v in flatten(item, f"{name}[{at}]").items()}
    return {name: value}


def differences(recorded: Mapping[str, Any], found: Mapping[str, Any], relative: float, absolute: float) -> list[str]:
    """Differences of values from the recorded ones, as text; new values are not differences.

    Args:
        recorded: by today's names.
        found: by name.
        relative: tolerance of floats, as a share of the recorded value.
        absolute: tolerance of floats, where that is larger.
    """
    said = []
    for name, wanted in recorded.items():
        if name not in found:
            said.append(f"{name}: gone (was {wanted!r}); a new name belongs into tests/fixtures/renames.json")
        elif not same(wanted, found[name], relative, absolute):
            said.append(f"{name}: {found[name]!r}, recorded was {wanted!r}")
    return said


def same(wanted: Any, got: Any, relative: float, absolute: float) -> bool:
    """Equal, or floats within the tolerance; NaN is itself."""
    numbers = (int, float)
    if isinstance(wanted, bool) or not isinstance(wanted, numbers) or not isinstance(got, numbers):
        return bool(wanted == got)
    if isinstance(wanted, int) and isinstance(got, int):
        return wanted == got
    return math.isclose(wanted, got, rel_tol=relative, abs_tol=absolute) or (math.isnan(wanted) and math.isnan(got))
