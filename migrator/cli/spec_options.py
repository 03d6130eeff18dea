"""The options of `migrator create` as a ContainerSpec; what is malformed is an InvalidArgument."""

import ipaddress
import re
from typing import Any

from migrator.errors import InvalidArgument
from migrator.units import parse_size
from migrator.v1 import container_pb2

RESTART = {
    "no": container_pb2.RESTART_POLICY_NO,
    "on-failure": container_pb2.RESTART_POLICY_ON_FAILURE,
    "always": container_pb2.RESTART_POLICY_ALWAYS,
}
MAC = re.compile(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}")


def build_spec(given: dict[str, Any]) -> container_pb2.ContainerSpec:
    """The spec that these options ask for; what they leave open is the agent's to fill in."""
    spec = container_pb2.ContainerSpec(
        image=given["image"],
        command=given["command"],
        environment=[check_environment(item) for item in given["environment"]],
        working_directory=given["workdir"],
        user=given["user"],
        hostname=given["hostname"],
        add_capabilities=[capability(name) for name in given["cap_add"]],
        drop_capabilities=[capability(name) for name in given["cap_drop"]],
        memory_limit_bytes=given["memory"] or 0,
        shm_bytes=given["shm_size"] or 0,
        cpu_millis=round((given["cpus"] or 0) * 1000),
        pids_limit=given["pids"] or 0,
        interfaces=interfaces(given),
        ports=[port(text) for text in given["ports"]],
        binds=[bind(text) for text in given["binds"]],
        restart_policy=RESTART[given["restart"]],
        seccomp_unconfined=given["seccomp"] == "unconfined",
    )
    extra = [volume(text) for text in given["volumes"]]
    if given["disk"] or given["fs"] or extra:
        root = container_pb2.Volume(mount_point="/", size_bytes=given["disk"] or 0, filesystem=given["fs"] or "")
        spec.volumes.extend([root, *extra])
    return spec


def check_environment(item: str) -> str:
    """NAME=value as it is."""
    if not item.partition("=")[0] or "=" not in item:
        raise InvalidArgument(f"environment {item!r} is not NAME=value")
    return item


def capability(name: str) -> str:
    """net_admin and CAP_NET_ADMIN are the same."""
    return "CAP_" + name.upper().removeprefix("CAP_")


def interfaces(given: dict[str, Any]) -> list[container_pb2.Interface]:
    """The interface that --ip and --ip6 describe, if they are given, and one for each --net."""
    found = []
    if given["ips"] or given["ip6s"] or given["gateway"] or given["gateway6"]:
        addresses = [address(text, 4) for text in given["ips"]] + [address(text, 6) for text in given["ip6s"]]
        found.append(
            container_pb2.Interface(
                addresses=addresses,
                gateway4=_gateway(given["gateway"], 4),
                gateway6=_gateway(given["gateway6"], 6),
            )
        )
    return found + [interface(text) for text in given["nets"]]


def interface(text: str) -> container_pb2.Interface:
    """name=eth1,bridge=br1,ip=10.0.0.2/24,ip=fd00::2/64,mac=02:…,gateway=10.0.0.1."""
    made = container_pb2.Interface()
    for part in text.split(","):
        key, equals, value = part.partition("=")
        if not equals or not value:
            raise InvalidArgument(f"--net {text!r}: {part!r} is not KEY=VALUE")
        match key:
            case "name":
                made.name = value
            case "bridge":
                made.bridge = value
            case "mac":
                made.mac = _mac(value)
            case "ip" | "ip6":
                made.addresses.append(address(value, 6 if key == "ip6" else 0))
            case "gateway":
                made.gateway4 = _gateway(value, 4)
            case "gateway6":
                made.gateway6 = _gateway(value, 6)
            case _:
                raise InvalidArgument(f"--net {text!r}: {key!r} is not one of name, bridge, ip, mac, gateway, gateway6")
    return made


def address(text: str, version: int) -> str:
    """An address with its prefix length, in its usual spelling, or auto; version 0 takes either."""
    if text == "auto":
        return f"auto{version or ''}"
    if "/" not in text:
        raise InvalidArgument(f"address {text!r} has no prefix length: write it like 10.77.2.101/16")
    try:
        parsed = ipaddress.ip_interface(text)
    except ValueError as error:
        raise InvalidArgument(f"{text!r} is not an address: {error}") from error
    if version and parsed.version != version:
        raise InvalidArgument(f"{text!r} is not an IPv{version} address")
    return str(parsed)


def port(text: str) -> container_pb2.PublishedPort:
    """8080:80 or 53:53/udp."""
    match = re.fullmatch(r"(\d{1,5}):(\d{1,5})(?:/(tcp|udp))?", text)
    if not match or not all(1 <= int(number) <= 65535 for number in match.groups()[:2]):
        raise InvalidArgument(f"{text!r} does not publish a port: write it like 8080:80 or 5353:53/udp")
    return container_pb2.PublishedPort(
        host_port=int(match[1]), container_port=int(match[2]), protocol=match[3] or "tcp"
    )


def volume(text: str) -> container_pb2.Volume:
    """/data=10GiB or /data=10GiB,xfs."""
    mount_point, equals, rest = text.partition("=")
    size, _, filesystem = rest.partition(",")
    if not equals or not mount_point.startswith("/") or filesystem not in ("", "ext4", "xfs", "btrfs"):
        raise InvalidArgument(f"{text!r} is not a volume: write it like /data=10GiB or /data=10GiB,xfs")
    return container_pb2.Volume(mount_point=mount_point, size_bytes=parse_size(size), filesystem=filesystem)


def bind(text: str) -> container_pb2.BindMount:
    """/srv/www:/var/www, with :ro and ,shared after it."""
    folders, *words = re.split(r"[:,](?=(?:ro|rw|shared)(?:[:,]|$))", text)
    source, colon, target = folders.partition(":")
    if not colon or not source.startswith("/") or not target.startswith("/"):
        raise InvalidArgument(f"{text!r} is not a bind mount: write it like /srv/www:/var/www:ro,shared")
    return container_pb2.BindMount(source=source, target=target, read_only="ro" in words, shared="shared" in words)


def _gateway(text: str, version: int) -> str:
    if not text:
        return ""
    try:
        parsed = ipaddress.ip_address(text)
    except ValueError as error:
        raise InvalidArgument(f"gateway {text!r} is not an address") from error
    if parsed.version != version:
        raise InvalidArgument(f"gateway {text!r} is not an IPv{version} address")
    return str(parsed)


def _mac(text: str) -> str:
    if not MAC.fullmatch(text.lower()) or int(text[:2], 16) & 1:
        raise InvalidArgument(f"{text!r} cannot be an interface's MAC: write it like 02:00:0a:4d:02:65")
    return text.lower()
