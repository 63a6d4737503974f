"""The system calls that a sealed child may make, each limited by its arguments; anything else fails with EPERM.

The list names what is allowed, so a new command or flag of a known system call is denied until it is added here. The
reason for every entry is in the table of docs/sandbox.md; `test_every_allowed_system_call_is_documented` compares them.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os

PR_SET_SECCOMP = 22
UNCHECKED = (
    "read write readv writev pread64 pwrite64 lseek ftruncate close dup poll ppoll select pselect6 getdents64 fstat "
    "newfstatat stat lstat statx readlink readlinkat access faccessat faccessat2 munmap mprotect brk rt_sigaction "
    "rt_sigprocmask rt_sigreturn sigaltstack exit exit_group restart_syscall getpid getppid gettid getuid geteuid "
    "getgid getegid getrandom gettimeofday time times sched_yield getcpu getrusage getrlimit getcwd uname sysinfo"
).split()
"""Harmless whatever their arguments: they act on this process, on descriptors that it has, or read a path's state."""
WAITING = ("recvmsg",)
"""A child is sealed before it gets a job. Its socket is closed when model code starts, and it can make no other."""

_FCNTL = (fcntl.F_DUPFD, fcntl.F_GETFD, fcntl.F_SETFD, fcntl.F_GETFL, fcntl.F_DUPFD_CLOEXEC, 1034)  # F_GET_SEALS
_MADVISE = (0, 1, 2, 3, 4, 8, 14, 15)
"""NORMAL, RANDOM, SEQUENTIAL, WILLNEED, DONTNEED, FREE, HUGEPAGE, NOHUGEPAGE."""
_MAP_HUGETLB = 0x40000
_MREMAP_DONTUNMAP = 4
_FUTEX_PRIVATE, _FUTEX_REALTIME = 128, 256
_FUTEX = tuple(op | _FUTEX_PRIVATE for op in (0, 1, 3, 4, 5, 9, 10)) + tuple(
    op | _FUTEX_PRIVATE | _FUTEX_REALTIME for op in (0, 9)
)
"""WAIT, WAKE, REQUEUE, CMP_REQUEUE, WAKE_OP, WAIT_BITSET, WAKE_BITSET, all private: none reaches another process."""
_ARCH_PRCTL = (0x1021, 0x1022, 0x1023)
"""Queries and requests for wide registers (AMX), which linear algebra libraries use."""
_LAST_CLOCK = 11
"""CLOCK_TAI. Numbers above it, as the kernel reads them, name the clock of any process or descriptor."""
_O_PATH, _O_TMPFILE, _O_ASYNC = 0o10000000, 0o20000000, 0o20000
_OPEN_DENIED = os.O_ACCMODE | os.O_CREAT | os.O_EXCL | os.O_TRUNC | _O_TMPFILE | _O_PATH | _O_ASYNC | os.O_DIRECT
"""Files can be opened for reading only. Landlock does not cover O_PATH."""

_libc = ctypes.CDLL(None, use_errno=True)


class _Program(ctypes.Structure):
    _fields_ = (("len", ctypes.c_ushort), ("filter", ctypes.c_void_p))


class SeccompFilter:
    """A compiled allow-list. Built once, installed in every child by one call.

    Args:
        allow_open: False where Landlock does not guard the file system; then nothing can be opened at all.
    """

    def __init__(self, *, allow_open: bool) -> None:
        import pyseccomp

        self._rules = pyseccomp.SyscallFilter(defaction=pyseccomp.ERRNO(errno.EPERM))
        for name in (*UNCHECKED, *WAITING):
            self._allow(name)
        self._allow_checked()
        if allow_open:
            self._allow("open", pyseccomp.Arg(1, pyseccomp.MASKED_EQ, _OPEN_DENIED, 0))
            self._allow("openat", pyseccomp.Arg(2, pyseccomp.MASKED_EQ, _OPEN_DENIED, 0))
        # Libraries ask whether a descriptor is a terminal; ENOTTY is the answer for "no".
        self._rules.add_rule(pyseccomp.ERRNO(errno.ENOTTY), "ioctl")
        # glibc falls back from clone3 to clone only on ENOSYS.
        self._rules.add_rule(pyseccomp.ERRNO(errno.ENOSYS), "clone3")
        with os.fdopen(os.memfd_create("filter"), "w+b") as file:
            self._rules.export_bpf(file)
            file.seek(0)
            code = file.read()
        self._code = ctypes.create_string_buffer(code, len(code))
        self._program = _Program(len(code) // 8, ctypes.addressof(self._code))

    def _allow(self, name: str, *conditions: object) -> None:
        """Allow a system call where all conditions hold; another rule for the same call allows more."""
        import pyseccomp

        try:
            self._rules.add_rule(pyseccomp.ALLOW, name, *conditions)
        except (OSError, ValueError, RuntimeError):  # the name does not exist on this architecture
            return

    def _allow_checked(self) -> None:
        """The system calls of which only some commands, flags or targets are allowed."""
        from pyseccomp import EQ, LE, MASKED_EQ, Arg

        one_of = {
            "fcntl": (1, _FCNTL),
            "madvise": (2, _MADVISE),
            "futex": (1, _FUTEX),
            "arch_prctl": (0, _ARCH_PRCTL),
            "sched_getaffinity": (0, (0,)),
        }
        for name, (position, values) in one_of.items():
            for value in values:
                self._allow(name, Arg(position, EQ, value))
        for name in ("clock_gettime", "clock_getres", "clock_nanosleep"):
            self._allow(name, Arg(0, LE, _LAST_CLOCK))
        self._allow("nanosleep")
        self._allow("mmap", Arg(3, MASKED_EQ, _MAP_HUGETLB, 0))
        self._allow("mremap", Arg(3, MASKED_EQ, _MREMAP_DONTUNMAP, 0))
        # Limits of this process may be read, and none may be set.
        self._allow("prlimit64", Arg(0, EQ, 0), Arg(2, EQ, 0))

    def install(self) -> bool:
        """Seal this process; needs NO_NEW_PRIVS or CAP_SYS_ADMIN."""
        return bool(_libc.prctl(PR_SET_SECCOMP, 2, ctypes.byref(self._program), 0, 0) == 0)


def build_filter(enabled: bool, *, allow_open: bool) -> tuple[SeccompFilter | None, str]:
    """The filter and its report."""
    if not enabled:
        return None, "off"
    try:
        return SeccompFilter(allow_open=allow_open), "active" if allow_open else "active (open denied)"
    except (ImportError, OSError, RuntimeError) as error:
        return None, f"unavailable ({error})"
