"""What a container's network is: values that move with it from host to host, checked when they are made.

Nothing here touches a kernel; `agent.network` makes these real and `migrator.hold` keeps their traffic.
"""

import ipaddress
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from migrator.errors import ExecutionError, InvalidArgument

_INTERFACE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,14}")
_MAC = re.compile(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}")


class NetworkError(ExecutionError):
    """A network call that should have worked failed; the text names the call and the object."""

    reason = "NETWORK_FAILED"


@contextmanager
def network_errors(doing: str) -> Iterator[None]:
    """Turn an OSError in the block into a NetworkError that says what was being done."""
    try:
        yield
    except OSError as error:
        raise NetworkError(f"{doing}: {error}") from error


@dataclass(frozen=True)
class Interface:
    """One network interface of a container. Addresses carry their prefix length, `10.77.2.101/16`."""

    name: str
    mac: str
    bridge: str
    ipv4: tuple[str, ...] = ()
    ipv6: tuple[str, ...] = ()
    gateway4: str | None = None
    gateway6: str | None = None

    def __post_init__(self) -> None:
        check_interface_name(self.name)
        check_interface_name(self.bridge)
        if self.name == "lo":
            raise InvalidArgument("an interface cannot be called lo: every container has that one already")
        if parse_mac(self.mac) != self.mac:
            raise InvalidArgument(f"MAC address {self.mac!r} is not in its usual form, {parse_mac(self.mac)!r}")
        for version, addresses in ((4, self.ipv4), (6, self.ipv6)):
            for address in addresses:
                if ipaddress.ip_interface(parse_address(address)).version != version:
                    raise InvalidArgument(f"{address} is not an IPv{version} address")
        for version, gateway in ((4, self.gateway4), (6, self.gateway6)):
            if gateway is not None and _ip(gateway).version != version:
                raise InvalidArgument(f"gateway {gateway} is not an IPv{version} address")

    @property
    def addresses(self) -> tuple[str, ...]:
        """All addresses without their prefix lengths."""
        return tuple(address.partition("/")[0] for address in (*self.ipv4, *self.ipv6))


@dataclass(frozen=True)
class Neighbour:
    """What a container's kernel knows of another machine: at this address, behind this interface, is this MAC."""

    interface: str
    address: str
    mac: str

    def __post_init__(self) -> None:
        check_interface_name(self.interface)
        _ip(self.address)
        if parse_mac(self.mac) != self.mac:
            raise InvalidArgument(f"MAC address {self.mac!r} is not in its usual form, {parse_mac(self.mac)!r}")


@dataclass(frozen=True)
class PublishedPort:
    """A port of the host that is forwarded to the container. `host_address` empty: every address of the host."""

    host_port: int
    container_port: int
    protocol: str = "tcp"
    host_address: str = ""

    def __post_init__(self) -> None:
        for port in (self.host_port, self.container_port):
            if not 1 <= port <= 65535:
                raise InvalidArgument(f"port {port} is not between 1 and 65535")
        if self.protocol not in ("tcp", "udp"):
            raise InvalidArgument(f"protocol {self.protocol!r} cannot be published: tcp or udp")
        if self.host_address:
            _ip(self.host_address)

    def __str__(self) -> str:
        address = f"[{self.host_address}]" if ":" in self.host_address else self.host_address
        prefix = f"{address}:" if address else ""
        return f"{prefix}{self.host_port}:{self.container_port}/{self.protocol}"


def parse_address(text: str) -> str:
    """An address with prefix length in its usual form; raises InvalidArgument if there is none or it cannot be used."""
    if "/" not in text:
        raise InvalidArgument(f"address {text!r} has no prefix length: write it like 10.77.2.101/16")
    if "%" in text:
        raise InvalidArgument(f"address {text!r} has a zone, which means nothing on another host")
    try:
        interface = ipaddress.ip_interface(text)
    except ValueError as error:
        raise InvalidArgument(f"{text!r} is not an IP address with prefix length: {error}") from error
    if interface.ip.is_unspecified or interface.ip.is_multicast or interface.ip.is_loopback:
        raise InvalidArgument(f"{text} cannot be the address of a container")
    last_is_broadcast = interface.version == 4 and interface.network.prefixlen < 31
    if last_is_broadcast and interface.ip in (interface.network.network_address, interface.network.broadcast_address):
        raise InvalidArgument(f"{text} is the network's or the broadcast address of {interface.network}")
    return str(interface)


def parse_mac(text: str) -> str:
    """A unicast MAC address as lower case with colons."""
    mac = text.lower().replace("-", ":")
    if not _MAC.fullmatch(mac):
        raise InvalidArgument(f"{text!r} is not a MAC address like 02:00:00:00:00:01")
    if int(mac[:2], 16) & 1 or mac == "00:00:00:00:00:00":
        raise InvalidArgument(f"MAC address {text} cannot be one interface's: it is a group's or zero")
    return mac


def parse_published(text: str) -> PublishedPort:
    """`[ADDRESS:]HOST:CONTAINER[/PROTOCOL]`, for example 8080:80, 127.0.0.1:53:53/udp or [fd00::1]:80:80."""
    ports, _, protocol = text.partition("/")
    match = re.fullmatch(r"(?:(?:\[([^\]]+)\]|([^:\[\]]+)):)?([0-9]{1,5}):([0-9]{1,5})", ports)
    if match is None:
        raise InvalidArgument(f"{text!r} is not a published port like 8080:80 or 8053:53/udp")
    return PublishedPort(int(match[3]), int(match[4]), protocol or "tcp", match[1] or match[2] or "")


def check_interface_name(name: str) -> str:
    """The name itself, if a kernel takes it as an interface's and it is safe in a path; 15 characters at most."""
    if not _INTERFACE_NAME.fullmatch(name):
        raise InvalidArgument(f"{name!r} cannot be an interface's name: 1 to 15 letters, digits, dots, dashes")
    return name


def check_unique(interfaces: Sequence[Interface]) -> None:
    """Raise InvalidArgument if two interfaces of one container share a name, a MAC or an address."""
    for what, values in (
        ("name", [interface.name for interface in interfaces]),
        ("MAC address", [interface.mac for interface in interfaces]),
        ("address", [address for interface in interfaces for address in interface.addresses]),
    ):
        twice = {value for value in values if values.count(value) > 1}
        if twice:
            raise InvalidArgument(f"{what} {min(twice)} is given twice")


def _ip(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    try:
        return ipaddress.ip_address(text)
    except ValueError as error:
        raise InvalidArgument(f"{text!r} is not an IP address") from error
