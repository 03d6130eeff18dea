"""The page store: a folder on tmpfs, a sparse file for each process, in which the offset is the virtual address."""

import contextlib
import ctypes
import os
from pathlib import Path

PAGE_BYTES = os.sysconf("SC_PAGESIZE")
ADDRESS_END = 1 << 48
"""Above every address that a process can have: 47 bits on x86-64, 48 on arm64."""

_KEEP_SIZE, _PUNCH_HOLE = 1, 2
_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long]


def path_of(store: Path, pid: int) -> Path:
    """The file of a process; `pid` is that in the container's own pid namespace."""
    return store / f"mem-{pid}"


def give_back(descriptor: int, start: int, end: int) -> None:
    """Free what is held between two offsets: a hole from then on."""
    if _libc.fallocate(descriptor, _PUNCH_HOLE | _KEEP_SIZE, start, end - start):
        code = ctypes.get_errno()
        raise OSError(code, f"fallocate: {os.strerror(code)}", f"page store, {start:x}-{end:x}")


def all_held_bytes(store: Path) -> int:
    """How much memory the whole store takes."""
    total = 0
    for entry in os.scandir(store):
        # A file goes when its process has all of it.
        with contextlib.suppress(FileNotFoundError):
            total += entry.stat().st_blocks * 512
    return total
