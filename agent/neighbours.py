"""The neighbours of a container, as its kernel knows them: the ARP and NDP tables, which CRIU does not carry over.

Without them the first answer after a move has to wait until the client's link address is found again, and of more than
some 200 KiB that wait (unres_qlen_bytes of ip-sysctl.rst) the oldest are dropped: to TCP that costs a second.
"""

import ipaddress
import socket
from collections.abc import Iterable, Sequence

from pyroute2 import IPRoute

from agent import namespaces
from migrator.frames import mac_bytes
from migrator.network import Interface, Neighbour, NetworkError, network_errors
from migrator.rtnetlink import RouteSocket

NEIGHBOURS_MAX = 1024
"""Neighbours that travel; the kernel itself begins to forget some at 128 (gc_thresh1)."""

_REACHABLE, _STALE, _DELAY, _PROBE = 0x02, 0x04, 0x08, 0x10  # linux/neighbour.h
_LEARNED = _REACHABLE | _STALE | _DELAY | _PROBE


def read(container: str, interfaces: Sequence[Interface]) -> list[Neighbour]:
    """Those that the container's kernel has found by asking; takes a millisecond or two."""

    def dump() -> list[Neighbour]:
        names = _indexes(interfaces)
        with IPRoute() as route:
            entries = [entry for entry in route.get_neighbours() if entry["ifindex"] in names]
        return [
            Neighbour(names[entry["ifindex"]], entry.get("dst"), entry.get("lladdr"))
            for entry in entries
            if entry["state"] & _LEARNED and entry.get("lladdr")
        ]

    with network_errors(f"reading the neighbours of {container}"):
        return namespaces.inside(container, dump)[:NEIGHBOURS_MAX]


class Neighbours:
    """To tell a container's kernel of them, in some 20 us each. Close it."""

    def __init__(self, container: str, interfaces: Sequence[Interface]) -> None:
        self._container = container
        with network_errors(f"opening the neighbours of {container}"):
            self._route, names = namespaces.inside(container, lambda: (RouteSocket(), _indexes(interfaces)))
        self._indexes = {name: index for index, name in names.items()}

    def learn(self, neighbours: Iterable[Neighbour]) -> None:
        """Raises NetworkError, also for an interface that the container does not have."""
        with network_errors(f"telling {self._container} of its neighbours"):
            for neighbour in neighbours:
                index = self._indexes.get(neighbour.interface)
                if index is None:
                    raise NetworkError(f"{self._container} has no interface {neighbour.interface} for a neighbour")
                self._route.learn(index, ipaddress.ip_address(neighbour.address).packed, mac_bytes(neighbour.mac))

    def close(self) -> None:
        """Repeatable."""
        self._route.close()


def _indexes(interfaces: Iterable[Interface]) -> dict[int, str]:
    return {socket.if_nametoindex(interface.name): interface.name for interface in interfaces}
