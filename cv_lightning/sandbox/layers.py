"""Isolation layers; each reports `active`, `unavailable (why)` or `off`.

Their order matters: libraries look for shared objects before Landlock closes the file system, and seccomp comes last,
in the child, because it denies what the earlier layers need.
"""

from __future__ import annotations

import ctypes
import glob
import os
import resource
import struct
import sys
import sysconfig
from collections.abc import Sequence

from cv_lightning.sandbox.private_root import is_within

SANDBOX_UID = 59_871
"""Dedicated user id of the children where the fork server starts as root."""
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS = 1, 4, 24, 38
DEVICES = ("/dev/urandom",)

_libc = ctypes.CDLL(None, use_errno=True)


def prctl(option: int, value: int = 0, pointer: object = 0) -> int:
    """The system call of that name; -1 on failure."""
    return int(_libc.prctl(option, value, pointer, 0, 0))


# ------------------------------------------------------------------------------------------------ privileges
def _usable_by(uid: int, path: str) -> bool:
    """True if a user without files of its own may enter every folder above `path` and read it."""
    path = os.path.realpath(path)
    readable = bool(os.stat(path).st_mode & 0o004)
    while path != "/":
        path = os.path.dirname(path)
        state = os.stat(path)
        if state.st_uid != uid and not state.st_mode & 0o001:
            return False
    return readable


def drop_privileges(enabled: bool) -> str:
    """Change from root to the sandbox's user, or drop all capabilities if that user cannot read the libraries.

    To be called in the private root, in which the path to an interpreter under /root is open.
    """
    if os.geteuid() != 0:
        _drop_capabilities()  # those in a user namespace, if there is one
        return f"active (uid {os.geteuid()}, not root)"
    if not enabled:
        return "off"
    usable = all(_usable_by(SANDBOX_UID, path) for path in (os.__file__, *packages()))
    if usable and _become(SANDBOX_UID):
        return f"active (uid {SANDBOX_UID})"
    if not _drop_capabilities():
        return f"unavailable (capset: {os.strerror(ctypes.get_errno())})"
    why = "the user cannot be changed here" if usable else f"{sys.base_prefix} is closed to other users"
    return f"active (no capabilities; {why})"


def _become(uid: int) -> bool:
    """Change user and groups; False if that is not allowed, as in a user namespace that maps only one user."""
    try:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    except OSError:
        return False
    return True


def _drop_capabilities() -> bool:
    for capability in range(64):
        prctl(PR_CAPBSET_DROP, capability)
    header = struct.pack("<Ii", 0x20080522, 0)
    return bool(_libc.capset(header, struct.pack("<6I", 0, 0, 0, 0, 0, 0)) == 0)


def enter_namespaces(enabled: bool) -> str:
    """New user, network and IPC namespaces, if asked for and allowed."""
    if not enabled:
        return "off"
    if _libc.unshare(0x10000000 | 0x40000000 | 0x08000000) != 0:
        return f"unavailable ({os.strerror(ctypes.get_errno())})"
    return "active"


# ------------------------------------------------------------------------------------------------ file system
def packages() -> list[str]:
    """Folders of installed packages on `sys.path`."""
    return [path for path in sys.path if os.path.basename(path) in ("site-packages", "dist-packages")]


def library_paths() -> list[str]:
    """Paths that imports need, as the interpreter names them: standard library, packages, shared objects, fonts.

    Other entries of `sys.path` and the interpreter's prefix are left out, because a project can lie below them.
    """
    shared = glob.glob(os.path.join(glob.escape(sys.base_prefix), "lib", "*.so*"))
    zipped = [path for path in sys.path if path == os.path.join(sys.base_prefix, "lib", os.path.basename(path))]
    system = ["/usr/lib", "/lib", "/lib64", "/usr/share/fonts", "/usr/share/zoneinfo"]
    paths = [sysconfig.get_path("stdlib"), *packages(), *(path for path in zipped if path.endswith(".zip"))]
    return [path for path in (*paths, *shared, *system) if os.path.exists(path)]


def readable_paths(private: Sequence[str] = ()) -> list[str]:
    """The folders and files that model code may read, as real paths.

    Args:
        private: Folders that must stay closed even inside a library folder: the repository, the working folder. One
            that contains a library folder, or is one, does not close that library folder.
    """
    closed = [os.path.realpath(path) for path in private]
    found = {os.path.realpath(path) for path in library_paths()}
    return sorted({part for path in found for part in _parts(path, closed)})


def _parts(path: str, closed: Sequence[str]) -> list[str]:
    """`path` itself, or, if closed folders lie inside it, its entries without them."""
    inside = [other for other in closed if other != path and is_within(other, path)]
    if not inside:
        return [path]
    # Links are skipped: a target in a library folder is granted by its own path, any other must not be.
    entries = [entry.path for entry in os.scandir(path) if not entry.is_symlink() and entry.path not in inside]
    return [part for entry in entries for part in _parts(entry, inside)]


def restrict_files(enabled: bool, paths: Sequence[str]) -> str:
    """Landlock, until this process ends: only `paths` can be read, no TCP, signals and abstract sockets only inside."""
    if not enabled:
        return "off"
    import landlockpy

    if not landlockpy.supported():
        return "unavailable (kernel without Landlock)"
    read = landlockpy.AccessFS.READ_FILE | landlockpy.AccessFS.READ_DIR
    try:
        abi = landlockpy.abi_version()
        scoped = landlockpy.Scope.SIGNAL | landlockpy.Scope.ABSTRACT_UNIX_SOCKET if abi >= 6 else landlockpy.Scope.NONE
        with landlockpy.Ruleset(scoped=scoped) as ruleset:
            for path in (*paths, *DEVICES):
                if os.path.exists(path):
                    ruleset.allow_path(path, read if os.path.isdir(path) else landlockpy.AccessFS.READ_FILE)
            ruleset.restrict()
    except (OSError, landlockpy.LandlockError) as error:
        return f"unavailable ({error})"
    return f"active (ABI {abi})"


# ------------------------------------------------------------------------------------------------ resources
def limit_resources(*, memory_bytes: int, library_bytes: int, cpu_s: int, file_bytes: int) -> None:
    """Hard limits of a child: memory, CPU time, file size (memfds too), open files, no core dump, no processes."""
    limits = {
        resource.RLIMIT_AS: library_bytes + memory_bytes,
        resource.RLIMIT_DATA: memory_bytes + library_bytes // 4,
        resource.RLIMIT_FSIZE: file_bytes,
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_NPROC: 0,
        resource.RLIMIT_MEMLOCK: 0,
    }
    for kind, value in limits.items():
        resource.setrlimit(kind, (value, value))
    # SIGXCPU ends a snippet at the limit. One that ignores it is killed so much later that the time used proves it.
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_s, 2 * cpu_s + 1))


def virtual_bytes() -> int:
    """Size of this process's address space in bytes."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[0]) * resource.getpagesize()
