"""The owner record of a run's folder: when a run is refused or admitted, and what a run does that lost its folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from cv_lightning.callbacks import owner
from cv_lightning.callbacks.owner import RunOwner
from cv_lightning.types import CVLightningError

RECORD = ".owner-fit.json"


def forge(folder: Path, age_s: float, **changes: Any) -> Path:
    """Write a record of another process."""
    folder.mkdir(exist_ok=True)
    path = folder / RECORD
    whole = {"host": "node7", "pid": 4711, "began": 1.0, "machine": "boot pid:[1]", "token": "theirs", "verb": "fit"}
    path.write_text(json.dumps(whole | changes))
    beat = time.time() - age_s
    os.utime(path, (beat, beat))
    return path


def test_lock_of_another_host_is_refused_by_name(tmp_path: Path) -> None:
    record = forge(tmp_path, age_s=20)
    with pytest.raises(CVLightningError) as refused:
        RunOwner().take(tmp_path, "fit")
    said = str(refused.value)
    assert "process 4711 on host node7" in said and "--take_over true" in said and str(tmp_path) in said
    assert any(f"is {age} s old" in said for age in (20, 21, 22))
    assert json.loads(record.read_text())["token"] == "theirs", "it is left as it was"
    assert [path.name for path in tmp_path.iterdir()] == [RECORD]
    test = RunOwner()
    test.take(tmp_path, "test")  # an evaluation may run beside the training
    test.release()


@pytest.mark.parametrize("case", ["stale", "flag", "dead here", "pid used again"])
def test_lock_without_a_living_owner_is_taken_over(tmp_path: Path, case: str) -> None:
    here = {"host": "me", "machine": owner._machine()}
    if case == "stale":
        forge(tmp_path, age_s=61)
    elif case == "dead here":
        forge(tmp_path, age_s=1, pid=2**22 - 7, **here)
    elif case == "pid used again":
        forge(tmp_path, age_s=1, pid=os.getppid(), **here)
    else:
        forge(tmp_path, age_s=1)
    mine = RunOwner(take_over=case == "flag")
    mine.take(tmp_path, "fit")
    assert json.loads((tmp_path / RECORD).read_text())["pid"] == os.getpid()
    mine.release()
    assert list(tmp_path.iterdir()) == []


def test_lock_of_a_living_process_on_this_host_is_refused_however_old(tmp_path: Path) -> None:
    import psutil

    parent = psutil.Process(os.getppid())
    forge(tmp_path, age_s=30, pid=parent.pid, began=parent.create_time(), machine=owner._machine())
    with pytest.raises(CVLightningError, match=f"process {parent.pid} "):
        RunOwner().take(tmp_path, "fit")


def test_lock_that_is_being_written_counts_as_taken(tmp_path: Path) -> None:
    (tmp_path / RECORD).touch()
    with pytest.raises(CVLightningError, match="is in use"):
        RunOwner().take(tmp_path, "fit")


def test_lock_has_a_heartbeat_and_losing_it_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[str] = []
    monkeypatch.setattr(owner, "BEAT_S", 0.02)
    monkeypatch.setattr(owner, "end_process", lambda code, message: ended.append(message))
    mine = RunOwner()
    mine.take(tmp_path, "fit")
    record = tmp_path / RECORD
    os.utime(record, (1.0, 1.0))
    deadline = time.monotonic() + 10
    while record.stat().st_mtime < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert time.time() - record.stat().st_mtime < 10, "the heartbeat is the record's modification time"
    forge(tmp_path, age_s=0)
    while not ended and time.monotonic() < deadline:
        time.sleep(0.01)
    assert ended and "process 4711 on host node7 has taken over" in ended[0]
    mine.release()
    assert record.exists(), "another one's record is not removed"


def test_lock_that_cannot_be_opened_is_left_to_its_owner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = forge(tmp_path, age_s=1)

    def fail(*_: Any, **__: Any) -> Any:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(Path, "open", fail)
    with pytest.raises(CVLightningError, match="Too many open files"):
        RunOwner().take(tmp_path, "fit")
    assert record.exists()


def test_a_process_whose_stderr_is_closed_ends() -> None:
    code = "import os; os.close(2); from cv_lightning.callbacks.owner import end_process; end_process(7, 'over')"
    assert subprocess.run([sys.executable, "-c", code], timeout=120, check=False).returncode == 7


def test_lock_in_a_folder_that_cannot_be_written_is_a_message(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CVLightningError, match="cannot be written"):
        RunOwner().take(tmp_path / "file" / "run", "fit")
