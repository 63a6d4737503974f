"""Communication between ranks: gathering lists, and checking that all ranks run the same."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from typing import Any, TypeVar

from cv_lightning.settings import changed, flatten
from cv_lightning.types import CVLightningError

T = TypeVar("T")
SHOWN = 5
"""Most differences that a message names."""


def gather_lists(items: list[T]) -> list[T]:
    """The lists of all ranks, concatenated."""
    import torch

    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return items
    everything: list[list[T]] = [[] for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather_object(everything, items)
    return [item for part in everything for item in part]


def collective_timeout_s() -> float | None:
    """Seconds after which a collective that some rank does not join is an error; None if the backend does not tell."""
    import torch

    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return None
    device = torch.device("cuda" if torch.distributed.get_backend() == "nccl" else "cpu")
    try:  # neither Lightning nor torch has a public function for it
        options = torch.distributed.group.WORLD._get_backend(device).options  # type: ignore[union-attr]
        return float(options._timeout.total_seconds())
    except (AttributeError, RuntimeError):  # only a warning depends on it
        return None


def check_agreement(facts: Mapping[str, Any]) -> None:
    """Refuse ranks with other versions, source or settings than the first rank. Call it on all ranks.

    Args:
        facts: Facts about this rank; may be nested.

    Raises:
        CVLightningError: On every rank; the message names the differences.
    """
    flat = {name: str(value) for name, value in flatten(facts).items()}
    gathered = gather_lists([(socket.gethostname(), flat)])
    found = differences(gathered)
    if found:
        more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
        raise CVLightningError(
            f"the ranks do not run the same: {'; '.join(found[:SHOWN])}{more}. Start all with the same command, on the "
            "same source and environment"
        )


def differences(facts: list[tuple[str, dict[str, str]]]) -> list[str]:
    """Descriptions of the differences from the first rank.

    Args:
        facts: Host and facts of every rank.
    """
    (first_host, first), *others = facts
    found = []
    for rank, (host, own) in enumerate(others, 1):
        for name in sorted(changed(first, own)):
            here, there = first.get(name, "absent"), own.get(name, "absent")
            found.append(f"{name} is {here} on rank 0 ({first_host}), {there} on rank {rank} ({host})")
    return found
