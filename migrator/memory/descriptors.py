"""What open descriptors of a process mean for its memory: unmapped memfds, and I/O that writes to it past page tables.

Pages that a read into them has pinned are written without a fault: by direct I/O, by AIO on it, and by io_uring. A look
that protects such a page while the read is in flight never hears of what the read brings.
"""

import errno
import os
import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from migrator.memory.errors import ProcessGone

_MEMFD = "/memfd:"
_IO_URING = "anon_inode:[io_uring]"
_POLL_SECONDS = 0.0005


@dataclass(frozen=True)
class Open:
    """`memfds` are paths in /proc at which one can be opened. `direct_devices` are those (device numbers) of the files
    that are open with O_DIRECT."""

    memfds: tuple[str, ...]
    direct_devices: frozenset[int]
    io_uring: bool

    def writes_past_page_tables(self) -> bool:
        """AIO apart, which shows in the mappings."""
        return bool(self.direct_devices) or self.io_uring


def look(pid: int, *, direct: bool) -> Open:
    """At the descriptors of a process; with `direct` also for O_DIRECT, which costs more. Raises ProcessGone."""
    folder = f"/proc/{pid}/fd"
    memfds: list[str] = []
    devices: set[int] = set()
    io_uring = False
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except (FileNotFoundError, ProcessLookupError) as error:
        raise ProcessGone(f"process {pid} is gone") from error
    try:
        for number in _numbers(pid, handle):
            try:
                target = _target(number, handle)
                if target.startswith(_MEMFD):
                    memfds.append(f"{folder}/{number}")
                elif target == _IO_URING:
                    io_uring = True
                elif direct and target.startswith("/") and _is_direct(pid, number):
                    status = os.stat(number, dir_fd=handle)
                    devices.add(status.st_rdev or status.st_dev)
            except (FileNotFoundError, ProcessLookupError, PermissionError):
                continue  # closed meanwhile, or the process has just ended
    finally:
        os.close(handle)
    return Open(tuple(memfds), frozenset(devices), io_uring)


def _target(number: str, folder: int) -> str:
    try:
        return os.readlink(number, dir_fd=folder)
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        return "/"  # on a path of more than 4 KiB


def _numbers(pid: int, folder: int) -> list[str]:
    try:
        return os.listdir(folder)
    except (FileNotFoundError, ProcessLookupError) as error:
        raise ProcessGone(f"process {pid} is gone") from error


def wait_drained(devices: Collection[int], seconds: float) -> list[str]:
    """With the container frozen, wait until no I/O is in flight on the devices, by /sys/dev/block/*/inflight.

    Returns what is not so after `seconds`, as sentences: empty when all is drained.
    """
    deadline = time.monotonic() + seconds
    while True:
        left = [problem for device in sorted(devices) if (problem := _in_flight(device))]
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(_POLL_SECONDS)


def _is_direct(pid: int, number: str) -> bool:
    text = Path(f"/proc/{pid}/fdinfo/{number}").read_text()
    flags = next(line for line in text.splitlines() if line.startswith("flags:"))
    return bool(int(flags.split()[1], 8) & os.O_DIRECT)


def _in_flight(device: int) -> str:
    name = f"{os.major(device)}:{os.minor(device)}"
    try:
        reads, writes = Path(f"/sys/dev/block/{name}/inflight").read_text().split()
    except FileNotFoundError:
        return f"whether I/O is in flight on device {name} cannot be seen: it is no block device"
    return f"{reads} reads and {writes} writes are in flight on device {name}" if int(reads) + int(writes) else ""
