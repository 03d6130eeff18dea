"""The agent's configuration: a TOML file, read once into values; everything that is not understood is refused."""

import difflib
import ipaddress
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from migrator import units
from migrator.channel import Tls
from migrator.errors import InvalidArgument
from migrator.memory import METHODS

HOST_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?(\.[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?)*")
CGROUP_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}")
BRIDGE_NAME = re.compile(r"[A-Za-z0-9_.-]{1,15}")
MIN_POOL_BYTES = 512 << 20


@dataclass(frozen=True)
class Network:
    """Where containers are connected, and the addresses that this host hands out.

    The pools are this host's share; the prefix lengths are those of the whole network. No addresses from an empty pool.
    """

    bridge: str = "br0"
    ipv4_pool: str = ""
    ipv4_prefix: int = 24
    ipv4_gateway: str = ""
    ipv6_pool: str = ""
    ipv6_prefix: int = 64
    ipv6_gateway: str = ""


@dataclass(frozen=True)
class Config:
    """`listen_address` is empty if only the local socket is served; `peers` is host name to host:port.

    `memory_tracker` is one of `migrator.memory.METHODS`; empty for the best that this kernel has. `max_migrations` is
    how many containers may be on their way from this host at once, `max_arrivals` how many to it; the others wait.
    """

    host: str
    state_dir: Path
    run_dir: Path
    cache_dir: Path
    cgroup_parent: str
    pool_size_bytes: int
    memory_tracker: str
    max_migrations: int
    max_arrivals: int
    listen_address: str
    tls: Tls
    network: Network
    peers: Mapping[str, str]

    @property
    def socket(self) -> Path:
        """The agent's local socket."""
        return self.run_dir / "agent.sock"

    @property
    def database(self) -> Path:
        """The agent's SQLite file."""
        return self.state_dir / "agent.db"


def load(path: Path) -> Config:
    """Read a configuration file. Raises InvalidArgument, which names the file and the key."""
    try:
        with path.open("rb") as file:
            return parse(tomllib.load(file))
    except OSError as error:
        raise InvalidArgument(f"configuration {path}: {error.strerror}", reason="BAD_CONFIGURATION") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, InvalidArgument) as error:
        raise InvalidArgument(f"configuration {path}: {error}", reason="BAD_CONFIGURATION") from error


def parse(document: Mapping[str, Any]) -> Config:
    """From what a TOML parser returned. Raises InvalidArgument, which names the key."""
    top = _Table("", document)
    listen, tls, network = top.table("listen"), top.table("tls"), top.table("network")
    config = Config(
        host=_matching("host", top.required_text("host"), HOST_NAME),
        state_dir=top.path("state_dir", "/var/lib/migrator"),
        run_dir=top.path("run_dir", "/run/migrator"),
        cache_dir=top.path("cache_dir", "/var/cache/migrator"),
        cgroup_parent=_matching("cgroup_parent", top.text("cgroup_parent", "migrator"), CGROUP_NAME),
        pool_size_bytes=_pool_size(top.value("pool_size", "20GiB", (str, int))),
        memory_tracker=_choice("memory_tracker", top.text("memory_tracker", ""), METHODS),
        max_migrations=_between("max_migrations", top.number("max_migrations", 8), 1, 64),
        max_arrivals=_between("max_arrivals", top.number("max_arrivals", 8), 1, 64),
        listen_address=_address("listen.address", listen.text("address", "")),
        tls=Tls(
            ca=tls.path("ca", "/etc/migrator/ca.crt"),
            certificate=tls.path("certificate", "/etc/migrator/host.crt"),
            key=tls.path("key", "/etc/migrator/host.key"),
        ),
        network=_network(network),
        peers=_peers(top.table("peers")),
    )
    for table in (top, listen, tls, network):
        table.refuse_unknown()
    if config.host in config.peers:
        raise InvalidArgument(f"peers.{config.host} is this host itself: name the other hosts only")
    return config


def _network(table: "_Table") -> Network:
    network = Network(
        bridge=_matching("network.bridge", table.text("bridge", "br0"), BRIDGE_NAME),
        ipv4_pool=table.text("ipv4_pool", ""),
        ipv4_prefix=table.number("ipv4_prefix", 24),
        ipv4_gateway=table.text("ipv4_gateway", ""),
        ipv6_pool=table.text("ipv6_pool", ""),
        ipv6_prefix=table.number("ipv6_prefix", 64),
        ipv6_gateway=table.text("ipv6_gateway", ""),
    )
    _check_family(4, network.ipv4_pool, network.ipv4_prefix, network.ipv4_gateway)
    _check_family(6, network.ipv6_pool, network.ipv6_prefix, network.ipv6_gateway)
    return network


def _check_family(version: int, pool: str, prefix: int, gateway: str) -> None:
    key = f"network.ipv{version}"
    try:
        if pool:
            range_ = ipaddress.ip_network(pool)
            if range_.version != version:
                raise ValueError(f"not an IPv{version} network")
            if not 0 < prefix <= range_.prefixlen:
                raise ValueError(f"{key}_prefix {prefix} does not contain the pool, whose length is {range_.prefixlen}")
        if gateway and ipaddress.ip_address(gateway).version != version:
            raise ValueError(f"the gateway {gateway} is not an IPv{version} address")
    except ValueError as error:
        raise InvalidArgument(f"{key}_pool {pool!r}: {error}") from error


def _peers(table: "_Table") -> dict[str, str]:
    peers = {}
    for name in table.names():
        _matching(f"peers.{name}", name, HOST_NAME)
        peers[name] = _address(f"peers.{name}", table.text(name, ""))
        if not peers[name]:
            raise InvalidArgument(f"peers.{name} has no address")
    return peers


def _pool_size(value: Any) -> int:
    try:
        size = value if isinstance(value, int) else units.parse_size(value)
    except InvalidArgument as error:
        raise InvalidArgument(f"pool_size: {error}") from error
    if size < MIN_POOL_BYTES:
        raise InvalidArgument(f"pool_size: {units.format_size(size)} is less than {units.format_size(MIN_POOL_BYTES)}")
    return size


def _between(key: str, value: int, least: int, most: int) -> int:
    if not least <= value <= most:
        raise InvalidArgument(f"{key}: {value} is not between {least} and {most}")
    return value


def _choice(key: str, value: str, choices: Sequence[str]) -> str:
    if value and value not in choices:
        raise InvalidArgument(f"{key} {value!r}: choose one of {', '.join(choices)}, or leave it away")
    return value


def _matching(key: str, text: str, pattern: re.Pattern[str]) -> str:
    if not pattern.fullmatch(text) or text in (".", ".."):
        raise InvalidArgument(f"{key}: {text!r} is not a valid name")
    return text


def _address(key: str, text: str) -> str:
    """host:port, with brackets around an IPv6 address."""
    if not text:
        return text
    host, colon, port = text.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    port_is_good = port.isascii() and port.isdecimal() and 0 < int(port) < 65536
    if not (host and colon and port_is_good) or (":" in host and not bracketed):
        raise InvalidArgument(f"{key}: {text!r} is not HOST:PORT (an IPv6 address goes into brackets)")
    return text


class _Table:
    """One TOML table; remembers what was asked for, so that the rest can be refused."""

    def __init__(self, name: str, values: Mapping[str, Any]) -> None:
        self._prefix = f"{name}." if name else ""
        self._values = values
        self._known: set[str] = set()

    def names(self) -> list[str]:
        return list(self._values)

    def value(self, key: str, default: Any, kinds: tuple[type, ...]) -> Any:
        self._known.add(key)
        value = self._values.get(key, default)
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise InvalidArgument(f"{self._prefix}{key}: {value!r} is not a {kinds[0].__name__}")
        return value

    def text(self, key: str, default: str) -> str:
        return str(self.value(key, default, (str,)))

    def required_text(self, key: str) -> str:
        if key not in self._values:
            raise InvalidArgument(f"{self._prefix}{key} is missing")
        return self.text(key, "")

    def number(self, key: str, default: int) -> int:
        return int(self.value(key, default, (int,)))

    def path(self, key: str, default: str) -> Path:
        path = Path(self.text(key, default))
        if not path.is_absolute():
            raise InvalidArgument(f"{self._prefix}{key}: {str(path)!r} is not an absolute path")
        return path

    def table(self, key: str) -> "_Table":
        return _Table(key, self.value(key, {}, (dict,)))

    def refuse_unknown(self) -> None:
        for key in self._values:
            if key in self._known:
                continue
            near = difflib.get_close_matches(key, self._known, n=1)
            known = ", ".join(sorted(self._known))
            hint = f"did you mean {self._prefix}{near[0]}?" if near else f"known are {known}"
            raise InvalidArgument(f"{self._prefix}{key} is not a known key; {hint}")
