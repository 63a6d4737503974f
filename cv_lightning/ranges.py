"""Ranges of settings, declared in their types: `num_samples: PositiveInt`. No heavy imports.

The command line reads the plain type; `check_ranges` checks a config or the arguments of a constructor.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from numbers import Real
from typing import Annotated, Any, get_args, get_type_hints


@dataclass(frozen=True, slots=True)
class Range:
    """The numbers that a setting may be. NaN is never one of them."""

    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None
    infinite: bool = False
    """Infinity is allowed; it means no limit."""

    def holds(self, value: float) -> bool:
        """True if the value lies in the range."""
        return (
            (math.isfinite(value) or (self.infinite and value > 0))
            and (self.at_least is None or value >= self.at_least)
            and (self.above is None or value > self.above)
            and (self.at_most is None or value <= self.at_most)
            and (self.below is None or value < self.below)
        )

    def __str__(self) -> str:
        bounds = [f"{name.replace('_', ' ')} {bound:g}" for name, bound in self.as_dict().items() if name != "infinite"]
        return " and ".join(bounds or ["a finite number"]) + (" (.inf: no limit)" if self.infinite else "")

    def as_dict(self) -> dict[str, float | bool]:
        """The bounds that are set, as JSON values; `Range(**bounds)` is the range again."""
        return {name: value for name, value in asdict(self).items() if value is not None and value is not False}

    def error(self, key: str, value: float) -> str:
        """What is wrong with a value of a setting outside the range, and the flag to set."""
        return f"{key} is {value}; it must be {self}. Set --{key}"


PositiveInt = Annotated[int, Range(at_least=1)]
NonNegativeInt = Annotated[int, Range(at_least=0)]
PositiveFloat = Annotated[float, Range(above=0)]
NonNegativeFloat = Annotated[float, Range(at_least=0)]
Fraction = Annotated[float, Range(at_least=0, at_most=1)]
Limit = Annotated[float, Range(above=0, infinite=True)]
"""Infinity switches the limit off."""
FiniteFloat = Annotated[float, Range()]


def range_of(annotation: Any) -> Range | None:
    """The range of a number's type, of the numbers of a list, tuple or mapping, or of an optional number."""
    found = next((part for part in getattr(annotation, "__metadata__", ()) if isinstance(part, Range)), None)
    return found or next(filter(None, map(range_of, get_args(annotation))), None)


@cache
def declared_ranges(owner: Hashable) -> dict[str, Range]:
    """The ranges that the annotations of a dataclass or a function declare, by name."""
    hints = get_type_hints(owner, include_extras=True)
    return {name: limits for name, hint in hints.items() if (limits := range_of(hint)) is not None}


def check_ranges(config: Any, key: str = "", arguments: Mapping[str, Any] | None = None) -> None:
    """Refuse numbers outside the ranges that their types declare.

    Args:
        config: A dataclass's instance, or a constructor.
        key: Place of the settings in a config file, such as `rollout.agent`; empty for flags of a verb.
        arguments: Arguments of the constructor by name; None for a dataclass.

    Raises:
        ValueError: Names the setting, its value, the range and the flag.
    """
    declared = declared_ranges(config.__class__ if arguments is None else config)
    values = {name: getattr(config, name) for name in declared} if arguments is None else arguments
    for error in out_of_range(values, declared, key):
        raise ValueError(error)


def out_of_range(values: Mapping[str, Any], ranges: Mapping[str, Range], key: str = "") -> Iterator[str]:
    """Errors about the values of settings that lie outside their ranges.

    Args:
        values: Values by name: numbers, lists or mappings of numbers. Others, such as None, are not checked.
        ranges: Ranges by name.
        key: Prefix of the names in the errors.
    """
    for name, limits in ranges.items():
        for place, number in _numbers(f"{key}.{name}".strip("."), values.get(name)):
            if not limits.holds(number):
                yield limits.error(place, number)


def _numbers(place: str, value: Any) -> Iterator[tuple[str, float]]:
    """The numbers of a value, each with the key to change."""
    if isinstance(value, Real) and not isinstance(value, bool):
        yield place, float(value) if not isinstance(value, int) else value
    elif isinstance(value, Mapping):
        for name, entry in value.items():
            yield from _numbers(f"{place}.{name}", entry)
    elif isinstance(value, list | tuple):
        for entry in value:
            yield from _numbers(place, entry)
