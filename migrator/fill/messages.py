"""What keeper, worker and guard say to each other: packets on a socket pair, with a userfaultfd where one is handed
over.
"""

import enum
import socket
import struct
from typing import NamedTuple

_FORMAT = struct.Struct("=cxxxIi")


class Kind(bytes, enum.Enum):
    """What a packet says. `space` is the number of a userfaultfd, the same in all three processes."""

    TASK = b"T"  # keeper to others: a space, and the pid in the container whose images it has
    RESTORED = b"R"  # keeper to worker: all tasks were handed over and are about to run
    FORKED = b"F"  # worker to keeper and on to the guard: a new space, with its descriptor
    TAKEN = b"A"  # keeper to worker: that is held now
    CLOSED = b"C"  # worker to keeper and on to the guard: nothing is left to do for a space
    WORKER = b"W"  # keeper to guard: the worker's process
    END = b"E"  # worker to keeper: everything is filled; keeper to guard: there is nothing left to guard


class Packet(NamedTuple):
    """`number` is a pid. `descriptor` belongs to who receives it."""

    kind: Kind
    space: int = 0
    number: int = 0
    descriptor: int | None = None


def pair() -> tuple[socket.socket, socket.socket]:
    """Two ends for two processes."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def send(to: socket.socket, packet: Packet) -> bool:
    """Whether the other end is still there."""
    data = _FORMAT.pack(packet.kind.value, packet.space, packet.number)
    try:
        socket.send_fds(to, [data], [] if packet.descriptor is None else [packet.descriptor])
    except (BrokenPipeError, ConnectionResetError):
        return False
    return True


def receive(source: socket.socket) -> Packet | None:
    """The next one; None when the other end has gone."""
    try:
        data, descriptors, _, _ = socket.recv_fds(source, _FORMAT.size, 1)
    except ConnectionResetError:
        return None
    if not data:
        return None
    kind, space, number = _FORMAT.unpack(data)
    return Packet(Kind(kind), space, number, descriptors[0] if descriptors else None)
