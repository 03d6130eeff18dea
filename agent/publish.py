"""Published ports: an nftables table per container forwards ports of the host to it, `inet migrator-<container>`.

All forwarded traffic is masqueraded, so that answers come back through this host also where the container would reach
the client directly; the container sees the host's address. A connection to a published port ends when the container
moves: it was made with the host that the container has left.
"""

import errno
import ipaddress
import json
import re
import socket
import subprocess
import threading
from collections.abc import Sequence
from pathlib import Path

from migrator.errors import ExecutionError, InvalidArgument, Precondition
from migrator.network import PublishedPort

TABLE_PREFIX = "migrator-"
_TIMEOUT_S = 10.0
_lock = threading.Lock()


def publish(container: str, address: str, ports: Sequence[PublishedPort]) -> None:
    """Forward the ports to the container's address (no prefix length); replaces what was published for it before.

    Raises Precondition (PORT_IN_USE), ExecutionError.
    """
    with _lock:
        check_free(ports, besides=container)
        if not ports:
            _nft(_removal(container))
            return
        target = ipaddress.ip_address(address)
        forwarding = "ipv4/ip_forward" if target.version == 4 else "ipv6/conf/all/forwarding"
        Path("/proc/sys/net", forwarding).write_text("1")
        _nft(_removal(container) + ruleset(container, address, ports))


def unpublish(container: str) -> None:
    """Stop forwarding to the container; repeatable."""
    with _lock:
        _nft(_removal(container))


def published() -> dict[str, list[tuple[str, int, str]]]:
    """What this host forwards, by container: protocol, port, and the host's address or nothing."""
    found: dict[str, list[tuple[str, int, str]]] = {}
    for entry in json.loads(_nft("", "-j", "list", "ruleset") or "{}").get("nftables", []):
        table = entry.get("table", {}).get("name", "")
        if table.startswith(TABLE_PREFIX):
            found.setdefault(table.removeprefix(TABLE_PREFIX), [])
        rule = entry.get("rule", {})
        comment = rule.get("comment", "").split(" ")
        if rule.get("table", "").startswith(TABLE_PREFIX) and rule.get("chain") == "arriving" and len(comment) == 3:
            protocol, port, address = comment
            found.setdefault(rule["table"].removeprefix(TABLE_PREFIX), []).append(
                (protocol, int(port), "" if address == "any" else address)
            )
    return found


def check_free(ports: Sequence[PublishedPort], besides: str = "") -> None:
    """Raise Precondition (PORT_IN_USE) if a port is published for another container or a process listens on it."""
    others = {name: taken for name, taken in published().items() if name != besides}
    mine = published().get(besides, [])
    for position, port in enumerate(ports):
        for name, taken in others.items():
            for protocol, number, address in taken:
                if (protocol, number) == (port.protocol, port.host_port) and _overlap(address, port.host_address):
                    raise _in_use(port, f"it is published for container {name}")
        for earlier in ports[:position]:
            same = (earlier.protocol, earlier.host_port) == (port.protocol, port.host_port)
            if same and _overlap(earlier.host_address, port.host_address):
                raise InvalidArgument(f"port {port.host_port}/{port.protocol} is published twice")
        if (port.protocol, port.host_port, port.host_address) not in mine and _listened_on(port):
            raise _in_use(port, "a process listens on it")


def ruleset(container: str, address: str, ports: Sequence[PublishedPort]) -> str:
    """The table in nft's language. Only what is for the host itself is forwarded, not what a bridge passes through."""
    target = ipaddress.ip_address(address)
    family = "ip" if target.version == 4 else "ip6"
    loopback = "127.0.0.0/8" if target.version == 4 else "::1"
    shown = str(target) if target.version == 4 else f"[{target}]"
    rules = []
    for port in ports:
        if port.host_address and ipaddress.ip_address(port.host_address).version != target.version:
            raise InvalidArgument(f"published port {port}: its address and the container's {address} are of two kinds")
        match = f"{family} daddr {port.host_address} " if port.host_address else ""
        comment = f"{port.protocol} {port.host_port} {port.host_address or 'any'}"
        rules.append(
            f"meta nfproto {'ipv4' if target.version == 4 else 'ipv6'} {match}{family} daddr != {loopback} "
            f"fib daddr type local {port.protocol} dport {port.host_port} "
            f'dnat {family} to {shown}:{port.container_port} comment "{comment}"'
        )
    body = "\n".join(f"    {rule}" for rule in rules)
    return f"""table inet {_table(container)} {{
  chain arriving {{
    type nat hook prerouting priority dstnat; policy accept;
{body}
  }}
  chain here {{
    type nat hook output priority -100; policy accept;
{body}
  }}
  chain leaving {{
    type nat hook postrouting priority srcnat; policy accept;
    {family} daddr {target} ct status dnat masquerade
  }}
}}
"""


def _table(container: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_.-]+", container):
        raise InvalidArgument(f"{container!r} cannot be the name of a container")
    return f"{TABLE_PREFIX}{container}"


def _removal(container: str) -> str:
    """Declared first, so that deleting works also where there is none."""
    return f"table inet {_table(container)}\ndelete table inet {_table(container)}\n"


def _overlap(one: str, other: str) -> bool:
    return not one or not other or ipaddress.ip_address(one) == ipaddress.ip_address(other)


def _listened_on(port: PublishedPort) -> bool:
    """Found by binding to it for a moment; TCP with SO_REUSEADDR, which passes over connections that are closing."""
    kind = socket.SOCK_STREAM if port.protocol == "tcp" else socket.SOCK_DGRAM
    wanted = [port.host_address] if port.host_address else ["0.0.0.0", "::"]
    for address in wanted:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        try:
            with socket.socket(family, kind) as attempt:
                if family == socket.AF_INET6:
                    attempt.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                if kind == socket.SOCK_STREAM:
                    attempt.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                attempt.bind((address, port.host_port))
        except OSError as error:
            if error.errno in (errno.EADDRINUSE, errno.EACCES):
                return True
            if error.errno == errno.EAFNOSUPPORT:  # no IPv6 on this host
                continue
            raise Precondition(
                f"port {port} cannot be published on this host: {error.strerror}", reason="NO_SUCH_ADDRESS"
            ) from error
    return False


def _in_use(port: PublishedPort, why: str) -> Precondition:
    return Precondition(
        f"port {port.host_port}/{port.protocol} of this host cannot be published: {why}; choose another one",
        reason="PORT_IN_USE",
    )


def _nft(script: str, *arguments: str) -> str:
    """Run nft with the arguments, or with the script on its standard input if there are none."""
    try:
        result = subprocess.run(
            ["nft", *(arguments or ("-f", "-"))],
            input=script,
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ExecutionError(f"nft did not run: {error}") from error
    if result.returncode:
        raise ExecutionError(f"nft failed with {result.returncode}: {result.stderr.strip()[-500:]}")
    return result.stdout
