"""Requests on a userfaultfd for write protection whose faults the kernel resolves itself (Linux 6.7).

Documented in ioctl_userfaultfd(2) and the kernel's Documentation/admin-guide/mm/userfaultfd.rst.
"""

import ctypes
import fcntl
import os
import struct

_WRITE_PROTECT_SHARED = 1 << 12
_WRITE_PROTECT_UNPOPULATED = 1 << 13
_WRITE_PROTECT_ASYNC = 1 << 15
_FEATURES = _WRITE_PROTECT_SHARED | _WRITE_PROTECT_UNPOPULATED | _WRITE_PROTECT_ASYNC
_API = 0xAA
# _IOWR(0xAA, 0x3F, struct uffdio_api), _IOWR(0xAA, 0x00, struct uffdio_register), _IOR(0xAA, 0x01, struct uffdio_range)
_UFFDIO_API, _UFFDIO_REGISTER, _UFFDIO_UNREGISTER = 0xC018AA3F, 0xC020AA00, 0x8010AA01
_MODE_WRITE_PROTECT = 2
_SYS_USERFAULTFD = {"x86_64": 323, "aarch64": 282}
_USER_MODE_ONLY = 1

_libc = ctypes.CDLL(None, use_errno=True)


def create() -> int:
    """One of this process itself, which the caller closes."""
    number = _SYS_USERFAULTFD[os.uname().machine]
    descriptor = int(_libc.syscall(number, os.O_CLOEXEC | os.O_NONBLOCK | _USER_MODE_ONLY))
    if descriptor < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"userfaultfd: {os.strerror(code)}")
    return descriptor


def agree(descriptor: int) -> None:
    """The handshake. Raises OSError EINVAL on a kernel without asynchronous write protection."""
    request = bytearray(struct.pack("3Q", _API, _FEATURES, 0))
    try:
        fcntl.ioctl(descriptor, _UFFDIO_API, request)
    except OSError as error:
        raise OSError(error.errno, f"UFFDIO_API: {error.strerror}") from error


def register(descriptor: int, start: int, end: int) -> None:
    """Let the pages of these mappings be protected; nothing is protected yet. No effect where it was done before.

    Raises OSError: EBUSY where another userfaultfd has them, ENOMEM where the process has ended or called exec, EPERM
    for mappings of files that the process may not write, EINVAL for those that cannot be protected.
    """
    request = bytearray(struct.pack("4Q", start, end - start, _MODE_WRITE_PROTECT, 0))
    try:
        fcntl.ioctl(descriptor, _UFFDIO_REGISTER, request)
    except OSError as error:
        raise OSError(error.errno, f"UFFDIO_REGISTER: {error.strerror}", f"{start:x}-{end:x}") from error


def unregister(descriptor: int, start: int, end: int) -> None:
    """Take protection away."""
    fcntl.ioctl(descriptor, _UFFDIO_UNREGISTER, struct.pack("2Q", start, end - start))
