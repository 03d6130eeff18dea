"""The C library's allocator (mallopt(3), malloc_trim(3)), set for a process that passes on pieces of a megabyte.

By itself it maps each of them anew, which costs more than to copy it, and keeps eight heaps for each processor, each as
large as it ever was.
"""

import ctypes

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8
_ARENAS = 2
_LARGEST_IN_A_HEAP_BYTES = 32 << 20
_KEPT_BYTES = 64 << 20

_libc = ctypes.CDLL(None)


def set_up() -> None:
    """Before there are other threads. Another C library than glibc may not know these, and works without."""
    if hasattr(_libc, "mallopt"):
        _libc.mallopt(_ARENA_MAX, _ARENAS)
        _libc.mallopt(_MMAP_THRESHOLD, _LARGEST_IN_A_HEAP_BYTES)
        _libc.mallopt(_TRIM_THRESHOLD, _KEPT_BYTES)


def give_back() -> None:
    """What is free, to the kernel."""
    if hasattr(_libc, "malloc_trim"):
        _libc.malloc_trim(0)
