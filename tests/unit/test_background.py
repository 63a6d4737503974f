"""The background thread ends with the work that runs on it, and closing it never blocks forever."""

from __future__ import annotations

import asyncio

import pytest

from cv_lightning import background as module
from cv_lightning.background import Background


def test_closing_cancels_what_runs() -> None:
    ended: list[str] = []

    async def endless() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append("cleaned up")

    thread = Background()
    thread.submit(endless())
    assert thread.submit(asyncio.sleep(0, "value")).result(timeout=5) == "value"
    thread.close()
    thread.close()
    assert ended == ["cleaned up"] and thread.loop.is_closed()


def test_work_that_ignores_its_cancellation_does_not_block_the_rest(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "CLOSE_S", 0.1)
    release = asyncio.Event()

    async def stubborn() -> None:
        while not release.is_set():
            try:
                await release.wait()
            except asyncio.CancelledError:
                continue

    thread = Background()
    thread.submit(stubborn())
    thread.submit(asyncio.sleep(0)).result(timeout=5)
    thread.close()
    assert "did not end" in caplog.text
