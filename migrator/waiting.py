"""Waiting for descriptors by poll(2): select(2) knows none above 1023, and an agent with many containers has more.

And for processes that have work to finish.
"""

import math
import os
import select
import time
from collections.abc import Iterable
from pathlib import Path

# Of a process that is to end: how long it may do nothing, and how long it may take.
PATIENCE_S, LONGEST_S = 5.0, 120.0


def readable(descriptors: Iterable[int], timeout_s: float | None = None) -> list[int]:
    """Those that can be read without waiting, or have ended; empty if none is by then. None: however long it takes."""
    poll = select.poll()
    for descriptor in descriptors:
        poll.register(descriptor, select.POLLIN)
    return [found for found, _ in poll.poll(None if timeout_s is None else max(0, math.ceil(timeout_s * 1000)))]


def finishes(pid: int, patience_s: float = PATIENCE_S, limit_s: float = LONGEST_S) -> bool:
    """Wait for the end of a process as long as it uses processor time. False after `patience_s` without, or `limit_s`.

    It must not be reaped meanwhile. Its end is seen by a pidfd (Linux 5.3).
    """
    try:
        process = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        deadline, used = time.monotonic() + limit_s, _ticks(pid)
        while not readable([process], patience_s):
            before, used = used, _ticks(pid)
            if used == before or time.monotonic() > deadline:
                return False
        return True
    finally:
        os.close(process)


def _ticks(pid: int) -> int:
    """Of processor time: utime and stime of /proc/PID/stat (proc(5))."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return int(fields[11]) + int(fields[12])
