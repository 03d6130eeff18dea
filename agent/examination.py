"""Preflight at the destination: everything that would make a container impossible here, found without touching it."""

import os
import platform
import re
from collections.abc import Iterable, Iterator
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
# Of the flags in /proc/cpuinfo, those of instructions that a program may have found. The others are about the kernel,
# and differ from one version of it to the next (arch/x86/include/asm/cpufeatures.h, Linux 6.18).
_INSTRUCTIONS = re.compile(
    r"3dnow\w*|abm|adx|aes|amx_\w+|avx\w*|bmi[12]|cldemote|clflush\w*|clwb|clzero|cmov|cmpccxadd|cx8|cx16|enqcmd|erms"
    r"|f16c|fma4?|fpu|fsgsbase|fsrm|fxsr|gfni|hle|kl|lahf_lm|lwp|misalignsse|mmx\w*|movbe|movdir\w+|movrs|mwaitx|ospke"
    r"|pclmulqdq|pni|popcnt|prefetchi|ptwrite|raoint|rdpid|rdpru|rdrand|rdseed|rdtscp|rtm|serialize|sha\w+|sm[34]|sse\w*"
    r"|ssse3|tbm|tsc|user_shstk|vaes|vpclmulqdq|waitpkg|wbnoinvd|widekl|xgetbv1|xop|xsave|xsavec|xsaveopt"
)


def objections(
    managers: Managers, request: peer_pb2.ExamineRequest, cpu_flags: frozenset[str], criu_version: str
) -> Iterator[peer_pb2.Objection]:
    """Everything that speaks against it, each with its reason. The last two are what this host has."""
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
    if missing := missing_instructions(cpu_flags, request.cpu_flags):
        message = f"{host}'s processors lack {', '.join(missing[:8])}, which the container may be using"
        yield peer_pb2.Objection(reason="CPU_FLAGS_MISSING", message=message)
    # CRIU reads what older ones have written; only numbers of two places have brought images of another kind.
    if request.memory_bytes and is_older(criu_version, request.criu_version):
        message = (
            f"CRIU {criu_version} of {host} is older than the source's {request.criu_version}, whose checkpoints it "
            "may not understand: run scripts/setup there"
        )
        yield peer_pb2.Objection(reason="CRIU_OLDER", message=message)


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
    needed = max(0, request.disk_bytes - _base_bytes(managers, request.spec)) + SPARE_BYTES
    if free < needed:
        message = f"no room on {host}: the disk needs {needed >> 20} MiB, {free >> 20} MiB are free"
        yield peer_pb2.Objection(reason="NO_SPACE", message=message)
    # The images wait in memory until they are restored, so the container's pages are there twice for a moment.
    available, wanted = memory_available_bytes(), 2 * request.memory_bytes
    if available < wanted:
        message = f"not enough memory on {host}: {wanted >> 20} MiB are needed, {available >> 20} MiB are available"
        yield peer_pb2.Objection(reason="NO_MEMORY", message=message)


def _base_bytes(managers: Managers, spec: container_pb2.ContainerSpec) -> int:
    """What the container's image takes here, if it is here: a volume shares with it what is the same. How much that is
    shows when it is sent, and a piece for which there is no room is refused then."""
    try:
        return managers.images.get(spec.image).path.stat().st_blocks * 512
    except (NotFound, FileNotFoundError):
        return 0


def _addresses(spec: container_pb2.ContainerSpec) -> set[str]:
    return {address.partition("/")[0] for interface in spec.interfaces for address in interface.addresses}


def cpu_flags() -> frozenset[str]:
    """The flags of the first processor in /proc/cpuinfo; empty where there are none."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("flags"):
            return frozenset(line.partition(":")[2].split())
    return frozenset()


def missing_instructions(here: Iterable[str], there: Iterable[str]) -> list[str]:
    """Of the flags of two processors, those of instructions that only the one there has, in order."""
    return sorted(flag for flag in set(there) - set(here) if _INSTRUCTIONS.fullmatch(flag))


def is_older(here: str, there: str) -> bool:
    """Whether one version is before another, by its first two numbers; False where one is not known."""
    mine, theirs = (tuple(int(number) for number in re.findall(r"\d+", text)[:2]) for text in (here, there))
    return bool(mine and theirs) and mine < theirs


def kernel() -> str:
    """The kernel's release."""
    return platform.release()
