"""Children that the kernel kills because the memory of a control group ran out.

The group lies under the one that the tests run in and holds the fork server and what it forks, nothing else. Skipped
where no such group can be made (no root, or a read-only hierarchy).
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from sandbox_samples import NOISE

from cv_lightning.sandbox import Sandbox, SandboxConfig
from cv_lightning.types import ToolStatus

ROOM_MB = 96
"""What the group leaves to a child."""
TAKES = "kept = []\nfor i in range({}):\n    kept.append(bytearray(b'x') * (1 << 20))\nresult = image"
"""Takes so many megabytes, one at a time."""


@dataclass(frozen=True)
class Group:
    """A control group with a limit of memory, of either version."""

    folder: Path

    @property
    def _names(self) -> tuple[str, str]:
        first = (self.folder / "memory.limit_in_bytes").exists()
        return ("memory.limit_in_bytes", "memory.usage_in_bytes") if first else ("memory.max", "memory.current")

    def take(self, pids: list[int]) -> None:
        """Put processes in."""
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                (self.folder / "cgroup.procs").write_text(str(pid))

    def limit(self, megabytes: int) -> None:
        """Leave so much room beyond what is used now."""
        used = int((self.folder / self._names[1]).read_text())
        (self.folder / self._names[0]).write_text(str(used + (megabytes << 20)))

    def lift(self) -> None:
        """Take the limit away."""
        (self.folder / self._names[0]).write_text("-1" if "limit" in self._names[0] else "max")

    def kills(self) -> int:
        """Processes in it that the kernel has killed."""
        name = "memory.oom_control" if "limit" in self._names[0] else "memory.events"
        lines = (self.folder / name).read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("oom_kill "))


def _own_group() -> Path | None:
    """The folder of this process's memory group."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, names, path = line.split(":", 2)
        if names == "memory":
            return Path("/sys/fs/cgroup/memory" + path)
        if not names and Path("/sys/fs/cgroup/cgroup.controllers").exists():
            return Path("/sys/fs/cgroup" + path)
    return None


@pytest.fixture
def group() -> Iterator[Group]:
    own = _own_group()
    made = own / "cv_lightning_test" if own is not None else Path("/nowhere/group")
    try:
        made.mkdir()
    except OSError as error:
        pytest.skip(f"no control group can be made here: {error}")
    try:
        if not any((made / name).exists() for name in ("memory.limit_in_bytes", "memory.max")):
            pytest.skip("control groups without a limit of memory")
        yield Group(made)
    finally:
        for _ in range(100):
            with contextlib.suppress(OSError):
                made.rmdir()
                break
            time.sleep(0.05)


@contextlib.contextmanager
def confined(group: Group, *, memory_mb: int = 1024, room_mb: int = ROOM_MB) -> Iterator[Sandbox]:
    """A sandbox whose fork server, with what it forks, has so much more than it uses."""
    config = SandboxConfig(plan_tier=False, num_zygotes=1, timeout_s=30, memory_mb=memory_mb, max_in_flight=1)
    with Sandbox(config) as sandbox:
        group.take(sandbox.server_pids())
        # A spare child was forked outside of the group.
        group.take(sandbox.child_pids())
        group.limit(room_mb)
        yield sandbox


TRIES = 8
"""The kernel may choose the fork server instead of its child; another one then starts outside of the group."""


def test_redteam_a_child_that_the_kernel_kills_for_memory_is_masked(group: Group) -> None:
    """It took far less than a snippet may: the machine had too little."""
    for _ in range(TRIES):
        with confined(group) as sandbox:
            before = group.kills()
            result = sandbox.run_sync(NOISE, TAKES.format(300))
            if sandbox.stats["restarts"]:
                continue
            assert result.status is ToolStatus.INFRASTRUCTURE_ERROR and "killed from outside" in result.error, result
            assert group.kills() >= before + 2 and sandbox.stats["lost"] == 1 and sandbox.stats["resent"] >= 1
            assert sandbox.run_sync(NOISE, "import re\nresult = image").status is ToolStatus.OK
            return
    pytest.skip(f"the kernel chose the fork server {TRIES} times")


def test_redteam_a_snippet_runs_again_once_there_is_memory(group: Group) -> None:
    with confined(group) as sandbox:

        def lift() -> None:
            until = time.monotonic() + 20
            while not group.kills() and time.monotonic() < until:
                time.sleep(0.005)
            group.lift()

        lifts = threading.Thread(target=lift)
        lifts.start()
        result = sandbox.run_sync(NOISE, TAKES.format(300))
        lifts.join()
        assert result.status is ToolStatus.OK and group.kills() >= 1, result
        assert sandbox.stats["resent"] >= 1 and sandbox.stats["lost"] == 0


def test_redteam_a_snippet_that_took_the_memory_itself_is_blamed(group: Group) -> None:
    for _ in range(TRIES):
        with confined(group, memory_mb=480, room_mb=360) as sandbox:
            before = group.kills()
            result = sandbox.run_sync(NOISE, TAKES.format(420))
            if sandbox.stats["restarts"]:
                continue
            assert result.status is ToolStatus.KILLED and group.kills() == before + 1, (result, group.kills())
            assert sandbox.stats["resent"] == 0 and sandbox.stats["lost"] == 0
            return
    pytest.skip(f"the kernel chose the fork server {TRIES} times")
