"""Answering on a userfaultfd for missing pages: one function for each request (ioctl_userfaultfd(2), Linux 4.14)."""

import ctypes
import enum
import errno
import mmap
import os
import struct
from typing import NamedTuple

MESSAGE_BYTES = 32

_COPY, _ZEROPAGE, _WAKE, _WRITEPROTECT = 0xC028AA03, 0xC020AA04, 0x8010AA02, 0xC018AA06
_MESSAGE = struct.Struct("=B7x3Q")
_libc = ctypes.CDLL(None, use_errno=True)


class Event(enum.IntEnum):
    """What a message tells."""

    FAULT = 0x12
    FORK = 0x13
    REMAP = 0x14
    REMOVE = 0x15
    UNMAP = 0x16


class Message(NamedTuple):
    """The numbers by event. FAULT: flags, address. FORK: the child's descriptor, in the process that read the message.
    REMAP: from, to, length. REMOVE, UNMAP: start, end."""

    event: Event
    first: int
    second: int
    third: int


class Outcome(enum.Enum):
    """Why a request stopped where it did."""

    DONE = enum.auto()
    PRESENT = enum.auto()  # the page there is mapped already
    CHANGING = enum.auto()  # the process changes its mappings: read its events, then ask again
    UNMAPPED = enum.auto()  # the range is not within one mapping that is registered
    GONE = enum.auto()  # the process has ended, or called exec
    NO_MEMORY = enum.auto()


_OUTCOMES = {
    errno.EEXIST: Outcome.PRESENT,
    errno.EAGAIN: Outcome.CHANGING,
    errno.ENOENT: Outcome.UNMAPPED,
    errno.EINVAL: Outcome.UNMAPPED,
    errno.ESRCH: Outcome.GONE,
    errno.ENOSPC: Outcome.GONE,  # before Linux 4.13
    errno.ENOMEM: Outcome.NO_MEMORY,
}


class _Copy(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64) for name in ("to", "source", "length", "mode")] + [("copied", ctypes.c_int64)]


class _ZeroPage(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64) for name in ("start", "length", "mode")] + [("zeroed", ctypes.c_int64)]


class _WriteProtect(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64) for name in ("start", "length", "mode")]


class _Range(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64) for name in ("start", "length")]


def parse(data: bytes) -> Message | None:
    """One message of 32 bytes; None where there is none. Raises ValueError for one that this kernel should not send."""
    event, *numbers = _MESSAGE.unpack(data)
    if event == 0:
        return None
    if event == Event.FORK:
        numbers[0] &= 0xFFFFFFFF
    return Message(Event(event), *numbers)


def copy(descriptor: int, address: int, source: int, length: int) -> tuple[int, Outcome]:
    """Map pages with what is at `source` here, and wake who waits for them. Gives bytes done, and why no more."""
    request = _Copy(address, source, length, 0, 0)
    if _libc.ioctl(descriptor, _COPY, ctypes.byref(request)) == 0:
        return length, Outcome.DONE
    return _failed("UFFDIO_COPY", request.copied, address, length)


def zero(descriptor: int, address: int, length: int) -> tuple[int, Outcome]:
    """Map the page of zeros and wake who waits for it. Gives bytes done, and why no more."""
    request = _ZeroPage(address, length, 0, 0)
    if _libc.ioctl(descriptor, _ZEROPAGE, ctypes.byref(request)) == 0:
        return length, Outcome.DONE
    return _failed("UFFDIO_ZEROPAGE", request.zeroed, address, length)


def wake(descriptor: int, start: int, length: int) -> None:
    """Let threads that wait for pages in a range try again. Nothing is done where nothing waits."""
    if _libc.ioctl(descriptor, _WAKE, ctypes.byref(_Range(start, length))):
        code = ctypes.get_errno()
        raise OSError(code, f"UFFDIO_WAKE: {os.strerror(code)}", f"{start:x}-{start + length:x}")


def is_gone(descriptor: int, address: int) -> bool:
    """Whether the process has ended, or called exec: no message says so. `address` is of a page that is registered.

    By a request that does nothing there (UFFDIO_WRITEPROTECT, Linux 5.7), since its memory is looked for first.
    """
    request = _WriteProtect(address, mmap.PAGESIZE, 0)
    return _libc.ioctl(descriptor, _WRITEPROTECT, ctypes.byref(request)) != 0 and ctypes.get_errno() == errno.ESRCH


def _failed(call: str, done: int, address: int, length: int) -> tuple[int, Outcome]:
    code = ctypes.get_errno()
    # Stopped on the way, EAGAIN stands for whatever stopped it: the next request for the rest tells.
    if code == errno.EAGAIN and done > 0:
        return done, Outcome.DONE
    if code not in _OUTCOMES:
        raise OSError(code, f"{call}: {os.strerror(code)}", f"{address:x}-{address + length:x}")
    return 0, _OUTCOMES[code]
