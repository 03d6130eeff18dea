"""What `criu restore --lazy-pages` says on `lazy-pages.socket` in its work directory (criu/uffd.c; the same in 4.1 and
4.2).

For each task an int, its pid in the container's pid namespace, and then one byte with its userfaultfd as SCM_RIGHTS;
for a task that was dead already, its pid negative and nothing after it. When all is restored, and before the tasks run,
a u32 0x52535446.
"""

import socket
import struct
from pathlib import Path
from typing import NamedTuple

NAME = "lazy-pages.socket"

_FINISHED = 0x52535446
_NUMBER = struct.Struct("=i")


class Task(NamedTuple):
    """A task whose memory is to be filled."""

    pid: int
    descriptor: int


def listen(work: Path) -> socket.socket:
    """Take the place of `criu lazy-pages`; the restore may begin."""
    path = work / NAME
    path.unlink(missing_ok=True)
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listening.bind(str(path))
    listening.listen(1)
    return listening


def receive(connection: socket.socket) -> Task | None:
    """The next task that has memory; None when all is restored. Raises EOFError if the restore ended before."""
    while True:
        (number,) = _NUMBER.unpack(_exactly(connection, _NUMBER.size))
        if number == _FINISHED:
            return None
        if number < 0:
            continue
        _, descriptors, _, _ = socket.recv_fds(connection, 1, 1)
        if not descriptors:
            raise EOFError("the restore ended while it handed over a userfaultfd")
        return Task(number, descriptors[0])


def _exactly(connection: socket.socket, length: int) -> bytes:
    data = connection.recv(length, socket.MSG_WAITALL)
    if len(data) < length:
        raise EOFError("the restore ended before it had restored all processes")
    return data
