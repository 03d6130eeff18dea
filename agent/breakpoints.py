"""Have the kernel ready for CRIU's hardware breakpoints before a container stands still.

CRIU stops each task by such a breakpoint when it has dumped or restored it. That is a perf event, and the first one of
a system waits for an RCU grace period, 7 to 10 ms (account_event of kernel/events/core.c, Linux 6.18). Not while there
is another event that belongs to a task, which perf_event_open(2) makes here: one that counts nothing.
"""

import ctypes
import os
import platform
import struct

import structlog

_SYSCALL = {"x86_64": 298, "aarch64": 241}
_SOFTWARE, _DUMMY = 1, 9  # PERF_TYPE_SOFTWARE, PERF_COUNT_SW_DUMMY of linux/perf_event.h
_ATTRIBUTE_BYTES, _DISABLED = 64, 1
_CLOSE_ON_EXEC = 8

log = structlog.get_logger()
_libc = ctypes.CDLL(None, use_errno=True)


class Breakpoints:
    """Ready from now on until `close`. Where the kernel does not allow it, CRIU waits as always."""

    def __init__(self) -> None:
        attribute = struct.pack("=IIQQQQQ16x", _SOFTWARE, _ATTRIBUTE_BYTES, _DUMMY, 0, 0, 0, _DISABLED)
        buffer = ctypes.create_string_buffer(attribute, _ATTRIBUTE_BYTES)
        number = _SYSCALL.get(platform.machine())
        self._descriptor = -1
        if number is not None:
            # Of this thread, on any processor, in no group.
            self._descriptor = int(_libc.syscall(number, buffer, 0, -1, -1, _CLOSE_ON_EXEC))
        if self._descriptor < 0:
            log.info("perf_event_open", reason=os.strerror(ctypes.get_errno()))

    def close(self) -> None:
        """Repeatable."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self._descriptor = -1
