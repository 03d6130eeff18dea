"""The few route-netlink requests that a freeze waits for, in microseconds.

A request by pyroute2 runs through an event loop and costs 0.2 to 0.8 ms; these cost 5 to 150 us each. Everything
that is not on that path uses pyroute2. Layouts: linux/rtnetlink.h, linux/if_link.h, linux/neighbour.h.
"""

import os
import socket
import struct
import threading
from types import TracebackType
from typing import Self

_NETLINK_ROUTE = 0
_NLMSG_ERROR = 2
_NLM_F_REQUEST = 0x1
_NLM_F_ACK = 0x4
_NLM_F_REPLACE = 0x100
_NLM_F_CREATE = 0x400
_RTM_SETLINK = 19
_RTM_NEWNEIGH = 28
_AF_BRIDGE = 7
_IFLA_MASTER = 10
_IFLA_PROTINFO = 12
_NLA_F_NESTED = 0x8000
_NDA_DST = 1
_NDA_LLADDR = 2
_NTF_MASTER = 4
_NUD_REACHABLE = 2
_NUD_STALE = 4

_HEADER = struct.Struct("=IHHII")
_IFINFO = struct.Struct("=BxHiII")
_NDMSG = struct.Struct("=BxxxiHBB")

PORT_STATE = 1
PORT_LEARNING = 8
PORT_UNICAST_FLOOD = 9
PORT_LOCKED = 39
"""Frames from a MAC that the bridge knows to be at another port are dropped, and teach it nothing; kernel >= 5.18."""

STATE_DISABLED = 0
STATE_FORWARDING = 3


class RouteSocket:
    """One netlink socket in the network namespace of the thread that makes it; any thread may use it. Close it.

    Every method raises OSError, with the request and the interface's index in its text.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sequence = 0
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_ROUTE)
        try:
            self._socket.bind((0, 0))
            self._socket.settimeout(5.0)
        except OSError:
            self._socket.close()
            raise

    def set_master(self, index: int, bridge_index: int) -> None:
        """Attach the interface to a bridge, or with 0 detach it; repeatable."""
        body = _IFINFO.pack(socket.AF_UNSPEC, 0, index, 0, 0) + _attribute(
            _IFLA_MASTER, struct.pack("=I", bridge_index)
        )
        self._request(_RTM_SETLINK, 0, body, f"attaching interface {index} to bridge {bridge_index}")

    def set_port(self, index: int, option: int, value: int) -> None:
        """Set one of the PORT_ options of an interface that is a bridge's port."""
        body = _IFINFO.pack(_AF_BRIDGE, 0, index, 0, 0)
        body += _attribute(_IFLA_PROTINFO | _NLA_F_NESTED, _attribute(option, bytes([value])))
        self._request(_RTM_SETLINK, 0, body, f"setting option {option} of bridge port {index} to {value}")

    def move_mac(self, index: int, mac: bytes) -> None:
        """From now on the bridge forwards what is for `mac` to this port. As if learned: it ages and may move."""
        body = _NDMSG.pack(_AF_BRIDGE, index, _NUD_REACHABLE, _NTF_MASTER, 0) + _attribute(_NDA_LLADDR, mac)
        self._request(_RTM_NEWNEIGH, _NLM_F_CREATE | _NLM_F_REPLACE, body, f"moving {mac.hex(':')} to port {index}")

    def learn(self, index: int, address: bytes, mac: bytes) -> None:
        """The machine at this address, 4 or 16 bytes, has this MAC: to be used at once, and confirmed when it is."""
        family = socket.AF_INET if len(address) == 4 else socket.AF_INET6
        body = _NDMSG.pack(family, index, _NUD_STALE, 0, 0)
        body += _attribute(_NDA_DST, address) + _attribute(_NDA_LLADDR, mac)
        doing = f"learning {mac.hex(':')} at interface {index}"
        self._request(_RTM_NEWNEIGH, _NLM_F_CREATE | _NLM_F_REPLACE, body, doing)

    def close(self) -> None:
        """Close the socket; repeatable."""
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _request(self, kind: int, flags: int, body: bytes, doing: str) -> None:
        with self._lock:
            self._sequence += 1
            header = _HEADER.pack(
                _HEADER.size + len(body), kind, _NLM_F_REQUEST | _NLM_F_ACK | flags, self._sequence, 0
            )
            self._socket.send(header + body)
            while True:
                answer = self._socket.recv(65536)
                _, answer_kind, _, sequence, _ = _HEADER.unpack_from(answer)
                if sequence == self._sequence:
                    break
        if answer_kind != _NLMSG_ERROR:
            raise OSError(f"{doing}: the kernel answered with message {answer_kind}")
        (code,) = struct.unpack_from("=i", answer, _HEADER.size)
        if code:
            raise OSError(-code, f"{doing}: {os.strerror(-code)}")


def _attribute(kind: int, data: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(data), kind) + data + bytes(-len(data) % 4)
