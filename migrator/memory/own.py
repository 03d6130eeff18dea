"""Addresses in this process."""

import ctypes
import mmap


def address_of(memory: mmap.mmap) -> int:
    """Where a writable mapping of this process is."""
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))
