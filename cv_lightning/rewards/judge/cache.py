"""Verdicts that are known: in memory, and on disk where a folder is given. A separate thread does the disk work."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import diskcache

MEMORY_ENTRIES = 100_000
"""Verdicts kept in memory, about 20 MB."""


class VerdictCache:
    """Verdicts by key. Several processes may use one folder at once."""

    def __init__(self, folder: str | None, megabytes: int) -> None:
        """Open it.

        Args:
            folder: Made if absent; None: memory only.
            megabytes: Size at which the disk cache drops its oldest verdicts.
        """
        self._memory: dict[str, float] = {}
        self._disk = diskcache.Cache(folder, size_limit=megabytes * 2**20, timeout=5) if folder else None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="judge-cache")

    async def get(self, key: str) -> float | None:
        """The known verdict, or None."""
        if key not in self._memory and self._disk is not None:
            value = await self._on_thread(self._disk.get, key)
            if isinstance(value, int | float):
                self._remember(key, float(value))
        return self._memory.get(key)

    async def put(self, key: str, value: float) -> None:
        """Keep a verdict; returns when it is on disk."""
        self._remember(key, value)
        if self._disk is not None:
            await self._on_thread(self._disk.set, key, value)

    def close(self) -> None:
        """Finish writing and close the folder."""
        self._thread.shutdown(wait=True)
        if self._disk is not None:
            self._disk.close()

    def _remember(self, key: str, value: float) -> None:
        self._memory[key] = value
        if len(self._memory) > MEMORY_ENTRIES:
            del self._memory[next(iter(self._memory))]

    async def _on_thread(self, work: Callable[..., Any], *arguments: object) -> Any:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, work, *arguments)
        except diskcache.Timeout:  # another process holds the folder: asking the judge again costs less than waiting
            return None


def cache_key(parts: Sequence[object]) -> str:
    """SHA-256 of everything that a verdict depends on, unambiguous in where one part ends."""
    return hashlib.sha256(json.dumps(list(parts), ensure_ascii=True).encode()).hexdigest()
