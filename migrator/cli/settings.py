"""Where the agent is and how output should look: from options, the environment and the client's configuration file."""

import os
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from migrator.channel import Tls
from migrator.errors import InvalidArgument

SOCKET = "/run/migrator/agent.sock"
CLIENT_FILE = Path("/etc/migrator/client.toml")
AGENT_FILE = Path("/etc/migrator/config.toml")
TLS_FILES = {
    "ca": "/etc/migrator/ca.crt",
    "certificate": "/etc/migrator/host.crt",
    "key": "/etc/migrator/host.key",
}


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
    """Either a local socket, or host:port with an identity; `name` is what the server's certificate must carry."""

    socket: Path | None
    address: str
    name: str
    tls: Tls

    def __str__(self) -> str:
        return f"this machine ({self.socket})" if self.socket is not None else self.name or self.address


def endpoint(settings: Settings) -> Endpoint:
    """The agent to ask. Options win over the environment, and that over client.toml and the agent's own config.toml.

    Raises InvalidArgument for a host without an address.
    """
    files = [_read(CLIENT_FILE), _read(AGENT_FILE)]
    tls = Tls(
        ca=_tls_file("ca", settings.ca or os.environ.get("MIGRATOR_CA"), files),
        certificate=_tls_file("certificate", settings.cert or os.environ.get("MIGRATOR_CERT"), files),
        key=_tls_file("key", settings.key or os.environ.get("MIGRATOR_KEY"), files),
    )
    host = settings.host or (None if settings.socket else os.environ.get("MIGRATOR_HOST"))
    if not host:
        return Endpoint(Path(settings.socket or os.environ.get("MIGRATOR_SOCKET") or SOCKET), "", "", tls)
    for file in files:
        address = _table(file, "peers").get(host)
        if isinstance(address, str):
            return Endpoint(None, address, host, tls)
    if not host.rpartition(":")[2].isdigit() or ":" not in host:
        raise InvalidArgument(f"host {host!r} is not in [peers] of {CLIENT_FILE} or {AGENT_FILE}: give it as HOST:PORT")
    return Endpoint(None, host, "", tls)


def peer_names() -> list[str]:
    """Hosts that the files on this machine name, for shell completion."""
    return sorted({name for file in (CLIENT_FILE, AGENT_FILE) for name in _table(_read(file), "peers")})


def _tls_file(name: str, given: str | None, files: list[dict[str, Any]]) -> Path:
    for file in files:
        found = _table(file, "tls").get(name)
        if not given and isinstance(found, str):
            given = found
    return Path(given or TLS_FILES[name])


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
