"""Connections that a container's listening TCP sockets hold and that it has not accepted: CRIU cannot carry them.

Layouts and meaning: linux/inet_diag.h; for a listener idiag_rqueue is the length of its queue of connections.
"""

import os
import socket
import struct
from collections.abc import Iterator

from agent import namespaces

_NETLINK_SOCK_DIAG = 4
_SOCK_DIAG_BY_FAMILY = 20
_NLM_F_REQUEST_DUMP = 0x301
_NLMSG_ERROR = 2
_NLMSG_DONE = 3
_TCP_LISTEN = 10
_ANSWER_BYTES = 1 << 16
_TIMEOUT_S = 1.0

_HEADER = struct.Struct("=IHHII")
# inet_diag_req_v2: family, protocol, extensions, states; then the id of one socket, empty for all.
_REQUEST = struct.Struct("=BBBxI48x")
# inet_diag_msg up to idiag_rqueue: family, state, timer, retrans, the socket's id, expires, rqueue.
_LISTENER = struct.Struct("=BBBB48xII")


class Backlog:
    """A question that costs some 30 us, to one network namespace. Close it."""

    def __init__(self, namespace: str) -> None:
        kind = socket.SOCK_RAW | socket.SOCK_CLOEXEC
        self._socket = namespaces.inside(namespace, lambda: socket.socket(socket.AF_NETLINK, kind, _NETLINK_SOCK_DIAG))
        self._socket.settimeout(_TIMEOUT_S)

    def close(self) -> None:
        self._socket.close()

    def waiting(self) -> int:
        """How many connections wait to be accepted. Raises OSError."""
        return sum(self._ask(family) for family in (socket.AF_INET, socket.AF_INET6))

    def _ask(self, family: int) -> int:
        request = _REQUEST.pack(family, socket.IPPROTO_TCP, 0, 1 << _TCP_LISTEN)
        header = _HEADER.pack(_HEADER.size + len(request), _SOCK_DIAG_BY_FAMILY, _NLM_F_REQUEST_DUMP, 0, 0)
        self._socket.send(header + request)
        waiting = 0
        while True:
            for kind, body in _messages(self._socket.recv(_ANSWER_BYTES)):
                if kind == _NLMSG_DONE:
                    return waiting
                if kind == _NLMSG_ERROR:
                    number = -struct.unpack_from("=i", body)[0]
                    raise OSError(number, f"listing listening sockets by netlink: {os.strerror(number)}")
                waiting += _LISTENER.unpack_from(body)[5]


def _messages(answer: bytes) -> Iterator[tuple[int, bytes]]:
    offset = 0
    while offset < len(answer):
        length, kind, *_ = _HEADER.unpack_from(answer, offset)
        yield kind, answer[offset + _HEADER.size : offset + length]
        offset += (length + 3) & ~3
