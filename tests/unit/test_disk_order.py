"""What a power cut can take: the order of waiting for the disk and renaming, and what a resumed run says is missing."""

from __future__ import annotations

import errno
import logging
import os
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from trajectory_samples import digit_task, group

from cv_lightning.callbacks.checkpoint import warn_of_lost_groups, warn_of_lost_rows
from cv_lightning.environment import log_to
from cv_lightning.files import describe_disk_error, whole_file
from cv_lightning.loggers.metrics_file import MetricsLogger
from cv_lightning.trajectory.store import TrajectoryWriter, last_groups


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Every fsync and rename, with the name of the file or the new name."""
    found: list[tuple[str, str]] = []
    fsync, replace = os.fsync, os.replace

    def record_fsync(descriptor: int) -> None:
        found.append(("fsync", Path(os.readlink(f"/proc/self/fd/{descriptor}")).name))
        fsync(descriptor)

    def record_replace(source: Any, target: Any) -> None:
        found.append(("rename", Path(target).name))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "replace", record_replace)
    return found


def test_disk_has_a_file_before_it_is_renamed(tmp_path: Path, calls: list[tuple[str, str]]) -> None:
    with whole_file(tmp_path / "a.json") as temporary:
        temporary.write_text("{}")
    assert calls == [("fsync", "a.json.tmp"), ("rename", "a.json")]


def test_disk_has_images_before_lines_and_both_after_a_sync(tmp_path: Path, calls: list[tuple[str, str]]) -> None:
    for background in (False, True):
        with TrajectoryWriter(tmp_path, background=background) as writer:
            writer.write_group(group(digit_task(int(background), "turned")), 1)
            writer.sync()
            names = [name for what, name in calls if what == "fsync"]
            assert names[-2:] == ["groups.rank0.jsonl", "trajectories"] and names[-3] == "images"
            assert all(name.endswith(".png") for name in names[:-3]) and len(names) > 3
            calls.clear()
            writer.sync()
            assert [name for _, name in calls] == ["groups.rank0.jsonl", "trajectories"]
        calls.clear()


def test_disk_lost_rows_of_metrics_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = MetricsLogger(tmp_path)
    for step in range(6):
        file.log_metrics({"loss": 1.0}, step)
    assert file.sync(before=5) == 5
    warn_of_lost_rows([file], {"step": 5, "rows": [5]})
    assert not caplog.records
    lines = file.path.read_text().splitlines(keepends=True)
    file.path.write_text("".join([*lines[:2], lines[4]]))
    with caplog.at_level(logging.WARNING):
        warn_of_lost_rows([MetricsLogger(tmp_path)], {"step": 5, "rows": [5]})
    assert "3 rows" in caplog.text and "of iterations 2-3, 5" in caplog.text


def test_disk_lost_trajectories_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with TrajectoryWriter(tmp_path) as writer:
        for iteration in range(1, 5):
            writer.write_group(group(digit_task(iteration, "turned")), iteration)
    path = tmp_path / "trajectories" / "groups.rank0.jsonl"
    assert last_groups(path) == (4, 1)
    stored = {path.name: [4, 1], "groups.rank1.jsonl": [2, 3]}
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:2]) + lines[2][:100])
    with caplog.at_level(logging.WARNING):
        warn_of_lost_groups(tmp_path, stored)
    assert "rank0.jsonl: trajectories of iterations 3-4" in caplog.text
    assert "rank1.jsonl: trajectories of iterations 1-2" in caplog.text
    caplog.clear()
    warn_of_lost_groups(tmp_path, {path.name: [2, 1]})
    assert not caplog.records


def test_disk_image_that_was_removed_is_written_again_and_temporaries_go(tmp_path: Path) -> None:
    task = digit_task(3, "turned")
    images = tmp_path / "images"
    images.mkdir()
    for name in ("aa.png.77.0.tmp", "bb.png.77.1.tmp", "cc.png.77.2.tmp"):
        (images / name).write_bytes(b"half")
    os.utime(images / "cc.png.77.2.tmp", (1.0, 1.0))
    with TrajectoryWriter(tmp_path, rank=0) as writer:
        left = sorted(path.name for path in images.iterdir())
        assert left == ["bb.png.77.1.tmp"], "that of another rank, which may be writing it"
        writer.write_group(group(task), 1)
        stored = sorted(images.glob("*.png"))
        for path in stored:
            path.unlink()
        writer.write_group(group(task), 2)
        assert sorted(images.glob("*.png")) == stored
    Image.open(stored[0]).load()


def test_disk_full_of_a_log_is_silent(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    handler = log_to(Path("/dev/full"))
    try:
        logging.getLogger("cv_lightning").error("what stopped the run")
    finally:
        logging.getLogger().removeHandler(handler)
        handler.close()
    assert "Traceback" not in capsys.readouterr().err


def test_disk_errors_are_one_line_and_others_stay_errors() -> None:
    assert describe_disk_error(OSError(errno.ENOSPC, "No space left on device", "/a/b")).startswith(
        "/a/b: No space left"
    )
    assert describe_disk_error(OSError(errno.ENOENT, "No such file", "/a/b")) == ""
    assert describe_disk_error(ValueError("x")) == ""
