"""Protection of the trainer from what vLLM changes in their common process: threads, process group, ranks."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def keep_threads() -> Iterator[None]:
    """Restore torch's number of threads.

    vLLM's GPU worker sets it to 1 unless OMP_NUM_THREADS is set; the CPU build replaces `torch.set_num_threads` by a
    function that does nothing. The trainer's image processing and an optimizer step on the host need all threads.
    """
    count, setter = torch.get_num_threads(), torch.set_num_threads
    try:
        yield
    finally:
        torch.set_num_threads = setter
        setter(count)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Context manager that sets torch's number of threads."""
    before = torch.get_num_threads()
    if before == count:
        yield
        return
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def keep_process_group() -> Iterator[None]:
    """Context manager that keeps the default process group, which vLLM destroys when it shuts down.

    Groups that vLLM made for itself are destroyed as usual.
    """
    distributed: Any = torch.distributed
    destroy = distributed.destroy_process_group

    def destroy_others(group: Any = None) -> None:
        if group is not None and group is not distributed.group.WORLD:
            destroy(group)

    distributed.destroy_process_group = destroy_others
    try:
        yield
    finally:
        distributed.destroy_process_group = destroy


def has_process_group() -> bool:
    """True if `torch.distributed` is initialised in this process."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def join_launched_ranks() -> int:
    """Set the environment variables from which vLLM reads the rank of this process.

    Returns:
        Number of ranks of the run; also 1 if an earlier engine has left `torch.distributed` initialised with one rank.
    """
    distributed = torch.distributed
    if not has_process_group() or distributed.get_world_size() == 1:
        return 1
    os.environ.setdefault("RANK", str(distributed.get_rank()))
    os.environ.setdefault("WORLD_SIZE", str(distributed.get_world_size()))
    if "SLURM_LOCALID" in os.environ:  # srun sets no LOCAL_RANK
        os.environ.setdefault("LOCAL_RANK", os.environ["SLURM_LOCALID"])
    return distributed.get_world_size()


def engine_device_index(num_ranks: int) -> int:
    """Index of the GPU that vLLM takes in this process, among the visible ones.

    Args:
        num_ranks: Ranks of the run.
    """
    return int(os.environ.get("LOCAL_RANK", "0")) if num_ranks > 1 else 0
