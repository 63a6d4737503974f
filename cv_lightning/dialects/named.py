"""Dialects by name: a short name of ours, or the import path of a user's class."""

from __future__ import annotations

from functools import cache
from importlib import import_module

from cv_lightning.dialects.base import Dialect
from cv_lightning.dialects.hermes import HERMES
from cv_lightning.dialects.python_block import PythonBlockDialect
from cv_lightning.dialects.qwen_xml import QwenXMLDialect

DIALECTS: dict[str, Dialect] = {dialect.name: dialect for dialect in (HERMES, QwenXMLDialect(), PythonBlockDialect())}
"""Our dialects by name."""


@cache
def dialect_named(name: str) -> Dialect:
    """The dialect of a name.

    Args:
        name: A key of `DIALECTS`, or the import path of a subclass of `Dialect`.

    Raises:
        ValueError: There is no such dialect.
    """
    if name in DIALECTS:
        return DIALECTS[name]
    module, _, attribute = name.rpartition(".")
    try:
        found = getattr(import_module(module), attribute)
        if not issubclass(found, Dialect):
            raise TypeError(f"{attribute} is not a subclass of cv_lightning.dialects.Dialect")
        dialect: Dialect = found()
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        known = ", ".join(DIALECTS)
        raise ValueError(
            f"agent.dialect {name!r}: {error}\nname one of {known}, or a class of your own as module.Class"
        ) from error
    return dialect
