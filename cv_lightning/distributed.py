"""Do the ranks of a run agree on what they run? Asked once, at its start."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from typing import Any

from cv_lightning.rollout.evaluator import gather_lists
from cv_lightning.types import CVLightningError

SHOWN = 5
"""Differences that a message names."""


def check_agreement(facts: Mapping[str, Any]) -> None:
    """Refuse ranks with other versions, source or settings than the first. Call it on all ranks.

    Args:
        facts: of this rank; may be nested.

    Raises:
        CVLightningError: on every rank, names what differs where.
    """
    gathered = gather_lists([(socket.gethostname(), flatten(facts))])
    found = differences(gathered)
    if found:
        more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
        raise CVLightningError(
            f"the ranks do not run the same: {'; '.join(found[:SHOWN])}{more}. Start all with the same command, on the "
            "same source and environment"
        )


def differences(facts: list[tuple[str, dict[str, str]]]) -> list[str]:
    """What differs from the first rank, in words.

    Args:
        facts: host and facts of every rank.
    """
    (first_host, first), *others = facts
    found = []
    for rank, (host, own) in enumerate(others, 1):
        for name in sorted(first.keys() | own.keys()):
            if first.get(name) != own.get(name):
                here, there = first.get(name, "absent"), own.get(name, "absent")
                found.append(f"{name} is {here} on rank 0 ({first_host}), {there} on rank {rank} ({host})")
    return found


def flatten(facts: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested facts by dotted names."""
    flat: dict[str, str] = {}
    for name, value in facts.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = str(value)
    return flat
