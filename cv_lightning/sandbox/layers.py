"""Isolation layers, each reporting `active`, `unavailable (why)` or `off`.

Order matters: libraries look for shared objects before Landlock closes the file system, and seccomp comes last,
in the child, because it denies what the earlier layers need.
"""

from __future__ import annotations

import ctypes
import errno
import os
import resource
import struct
import sys
from collections.abc import Sequence

SANDBOX_UID = 59_871
"""Dedicated user id of the children where the fork server starts as root."""
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS = 1, 4, 22, 24, 38
ALLOWED_SYSCALLS = (
    "read write readv writev pread64 pwrite64 lseek mmap munmap mremap mprotect madvise brk close fstat "
    "newfstatat stat lstat statx readlink readlinkat access faccessat faccessat2 fcntl dup futex rt_sigaction "
    "rt_sigprocmask rt_sigreturn sigaltstack exit exit_group getpid getppid gettid getuid geteuid getgid getegid "
    "getrandom clock_gettime clock_getres clock_nanosleep nanosleep gettimeofday time sched_yield "
    "sched_getaffinity getrusage getcwd uname sysinfo restart_syscall poll ppoll select pselect6 set_robust_list "
    "rseq times membarrier mincore getrlimit getcpu arch_prctl fadvise64 ftruncate getdents64"
).split()
OPENING_SYSCALLS = ("open", "openat")
WAITING_SYSCALLS = ("recvmsg",)
"""A child is sealed before it gets a job. Its socket is closed when model code starts, and it can make no other."""
WORKER_SYSCALLS = ("sendto",)
"""What a warm worker, in which no model code runs, needs on top for its one socket."""

_libc = ctypes.CDLL(None, use_errno=True)


def prctl(option: int, value: int = 0, pointer: object = 0) -> int:
    """One call of the system; -1 on failure."""
    return int(_libc.prctl(option, value, pointer, 0, 0))


# ------------------------------------------------------------------------------------------------ privileges
def _reachable_by(uid: int, path: str) -> bool:
    """True if every folder above `path` may be entered by a user that owns none of them."""
    path = os.path.realpath(path)
    while path != "/":
        state = os.stat(path)
        if state.st_uid != uid and not state.st_mode & 0o001:
            return False
        path = os.path.dirname(path)
    return True


def drop_privileges(enabled: bool) -> str:
    """As root become the sandbox's user; where that one cannot reach the interpreter, drop all capabilities."""
    if os.geteuid() != 0:
        return f"active (uid {os.geteuid()}, not root)"
    if not enabled:
        return "off"
    if all(_reachable_by(SANDBOX_UID, path) for path in {sys.base_prefix, sys.prefix}):
        os.setgroups([])
        os.setresgid(SANDBOX_UID, SANDBOX_UID, SANDBOX_UID)
        os.setresuid(SANDBOX_UID, SANDBOX_UID, SANDBOX_UID)
        return f"active (uid {SANDBOX_UID})"
    for capability in range(64):
        prctl(PR_CAPBSET_DROP, capability)
    header = struct.pack("<Ii", 0x20080522, 0)
    if _libc.capset(header, struct.pack("<6I", 0, 0, 0, 0, 0, 0)) != 0:
        return f"unavailable (capset: {os.strerror(ctypes.get_errno())})"
    return f"active (no capabilities; {sys.base_prefix} is closed to other users)"


def enter_namespaces(enabled: bool) -> str:
    """New user, network and IPC namespaces, if asked for and allowed."""
    if not enabled:
        return "off"
    if _libc.unshare(0x10000000 | 0x40000000 | 0x08000000) != 0:
        return f"unavailable ({os.strerror(ctypes.get_errno())})"
    return "active"


# ------------------------------------------------------------------------------------------------ file system
def readable_folders() -> list[str]:
    """What imports need: the standard library, packages, shared objects, fonts. Never the project's data."""
    packages = [path for path in sys.path if path.startswith("/") and path.endswith(("site-packages", "dist-packages"))]
    standard = [path for path in sys.path if path.startswith(sys.base_prefix) and os.path.isdir(path)]
    system = ["/usr/lib", "/lib", "/lib64", "/usr/share/fonts", "/usr/share/zoneinfo"]
    fixed = [os.path.join(sys.base_prefix, "lib"), *system]
    return sorted({os.path.realpath(path) for path in [*packages, *standard, *fixed] if os.path.isdir(path)})


def restrict_files(enabled: bool) -> str:
    """Landlock: read-only libraries, no TCP, signals and abstract sockets only inside; forever, for this process."""
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
            for path in readable_folders():
                ruleset.allow_path(path, read)
            if os.path.exists("/dev/urandom"):
                ruleset.allow_path("/dev/urandom", landlockpy.AccessFS.READ_FILE)
            ruleset.restrict()
    except (OSError, landlockpy.LandlockError) as error:
        return f"unavailable ({error})"
    return f"active (ABI {abi})"


# ------------------------------------------------------------------------------------------------ system calls
class _Program(ctypes.Structure):
    _fields_ = (("len", ctypes.c_ushort), ("filter", ctypes.c_void_p))


class SeccompFilter:
    """A compiled allow-list; what is not on it fails with EPERM. Built once, installed in every child by one call."""

    def __init__(self, *, allow_open: bool, extra: Sequence[str] = ()) -> None:
        import pyseccomp

        rules = pyseccomp.SyscallFilter(defaction=pyseccomp.ERRNO(errno.EPERM))
        names = [*ALLOWED_SYSCALLS, *WAITING_SYSCALLS, *extra, *(OPENING_SYSCALLS if allow_open else ())]
        for name in names:
            try:
                rules.add_rule(pyseccomp.ALLOW, name)
            except (OSError, ValueError, RuntimeError):  # the name does not exist on this architecture
                continue
        rules.add_rule(pyseccomp.ERRNO(errno.ENOTTY), "ioctl")
        # glibc falls back from clone3 to clone only on ENOSYS.
        rules.add_rule(pyseccomp.ERRNO(errno.ENOSYS), "clone3")
        rules.add_rule(pyseccomp.ALLOW, "prlimit64", pyseccomp.Arg(2, pyseccomp.EQ, 0))
        with os.fdopen(os.memfd_create("filter"), "w+b") as file:
            rules.export_bpf(file)
            file.seek(0)
            code = file.read()
        self._code = ctypes.create_string_buffer(code, len(code))
        self._program = _Program(len(code) // 8, ctypes.addressof(self._code))

    def install(self) -> bool:
        """Seal this process; needs NO_NEW_PRIVS or CAP_SYS_ADMIN."""
        return prctl(PR_SET_SECCOMP, 2, ctypes.byref(self._program)) == 0


def build_filter(enabled: bool, *, allow_open: bool, extra: Sequence[str] = ()) -> tuple[SeccompFilter | None, str]:
    """The filter (with `extra` system calls allowed) and its report."""
    if not enabled:
        return None, "off"
    try:
        return SeccompFilter(allow_open=allow_open, extra=extra), "active" if allow_open else "active (open denied)"
    except (ImportError, OSError, RuntimeError) as error:
        return None, f"unavailable ({error})"


# ------------------------------------------------------------------------------------------------ resources
def limit_resources(*, memory_bytes: int, library_bytes: int, cpu_s: int | None, file_bytes: int) -> None:
    """Hard limits on a child: memory, CPU time, file size (also that of a memfd), open files, no core, no processes."""
    limits = {
        resource.RLIMIT_AS: library_bytes + memory_bytes,
        resource.RLIMIT_DATA: memory_bytes + library_bytes // 4,
        resource.RLIMIT_CPU: resource.RLIM_INFINITY if cpu_s is None else cpu_s,
        resource.RLIMIT_FSIZE: file_bytes,
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_NPROC: 0,
        resource.RLIMIT_MEMLOCK: 0,
    }
    for kind, value in limits.items():
        resource.setrlimit(kind, (value, value))


def virtual_bytes() -> int:
    """Size of this process's address space in bytes."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[0]) * resource.getpagesize()
