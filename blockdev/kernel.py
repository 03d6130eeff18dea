"""System calls that Python does not have: mount(2), umount2(2), syncfs(2). Errors name the call and the object."""

import ctypes
import os
from pathlib import Path

_libc = ctypes.CDLL(None, use_errno=True)


def mount(source: Path | str, target: Path, kind: str, flags: int = 0, data: str = "") -> None:
    """mount(2)."""
    arguments = (os.fsencode(source), os.fsencode(target), kind.encode(), ctypes.c_ulong(flags), data.encode())
    _check(_libc.mount(*arguments), "mount", f"{source} at {target}")


def umount(target: Path, flags: int = 0) -> None:
    """umount2(2)."""
    _check(_libc.umount2(os.fsencode(target), flags), "umount2", str(target))


def syncfs(descriptor: int, name: str) -> None:
    """syncfs(2): write out everything dirty of the file system that the descriptor is on."""
    _check(_libc.syncfs(descriptor), "syncfs", name)


def _check(result: int, call: str, what: str) -> None:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{call}: {os.strerror(number)}", what)
