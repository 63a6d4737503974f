"""Dialects: how a model writes tool calls. Pure functions of text, without the agent, so that rewards use them too."""

from cv_lightning.dialects.base import CUT, CallBlocks, Dialect, OfferedTool, RawCall
from cv_lightning.dialects.hermes import HERMES, HermesDialect
from cv_lightning.dialects.named import DIALECTS, dialect_named

__all__ = [
    "CUT",
    "DIALECTS",
    "HERMES",
    "CallBlocks",
    "Dialect",
    "HermesDialect",
    "OfferedTool",
    "RawCall",
    "dialect_named",
]
