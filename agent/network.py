"""Container networks: a namespace per container, with veth pairs into the host's bridges.

What is made here is named and marked so that a restarted agent knows it again: the namespace has the container's name,
its loopback and the host's ends of its pairs carry the alias `migrator:<container>[:<number>]`. Links are made off the
bridge: a container is connected when it starts, and last of all when it arrives from elsewhere.

`connect`, `give_way`, `disconnect`, `announce` are on the path of a freeze: no pyroute2, 0.1 to 0.5 ms each.
"""

import errno
import hashlib
import socket
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from agent import namespaces
from migrator import frames
from migrator.errors import Precondition
from migrator.network import Interface, NetworkError, check_unique, network_errors
from migrator.rtnetlink import PORT_LEARNING, PORT_LOCKED, PORT_UNICAST_FLOOD, RouteSocket

ALIAS = "migrator:"
ANNOUNCE_AFTER_S = (0.05, 0.2, 1.0)
_ETH_P_ARP = 0x0806
_IFA_F_NODAD = 0x02
_EUI64 = 0


class Networks:
    """The networks of this host's containers. Made and used in the host's network namespace; close it."""

    def __init__(self) -> None:
        self._route = RouteSocket()
        self._announcing: dict[str, threading.Event] = {}

    def create(self, container: str, interfaces: Sequence[Interface], *, connected: bool = False) -> Path:
        """Make the container's namespace with all its interfaces up; undone if it fails. Returns the namespace's path.

        Raises Precondition (NO_SUCH_BRIDGE, NAMESPACE_IN_USE), NetworkError.
        """
        check_unique(interfaces)
        with ExitStack() as undo, network_errors(f"making the network of {container}"):
            try:
                path = namespaces.create(container)
            except FileExistsError as error:
                raise Precondition(
                    f"this host has a network namespace called {container} already; remove it if it is a leftover",
                    reason="NAMESPACE_IN_USE",
                ) from error
            undo.callback(self.destroy, container)
            try:
                with IPRoute() as route:
                    for number, interface in enumerate(interfaces):
                        _make_pair(route, container, number, interface)
                namespaces.inside(container, lambda: _configure(interfaces))
            except NetlinkError as error:
                raise NetworkError(f"making the network of {container}: {error}") from error
            if connected:
                self.connect(container, interfaces)
                self.announce(container, interfaces)
            undo.pop_all()
        return path

    def destroy(self, container: str) -> None:
        """Remove the container's links and namespace; repeatable."""
        self._stop_announcing(container)
        with network_errors(f"removing the network of {container}"):
            with IPRoute() as route:
                for index in _marked_links(route).get(container, []):
                    _delete_link(route, index)
            namespaces.remove(container)

    def connect(self, container: str, interfaces: Sequence[Interface], *, learning: bool = True) -> None:
        """Attach the links to their bridges; repeatable. Without learning, the bridges do not follow the container's
        frames, and send it nothing that is not known to be its own: for an arrival, whose held traffic has to be
        replayed first (`TrafficHold.replay` turns both on)."""
        with network_errors(f"connecting {container}"):
            for number, interface in enumerate(interfaces):
                index = socket.if_nametoindex(host_end(container, number))
                self._route.set_master(index, socket.if_nametoindex(interface.bridge))
                self._route.set_port(index, PORT_LOCKED, 0)
                self._route.set_port(index, PORT_LEARNING, int(learning))
                self._route.set_port(index, PORT_UNICAST_FLOOD, int(learning))

    def give_way(self, container: str, interfaces: Sequence[Interface]) -> None:
        """Let another host take the container's traffic: once it has announced the MACs, what the container's kernel
        still sends (acknowledgements, mostly) is dropped and draws nothing back. Right after the freeze; `connect` ends
        it."""
        self._stop_announcing(container)
        with network_errors(f"giving way for {container}"):
            for number in range(len(interfaces)):
                self._route.set_port(socket.if_nametoindex(host_end(container, number)), PORT_LOCKED, 1)

    def disconnect(self, container: str, interfaces: Sequence[Interface]) -> None:
        """Detach the links that there are from their bridges; repeatable. Nothing reaches or leaves the container from
        now on."""
        self._stop_announcing(container)
        with network_errors(f"disconnecting {container}"):
            for number in range(len(interfaces)):
                if index := _index(host_end(container, number)):
                    self._route.set_master(index, 0)

    def announce(self, container: str, interfaces: Sequence[Interface]) -> None:
        """Tell the network, from inside, that the container's addresses are here: now, and again in the background."""
        with network_errors(f"announcing the addresses of {container}"), ExitStack() as undo:
            outputs = namespaces.inside(container, lambda: [_packet_socket(interface) for interface in interfaces])
            for output in outputs:
                undo.callback(output.close)
            messages = [
                frames.announcements(frames.mac_bytes(interface.mac), interface.addresses) for interface in interfaces
            ]
            _send(outputs, messages)
            rest = undo.pop_all()

        self._stop_announcing(container)
        stop = self._announcing[container] = threading.Event()

        def repeat() -> None:
            with rest:
                started = time.monotonic()
                for after_s in ANNOUNCE_AFTER_S:
                    if stop.wait(max(0.0, started + after_s - time.monotonic())):
                        return
                    try:
                        _send(outputs, messages)
                    except OSError:
                        return  # the container was deleted or moved on: nobody is to be told anything

        threading.Thread(target=repeat, name=f"announce {container}", daemon=True).start()

    def _stop_announcing(self, container: str) -> None:
        stop = self._announcing.pop(container, None)
        if stop is not None:
            stop.set()

    def close(self) -> None:
        """Close the netlink socket and stop announcing; the networks stay."""
        for container in list(self._announcing):
            self._stop_announcing(container)
        self._route.close()


def _index(link: str) -> int:
    """The interface's number, 0 if there is no such."""
    try:
        return socket.if_nametoindex(link)
    except OSError:
        return 0


def host_end(container: str, number: int) -> str:
    """The name of the host's end of the container's veth pair: follows from the container's name alone."""
    return f"mg{_short(container)}-{number}"


def hold_name(container: str) -> str:
    """What `TrafficHold` is to call its TAPs for the container."""
    return f"mh{_short(container)}-"


def is_own(address: str) -> bool:
    """Whether the address, in its usual spelling, is one of this host's own."""
    with network_errors(f"looking for {address} among this host's"), IPRoute() as route:
        return any(found.get("address") == address for found in route.get_addr())


def probe_ipv4(bridge: str, address: str, timeout_s: float = 0.3) -> str | None:
    """The MAC of whoever answers to the IPv4 address on the bridge's network, or None (RFC 5227 probe, sent twice)."""
    with (
        network_errors(f"asking for {address} on {bridge}"),
        socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ETH_P_ARP)) as probe,
    ):
        probe.bind((bridge, _ETH_P_ARP))
        own_mac = probe.getsockname()[4][:6]
        wanted = socket.inet_aton(address)
        deadline = time.monotonic() + timeout_s
        for half_s in (timeout_s / 2, 0.0):
            probe.send(frames.arp_probe(own_mac, address))
            while (left_s := deadline - half_s - time.monotonic()) > 0:
                probe.settimeout(left_s)
                try:
                    packet = frames.parse_arp(probe.recv(2048))
                except TimeoutError:
                    break
                if packet and packet.sender_ip == wanted and packet.sender_mac != own_mac:
                    return frames.mac_text(packet.sender_mac)
    return None


def _make_pair(route: IPRoute, container: str, number: int, interface: Interface) -> None:
    bridge = route.link_lookup(ifname=interface.bridge)
    if not bridge:
        raise Precondition(
            f"this host has no bridge {interface.bridge} for {container}'s {interface.name}; make it, or name another",
            reason="NO_SUCH_BRIDGE",
        )
    mtu = route.get_links(bridge[0])[0].get("mtu")
    name = host_end(container, number)
    with namespaces.path_of(container).open() as namespace:
        route.link(
            "add", ifname=name, kind="veth", mtu=mtu, address=_high_mac(name),
            peer={
                "ifname": interface.name, "address": interface.mac, "mtu": mtu, "net_ns_fd": namespace.fileno(),
            },
        )  # fmt: skip
    index = socket.if_nametoindex(name)
    route.link("set", index=index, ifalias=f"{ALIAS}{container}:{number}")
    _quiet_ipv6(name)
    route.link("set", index=index, state="up")


def _configure(interfaces: Sequence[Interface]) -> None:
    """Inside the container's namespace: loopback, addresses, routes."""
    with IPRoute() as route:
        loopback = socket.if_nametoindex("lo")
        route.link("set", index=loopback, state="up")
        for interface in interfaces:
            index = socket.if_nametoindex(interface.name)
            _write_if_present(Path(f"/proc/sys/net/ipv6/conf/{interface.name}/accept_dad"), "0")
            route.link("set", index=index, state="up")
            for address in interface.ipv4:
                ip, _, prefix = address.partition("/")
                route.addr("add", index=index, address=ip, prefixlen=int(prefix))
            for address in interface.ipv6:
                ip, _, prefix = address.partition("/")
                route.addr("add", index=index, address=ip, prefixlen=int(prefix), flags=_IFA_F_NODAD)
            for family, gateway, everything in (
                (socket.AF_INET, interface.gateway4, "0.0.0.0/0"),
                (socket.AF_INET6, interface.gateway6, "::/0"),
            ):
                if gateway is not None:
                    route.route("add", family=family, dst=everything, gateway=gateway, oif=index)


def _marked_links(route: IPRoute) -> dict[str, list[int]]:
    """Indexes of the host's ends that are ours, by container."""
    found: dict[str, list[int]] = {}
    for link in route.get_links():
        alias = link.get("ifalias") or ""
        if alias.startswith(ALIAS):
            found.setdefault(alias.removeprefix(ALIAS).partition(":")[0], []).append(link["index"])
    return found


def _delete_link(route: IPRoute, index: int) -> None:
    try:
        route.link("del", index=index)
    except NetlinkError as error:
        if error.code != errno.ENODEV:  # else it went with its namespace
            raise NetworkError(f"deleting interface {index}: {error}") from error


def _packet_socket(interface: Interface) -> socket.socket:
    output = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
    try:
        output.bind((interface.name, 0))
    except OSError:
        output.close()
        raise
    return output


def _send(outputs: Sequence[socket.socket], messages: Sequence[Sequence[bytes]]) -> None:
    for output, announcements in zip(outputs, messages, strict=True):
        for frame in announcements:
            output.send(frame)


def _short(container: str) -> str:
    return hashlib.sha256(container.encode()).hexdigest()[:9]


def _high_mac(name: str) -> str:
    """For the host's end: never a bridge's lowest MAC, which a bridge without one of its own would take over."""
    return "fe:" + hashlib.sha256(name.encode()).digest()[:5].hex(":")


def _quiet_ipv6(name: str) -> None:
    """A bridge's port needs no address; the kernel would give it one and talk about it."""
    _write_if_present(Path(f"/proc/sys/net/ipv6/conf/{name}/disable_ipv6"), "1")


def _write_if_present(path: Path, value: str) -> None:
    if path.exists():
        path.write_text(value)
