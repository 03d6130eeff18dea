"""Preflight at the destination: everything that would make a container impossible here, found without touching it."""

import os
import platform
from collections.abc import Iterator
from pathlib import Path

from agent.assembly import ports
from agent.managers import Managers
from agent.network import is_own
from agent.publish import check_free
from blockdev import pool
from migrator.errors import MigratorError, NotFound
from migrator.v1 import container_pb2, peer_pb2
from migrator.wire import memory_available_bytes

# Beside the container's own bytes: the file systems' and the images' bookkeeping.
SPARE_BYTES = 64 << 20


def objections(
    managers: Managers, request: peer_pb2.ExamineRequest, cpu_flags: frozenset[str]
) -> Iterator[peer_pb2.Objection]:
    """Everything that speaks against it, each with its reason."""
    host = managers.config.host
    spec: container_pb2.ContainerSpec = request.spec
    yield from _name(managers, request.container)
    others = [record for record in managers.containers.all() if record.name != request.container]
    wanted = _addresses(spec)
    for other in others:
        for address in sorted(wanted & _addresses(other.spec)):
            message = f"address {address} belongs to container {other.name} on {host}"
            yield peer_pb2.Objection(reason="ADDRESS_IN_USE", message=message)
    for address in sorted(wanted):
        if is_own(address):
            message = f"address {address} is one of {host}'s own"
            yield peer_pb2.Objection(reason="ADDRESS_IN_USE", message=message)
    for bridge in sorted({interface.bridge for interface in spec.interfaces}):
        if not Path("/sys/class/net", bridge, "bridge").is_dir():
            yield peer_pb2.Objection(reason="NO_SUCH_BRIDGE", message=f"{host} has no bridge {bridge}")
    try:
        check_free(ports(spec), besides=request.container)
    except MigratorError as error:
        yield peer_pb2.Objection(reason=error.reason, message=f"{host}: {error}")
    for bind in spec.binds:
        if not os.path.lexists(bind.source):
            message = f"{bind.source}, a bind mount of {request.container}, does not exist on {host}"
            yield peer_pb2.Objection(reason="BIND_MOUNT_MISSING", message=message)
    yield from _room(managers, request)
    missing = set(request.cpu_flags) - cpu_flags
    if missing and request.cpu_flags:
        message = f"{host}'s processors lack {', '.join(sorted(missing)[:8])}, which the container may be using"
        yield peer_pb2.Objection(reason="CPU_FLAGS_MISSING", message=message)


def _name(managers: Managers, name: str) -> Iterator[peer_pb2.Objection]:
    try:
        record = managers.containers.record(name)
    except NotFound:
        return
    what = "is on its way there" if record.state == "arriving" else f"exists there ({record.state})"
    message = f"a container {name} {what}: {managers.config.host} cannot take another one of that name"
    yield peer_pb2.Objection(reason="NAME_TAKEN", message=message)


def _room(managers: Managers, request: peer_pb2.ExamineRequest) -> Iterator[peer_pb2.Objection]:
    host = managers.config.host
    free = pool.room(managers.volumes.folder).available_bytes
    needed = request.disk_bytes + SPARE_BYTES
    if free < needed:
        message = f"no room on {host}: the disk needs {needed >> 20} MiB, {free >> 20} MiB are free"
        yield peer_pb2.Objection(reason="NO_SPACE", message=message)
    # The images wait in memory until they are restored, so the container's pages are there twice for a moment.
    available, wanted = memory_available_bytes(), 2 * request.memory_bytes
    if available < wanted:
        message = f"not enough memory on {host}: {wanted >> 20} MiB are needed, {available >> 20} MiB are available"
        yield peer_pb2.Objection(reason="NO_MEMORY", message=message)


def _addresses(spec: container_pb2.ContainerSpec) -> set[str]:
    return {address.partition("/")[0] for interface in spec.interfaces for address in interface.addresses}


def cpu_flags() -> frozenset[str]:
    """The flags of the first processor in /proc/cpuinfo; empty where there are none."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("flags"):
            return frozenset(line.partition(":")[2].split())
    return frozenset()


def kernel() -> str:
    """The kernel's release."""
    return platform.release()
