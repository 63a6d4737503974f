"""Verdicts that are known: in memory, and on disk where a folder is given. Disk work happens on a thread of its own."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import diskcache

MEMORY_ENTRIES = 100_000
"""Verdicts kept in memory, about 20 MB."""


class VerdictCache:
    """Verdicts by key; one process may close it while others go on using the folder."""

    def __init__(self, folder: str | None, megabytes: int) -> None:
        """Open it.

        Args:
            folder: made if absent; None: memory only.
            megabytes: size at which the disk cache drops its oldest verdicts.
        """
        self._memory: OrderedDict[str, float] = OrderedDict()
        self._disk = diskcache.Cache(folder, size_limit=megabytes * 2**20, timeout=5) if folder else None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="judge-cache") if folder else None

    async def get(self, key: str) -> float | None:
        """Known verdict, or None."""
        if key in self._memory:
            self._memory.move_to_end(key)
            return self._memory[key]
        if self._disk is None:
            return None
        value = await asyncio.get_running_loop().run_in_executor(self._thread, self._read, key)
        if value is not None:
            self._remember(key, value)
        return value

    async def put(self, key: str, value: float) -> None:
        """Keep a verdict; returns when it is on disk."""
        self._remember(key, value)
        if self._disk is not None:
            await asyncio.get_running_loop().run_in_executor(self._thread, self._write, key, value)

    def close(self) -> None:
        """Finish writing and close the folder."""
        if self._thread is not None:
            self._thread.shutdown(wait=True)
        if self._disk is not None:
            self._disk.close()

    def _remember(self, key: str, value: float) -> None:
        self._memory[key] = value
        self._memory.move_to_end(key)
        if len(self._memory) > MEMORY_ENTRIES:
            self._memory.popitem(last=False)

    def _read(self, key: str) -> float | None:
        assert self._disk is not None
        try:
            value = self._disk.get(key)
        except diskcache.Timeout:  # another process holds the folder: asking the judge again costs less than waiting
            return None
        return float(value) if isinstance(value, int | float) else None

    def _write(self, key: str, value: float) -> None:
        assert self._disk is not None
        try:
            self._disk.set(key, value)
        except diskcache.Timeout:  # it stays in memory
            return


def cache_key(parts: Sequence[object]) -> str:
    """SHA-256 of everything that a verdict depends on, unambiguous in where one part ends."""
    return hashlib.sha256(json.dumps(list(parts), ensure_ascii=True).encode()).hexdigest()
