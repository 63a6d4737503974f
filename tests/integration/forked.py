"""Ranks forked from one process, so that the libraries are imported once."""

from __future__ import annotations

import os
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import psutil


def fork_ranks(count: int, run: Callable[[int], None], said: Callable[[int], Path]) -> list[int]:
    """Start the ranks of a run.

    Args:
        count: Number of ranks; a single one connects to no other.
        run: called in each with its number.
        said: file that takes what a rank prints.

    Returns:
        Process ids.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(count):
        if process := os.fork():
            processes.append(process)
            continue
        os.setsid()
        if count > 1:
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count)}
            os.environ |= {"LOCAL_RANK": str(rank), "NODE_RANK": "0"}
        out = os.open(said(rank), os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        os.dup2(out, 1)
        os.dup2(out, 2)
        code = 1
        try:
            run(rank)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return processes


def wait(process: int) -> tuple[int, bool]:
    """Exit code of a rank, and whether a child outlived it; which is ended here."""
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    left = [child for child in psutil.process_iter() if _is_running_in(child, process)]
    for child in left:
        child.kill()
    return code, bool(left)


def _is_running_in(child: psutil.Process, group: int) -> bool:
    try:  # an ended process whose exit status was not read yet is a zombie
        return os.getpgid(child.pid) == group and child.status() != psutil.STATUS_ZOMBIE
    except (ProcessLookupError, psutil.NoSuchProcess):
        return False
