"""Which paths are granted, and which system calls; without processes."""

from __future__ import annotations

import re
import sys
import sysconfig
from pathlib import Path

import pytest

from cv_lightning.sandbox import layers, server, syscalls
from cv_lightning.sandbox.private_root import is_within

DOCS = Path(__file__).resolve().parents[2] / "docs/sandbox.md"


def make(root: Path, *files: str) -> None:
    for name in files:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("x")


@pytest.fixture
def prefix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An interpreter's prefix as the running one, with a standard library and packages."""
    root = tmp_path / "opt/py"
    make(root, "lib/python3/os.py", "lib/python3/site-packages/numpy/a.py", "lib/libz.so.1", "src/app/.env")
    make(root, "lib/data/answers", "lib/python3/project/run/log", "lib/python3/email/a.py")
    make(tmp_path, "opt/py-project/.env")
    monkeypatch.setattr(sys, "base_prefix", str(root))
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(root / "lib/python3"))
    entries = [root / "src/app", tmp_path / "opt/py-project", root / "lib/python3", root / "lib/python3/site-packages"]
    monkeypatch.setattr(sys, "path", list(map(str, entries)))
    return root


def readable(path: Path, private: list[str]) -> bool:
    return any(is_within(str(path), granted) for granted in layers.readable_paths(private))


def test_libraries_are_granted_and_projects_below_or_beside_the_prefix_are_not(prefix: Path) -> None:
    for name in ("lib/python3/os.py", "lib/python3/site-packages/numpy/a.py", "lib/libz.so.1"):
        assert readable(prefix / name, []), name
    for name in ("src/app/.env", "lib/data/answers", "../py-project/.env"):
        assert not readable((prefix / name).resolve(), []), name


def test_a_project_inside_a_library_folder_is_cut_out_and_its_neighbours_are_not(prefix: Path) -> None:
    private = [str(prefix / "lib/python3/project")]
    assert readable(prefix / "lib/python3/project/run/log", [])
    assert not readable(prefix / "lib/python3/project/run/log", private)
    for name in ("os.py", "email/a.py", "site-packages/numpy/a.py"):
        assert readable(prefix / "lib/python3" / name, private), name


def test_a_working_folder_above_the_libraries_does_not_close_them(prefix: Path) -> None:
    assert readable(prefix / "lib/python3/os.py", ["/", str(prefix), str(prefix / "lib/python3")])


def test_a_link_out_of_a_library_folder_grants_nothing_when_the_folder_is_split(prefix: Path) -> None:
    (prefix / "lib/python3/link").symlink_to(prefix / "src/app")
    granted = layers.readable_paths([str(prefix / "lib/python3/project")])
    assert not any(Path(path).name == "link" or path == str(prefix / "src/app") for path in granted)


def test_private_folders_are_the_repository_the_working_folder_and_projects(
    prefix: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(prefix / "src")
    private = server.private_folders()
    assert {str(prefix / "src"), str(prefix / "src/app"), str(prefix.parent / "py-project")} < set(private)
    assert str(DOCS.parents[1]) in private and not any("site-packages" in path for path in private)


def test_every_allowed_system_call_is_documented() -> None:
    section = DOCS.read_text(encoding="utf-8").partition("## System calls")[2].partition("\n## ")[0]
    told = set(
        re.findall(r"`([a-z0-9_]+)`", " ".join(line.split("|")[1] for line in section.splitlines() if "|" in line))
    )
    checked = {"fcntl", "madvise", "futex", "arch_prctl", "sched_getaffinity", "clock_gettime", "clock_getres"}
    checked |= {"clock_nanosleep", "nanosleep", "mmap", "mremap", "prlimit64", "open", "openat", "ioctl", "clone3"}
    assert told == {*syscalls.UNCHECKED, *syscalls.WAITING, *checked}
