"""Where the agent is and how output should look: from options, the environment and the client's configuration file."""

import os
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from migrator.errors import InvalidArgument

SOCKET = "/run/migrator/agent.sock"
CLIENT_FILE = Path("/etc/migrator/client.toml")
AGENT_FILE = Path("/etc/migrator/config.toml")
DEFAULT_PORT = 7443


@dataclass
class Settings:
    """What the shared options said; None where the environment, the file or the default decides."""

    output: str = "table"
    host: str | None = None
    socket: str | None = None
    ca: str | None = None
    cert: str | None = None
    key: str | None = None

    @property
    def json(self) -> bool:
        return self.output == "json"


@dataclass(frozen=True)
class Endpoint:
    """Either a UNIX socket, or an address with the three files of mutual TLS."""

    socket: str = ""
    address: str = ""
    ca: Path = Path()
    cert: Path = Path()
    key: Path = Path()

    def __str__(self) -> str:
        return self.address or self.socket


def endpoint(settings: Settings) -> Endpoint:
    """The agent to ask. Options win over the environment, and that over client.toml and the agent's own config.toml.

    Raises InvalidArgument for a host without an address, or where a file for TLS is not given.
    """
    host = settings.host or (None if settings.socket else os.environ.get("MIGRATOR_HOST"))
    if not host:
        return Endpoint(socket=settings.socket or os.environ.get("MIGRATOR_SOCKET") or SOCKET)
    files = [_read(CLIENT_FILE), _read(AGENT_FILE)]
    return Endpoint(
        address=_address(host, files),
        ca=_tls_file("ca", settings.ca, files),
        cert=_tls_file("cert", settings.cert, files),
        key=_tls_file("key", settings.key, files),
    )


def peer_names() -> list[str]:
    """Hosts that the files on this machine name, for shell completion."""
    return sorted({name for file in (CLIENT_FILE, AGENT_FILE) for name in _table(_read(file), "peers")})


def _address(host: str, files: list[dict[str, Any]]) -> str:
    for file in files:
        peer = _table(file, "peers").get(host)
        if isinstance(peer, dict):
            peer = peer.get("address")
        if isinstance(peer, str):
            return peer
    if ":" in host or "." in host:
        return host if _has_port(host) else f"{host}:{DEFAULT_PORT}"
    raise InvalidArgument(
        f"host {host!r} is not in [peers] of {CLIENT_FILE} or {AGENT_FILE}; give its address as HOST:PORT"
    )


def _has_port(host: str) -> bool:
    return host.rpartition("]")[2].count(":") == 1 or (host.count(":") == 1)


def _tls_file(name: str, option: str | None, files: list[dict[str, Any]]) -> Path:
    given = option or os.environ.get(f"MIGRATOR_{name.upper()}")
    aliases = {"ca": ("ca",), "cert": ("cert", "certificate"), "key": ("key",)}[name]
    for file in files:
        for alias in aliases:
            given = given or _table(file, "tls").get(alias)
    if not given:
        raise InvalidArgument(
            f"a remote host needs --{name} (or MIGRATOR_{name.upper()}, or [tls] {name} in {CLIENT_FILE})"
        )
    return Path(given)


def _table(file: dict[str, Any], name: str) -> dict[str, Any]:
    table = file.get(name, {})
    return table if isinstance(table, dict) else {}


def _read(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            return tomllib.load(file)
    except (FileNotFoundError, PermissionError):
        return {}
    except tomllib.TOMLDecodeError as error:
        raise InvalidArgument(f"{path} cannot be read: {error}") from error
