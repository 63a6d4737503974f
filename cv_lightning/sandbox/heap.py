"""Moves the top of the heap to where a child's images get huge pages.

A fresh child touches every page of its images for the first time, and each fault costs microseconds, more in a virtual
machine. glibc requests huge pages where it grows the heap (`TUNABLES`), but the kernel gives one only for a whole,
untouched block of 2 MB. The fork server, once all is loaded, therefore moves the top of the heap to the start of such
a block. It keeps a small free piece below for itself, because children have to copy the pages that it touches.
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
"""Address space, not memory: it is not touched here."""
OWN_PIECE = 256 << 10
HOLE = 64 << 10
"""Smaller holes in the heap are left for small things."""


def align_top() -> None:
    """Let the next large allocation start at a multiple of `HUGE_PAGE`; does nothing if malloc is not glibc's."""
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
    # Holes further down would be filled first, in small pages. They stay allocated; their memory was freed above.
    for _ in range(RESERVED // HOLE):
        hole = libc.malloc(HOLE)
        if not hole or hole >= block:
            libc.free(hole)
            break
    libc.malloc(max(1, boundary - block - 64))
    libc.free(own)
