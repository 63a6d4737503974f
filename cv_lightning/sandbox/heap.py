"""Puts the top of the heap where a child's pictures get huge pages.

A fresh child touches every page of its pictures for the first time, and a fault costs microseconds, more so in a
virtual machine. glibc asks for huge pages where it grows the heap (`TUNABLES`), but the kernel gives one only for a
whole, untouched block of 2 MB. So the fork server, when all is loaded, moves the heap's top to the start of such
blocks, and keeps a small free piece below for its own needs, for what it touches there every child would have to copy.
"""

from __future__ import annotations

import ctypes

TUNABLES = (
    "glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=1073741824:"
    "glibc.malloc.trim_threshold=4294967296:glibc.malloc.top_pad=16777216"
)
"""Large blocks from the heap, in huge pages, and never given back: a child lives for milliseconds."""
HUGE_PAGE = 2 << 20
RESERVED = 64 << 20
"""Address space, not memory: nothing of it is touched here."""
OWN_PIECE = 256 << 10
HOLE = 64 << 10
"""Smaller holes in the heap are left for small things."""


def align_top() -> None:
    """Let the next large allocation start at a boundary of `HUGE_PAGE`; without effect where malloc is not glibc's."""
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "malloc_trim"):
        return
    libc.malloc.restype = ctypes.c_void_p
    libc.malloc.argtypes = [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    libc.malloc_trim(0)
    own = libc.malloc(OWN_PIECE)
    block = libc.malloc(RESERVED)
    if not own or not block:
        return
    ctypes.memset(own, 0, OWN_PIECE)
    libc.free(block)
    boundary = block + -block % HUGE_PAGE
    # Holes further down would be filled first, in small pages. They stay taken; their memory was given back above.
    for _ in range(RESERVED // HOLE):
        hole = libc.malloc(HOLE)
        if not hole or hole >= block:
            libc.free(hole)
            break
    libc.malloc(max(1, boundary - block - 64))
    libc.free(own)
