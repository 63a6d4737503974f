"""Gives a fork server a root of its own: library folders, read-only, and no other path of the host.

Landlock denies reading, but not `stat` and `readlink`; in a private root other paths do not exist. Making one needs
CAP_SYS_ADMIN or permission to make a user namespace, which many containers deny. It is therefore an additional layer;
where it cannot be made, Landlock is used alone.
"""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Sequence
from pathlib import Path

_CLONE_NEWNS, _CLONE_NEWUSER = 0x00020000, 0x10000000
_MS_RDONLY, _MS_NOSUID, _MS_NODEV, _MS_REMOUNT, _MS_BIND, _MS_REC, _MS_PRIVATE = 1, 2, 4, 32, 4096, 16384, 1 << 18
_MNT_DETACH = 2
_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
_STAGES = ("/mnt", "/media", "/srv", "/tmp", "/run", "/opt", "/home", "/var")
"""Folders over which the new root may be mounted while it is built, visible to this process only."""

_libc = ctypes.CDLL(None, use_errno=True)


def enter(paths: Sequence[str], *, aliases: Sequence[str] = (), devices: Sequence[str] = ()) -> str:
    """Replace the root of this process by one that contains only `paths`, read-only. The process must have one thread.

    Args:
        paths: Folders and files, absolute, without symbolic links.
        aliases: Further absolute paths that lead to one of `paths` by symbolic links.
        devices: Device files.

    Returns:
        The report of the layer: `active (..)` or `unavailable (why)`.
    """
    number = _PIVOT_ROOT.get(platform.machine())
    if number is None:
        return f"unavailable (pivot_root on {platform.machine()})"
    try:
        how = _own_mounts()
        stage = _stage(paths)
        _check("mount a new root", _libc.mount(b"none", stage.encode(), b"tmpfs", _MS_NOSUID, b"mode=755,size=1m"))
        for path in (*_outermost(paths), *devices):
            _bind(path, stage, read_only=path not in devices)
        _add_links(stage, aliases)
        os.chdir(stage)
        _check("pivot_root", _libc.syscall(number, b".", b"."))
        _check("leave the old root", _libc.umount2(b".", _MNT_DETACH))
        os.chdir("/")
        _check(
            "seal the root", _libc.mount(b"none", b"/", None, _MS_REMOUNT | _MS_BIND | _MS_RDONLY | _MS_NOSUID, None)
        )
    except OSError as error:
        return f"unavailable ({error})"
    return f"active ({how})"


def _check(what: str, status: int) -> None:
    if status != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")


def _own_mounts() -> str:
    """Enter a private mount namespace, in a user namespace if this process is not privileged; returns which."""
    how = "mount namespace"
    if _libc.unshare(_CLONE_NEWNS) != 0:
        user, group = os.geteuid(), os.getegid()
        _check("unshare", _libc.unshare(_CLONE_NEWNS | _CLONE_NEWUSER))
        Path("/proc/self/setgroups").write_text("deny", encoding="ascii")
        Path("/proc/self/uid_map").write_text(f"{user} {user} 1", encoding="ascii")
        Path("/proc/self/gid_map").write_text(f"{group} {group} 1", encoding="ascii")
        how = "user and mount namespace"
    _check("make mounts private", _libc.mount(b"none", b"/", None, _MS_REC | _MS_PRIVATE, None))
    return how


def _stage(paths: Sequence[str]) -> str:
    for folder in _STAGES:
        if (
            os.path.realpath(folder) == folder
            and os.path.isdir(folder)
            and not any(is_within(p, folder) for p in paths)
        ):
            return folder
    raise OSError("no folder to build it in")


def is_within(path: str, folder: str) -> bool:
    """True if `path` is `folder` or lies in it."""
    return path == folder or path.startswith(folder.rstrip("/") + "/")


def _outermost(paths: Sequence[str]) -> list[str]:
    """The paths that do not lie within another one."""
    kept: list[str] = []
    for path in sorted(set(paths)):
        if not any(is_within(path, other) for other in kept):
            kept.append(path)
    return kept


def _bind(path: str, stage: str, *, read_only: bool) -> None:
    target = stage + path
    if os.path.isdir(path):
        os.makedirs(target, 0o755, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(target), 0o755, exist_ok=True)
        Path(target).touch()
    _check(f"bind {path}", _libc.mount(path.encode(), target.encode(), None, _MS_BIND | _MS_REC, None))
    if read_only:
        # Fails if the host's mount has flags that a user namespace may not clear; Landlock denies writing anyway.
        flags = _MS_REMOUNT | _MS_BIND | _MS_RDONLY | _MS_NOSUID | _MS_NODEV
        _libc.mount(b"none", target.encode(), None, flags, None)


def _add_links(stage: str, aliases: Sequence[str]) -> None:
    """Copy the links whose targets are in the new root: `/lib` to `usr/lib`, and those of `aliases`."""
    top = [(entry.path, os.readlink(entry.path)) for entry in os.scandir("/") if entry.is_symlink()]
    for link, goal in (*top, *((alias, os.path.realpath(alias)) for alias in aliases)):
        target = stage + link
        there = os.path.lexists(stage + os.path.join(os.path.dirname(link), goal))
        if there and not os.path.lexists(target):
            os.makedirs(os.path.dirname(target), 0o755, exist_ok=True)
            os.symlink(goal, target)
