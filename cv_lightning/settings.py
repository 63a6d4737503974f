"""Nested settings as flat ones by dotted name, and the names in which two differ."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def flatten(value: Any, name: str = "") -> dict[str, Any]:
    """The leaves of a nested config by dotted name.

    Args:
        value: Mappings, lists and leaves. The entries of a list of classes are named by their classes, where these
            differ; any other list and an empty mapping is a leaf.
        name: Prefix of the names.
    """
    parts = value
    if isinstance(value, list) and all(isinstance(item, Mapping) and "class_path" in item for item in value):
        parts = {str(item["class_path"]).rpartition(".")[2]: item for item in value}
        parts = parts if len(parts) == len(value) else None
    if not isinstance(parts, Mapping) or not parts:
        return {name: value}
    return {key: leaf for part in parts for key, leaf in flatten(parts[part], f"{name}.{part}".strip(".")).items()}


def changed(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Names whose values differ in two flat mappings, or that only one of them has, in their order."""
    absent = object()
    return [name for name in {**old, **new} if old.get(name, absent) != new.get(name, absent)]
