"""A container's spec as it was asked for, checked and completed with what was left open."""

import os
import re
from pathlib import Path, PurePosixPath

from agent import oci
from blockdev import loop
from blockdev.formats.disk import LARGEST_BYTES
from migrator.errors import InvalidArgument
from migrator.v1.container_pb2 import ContainerSpec, Volume

NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,30}")
HOSTNAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,61}[A-Za-z0-9])?")
DEFAULT_DISK_BYTES = 10 << 30
# What each mkfs makes at the least.
MINIMUM_DISK_BYTES = {"ext4": 16 << 20, "xfs": 300 << 20, "btrfs": 128 << 20}
MINIMUM_MEMORY_BYTES = 6 << 20
# A move takes room for a copy of it at both hosts.
MINIMUM_SHM_BYTES, MAXIMUM_SHM_BYTES = 1 << 20, 1 << 30
MAXIMUM_VOLUMES = 16
FILESYSTEMS = ("ext4", "xfs", "btrfs")
# Mounted by the runtime; a volume or a bind mount there would hide what the container cannot do without.
RESERVED = ("/", "/proc", "/sys", "/dev", "/dev/pts", "/dev/shm", "/dev/mqueue")


def check_name(name: str) -> str:
    """The name, if it can be a container's: it becomes part of paths, control groups and namespaces."""
    if not NAME.fullmatch(name):
        raise InvalidArgument(f"{name!r} cannot be a container's name: 1 to 31 lower case letters, digits and dashes")
    return name


def variable(item: str) -> str:
    """What may be said in a log of an environment variable: its name."""
    name, equals, _ = item.partition("=")
    return repr(name) if equals else "without a name"


def complete(name: str, spec: ContainerSpec, image_filesystem: str) -> ContainerSpec:
    """A checked copy with hostname and volumes filled in; its bind mounts are on this host. Raises InvalidArgument."""
    result = _complete(name, spec, image_filesystem)
    check_binds(result)
    for volume in result.volumes:
        # What is beyond the last whole block of a device cannot be read or written through it, but mkfs writes there.
        volume.size_bytes = -(-volume.size_bytes // loop.BLOCK_BYTES) * loop.BLOCK_BYTES
    if len(result.volumes) > MAXIMUM_VOLUMES:
        raise InvalidArgument(f"{len(result.volumes)} volumes are too many: {MAXIMUM_VOLUMES} are possible")
    if result.ports and not any(interface.addresses for interface in result.interfaces):
        raise InvalidArgument(f"{name} has no address that its ports could be forwarded to: give one, or --ip auto")
    return result


def _complete(name: str, spec: ContainerSpec, image_filesystem: str) -> ContainerSpec:
    result = ContainerSpec()
    result.CopyFrom(spec)
    result.hostname = spec.hostname or name
    if not HOSTNAME.fullmatch(result.hostname):
        raise InvalidArgument(f"{result.hostname!r} cannot be a hostname: letters, digits, dashes and dots, at most 63")
    _check_process(result)
    _check_limits(result)
    _complete_volumes(result, image_filesystem)
    _check_targets(result)
    for bind in result.binds:
        source = Path(bind.source)
        if not source.is_absolute() or ".." in source.parts:
            raise InvalidArgument(f"bind mount source {bind.source!r} is not an absolute path")
    return result


def _check_process(spec: ContainerSpec) -> None:
    oci.capabilities(spec)
    for argument in spec.command:
        if "\0" in argument:
            raise InvalidArgument("an argument of the command holds a zero byte")
    if spec.command and not spec.command[0]:
        raise InvalidArgument("the command is empty")
    for item in spec.environment:
        if "=" not in item or item.startswith("=") or "\0" in item:
            # Its value may be a secret, and this comes into logs.
            raise InvalidArgument(f"environment variable {variable(item)} is not given as NAME=value")
    if spec.working_directory and not spec.working_directory.startswith("/"):
        raise InvalidArgument(f"working directory {spec.working_directory!r} does not begin with /")


def _check_limits(spec: ContainerSpec) -> None:
    if spec.memory_limit_bytes < 0 or 0 < spec.memory_limit_bytes < MINIMUM_MEMORY_BYTES:
        raise InvalidArgument(
            f"a memory limit of {spec.memory_limit_bytes} bytes is too small: at least 6 MiB, or 0 for none"
        )
    if spec.cpu_millis < 0 or 0 < spec.cpu_millis < 10:
        raise InvalidArgument(f"{spec.cpu_millis} thousandths of a CPU are too few: at least 10, or 0 for no limit")
    if spec.shm_bytes and not MINIMUM_SHM_BYTES <= spec.shm_bytes <= MAXIMUM_SHM_BYTES:
        raise InvalidArgument(f"a /dev/shm of {spec.shm_bytes} bytes is not possible: 1 MiB to 1 GiB, or 0 for 64 MiB")
    if spec.pids_limit < 0:
        raise InvalidArgument(f"a limit of {spec.pids_limit} processes makes no sense: 0 is no limit")


def _complete_volumes(spec: ContainerSpec, image_filesystem: str) -> None:
    if not any(volume.mount_point == "/" for volume in spec.volumes):
        given = list(spec.volumes)
        del spec.volumes[:]
        spec.volumes.extend([Volume(mount_point="/"), *given])
    if spec.volumes[0].mount_point != "/":
        raise InvalidArgument("the first volume has to be the one at /")
    for index, volume in enumerate(spec.volumes):
        volume.ClearField("allocated_bytes")
        volume.size_bytes = volume.size_bytes or DEFAULT_DISK_BYTES
        if index == 0:
            if volume.filesystem not in ("", image_filesystem):
                raise InvalidArgument(
                    f"image {spec.image} has a file system of kind {image_filesystem}: "
                    f"a volume of it cannot be {volume.filesystem}"
                )
            volume.filesystem = image_filesystem
        volume.filesystem = volume.filesystem or "ext4"
        if volume.filesystem not in FILESYSTEMS:
            raise InvalidArgument(f"file system {volume.filesystem!r} is not one of {', '.join(FILESYSTEMS)}")
        smallest = MINIMUM_DISK_BYTES[volume.filesystem]
        if volume.size_bytes > LARGEST_BYTES:
            raise InvalidArgument(f"volume {volume.mount_point} of {volume.size_bytes} bytes is too large")
        if volume.size_bytes < smallest:
            raise InvalidArgument(
                f"volume {volume.mount_point} of {volume.size_bytes} bytes is too small: "
                f"{volume.filesystem} takes at least {smallest >> 20} MiB"
            )


def _check_targets(spec: ContainerSpec) -> None:
    taken: set[str] = set()
    for target in [*(v.mount_point for v in spec.volumes[1:]), *(b.target for b in spec.binds)]:
        path = PurePosixPath(target)
        if not target.startswith("/") or ".." in path.parts or "\0" in target or str(path) in RESERVED:
            raise InvalidArgument(f"{target!r} cannot be a mount point in a container")
        if path.parts[1] in ("proc", "sys"):
            raise InvalidArgument(f"{target!r} cannot be a mount point in a container: it is the kernel's")
        if str(path) in taken:
            raise InvalidArgument(f"two volumes or bind mounts at {target}")
        taken.add(str(path))


def check_binds(spec: ContainerSpec) -> None:
    """Whether the folders of the bind mounts are on this host; asked again at each start."""
    for bind in spec.binds:
        if not os.path.lexists(bind.source):
            raise InvalidArgument(f"bind mount source {bind.source} does not exist on this host")


def check_arrival(name: str, spec: ContainerSpec) -> None:
    """Whether a spec that another host has sent could have been made by `complete`. Raises InvalidArgument.

    Bind mounts that are missing here are not looked for: they are an objection of their own.
    """
    check_name(name)
    kinds = [volume.filesystem for volume in spec.volumes]
    if not kinds or len(kinds) > MAXIMUM_VOLUMES:
        raise InvalidArgument(f"{name} comes with {len(kinds)} volumes: 1 to {MAXIMUM_VOLUMES} are possible")
    if _complete(name, spec, kinds[0]) != _without_usage(spec):
        raise InvalidArgument(f"the spec of {name} is not complete")


def _without_usage(spec: ContainerSpec) -> ContainerSpec:
    result = ContainerSpec()
    result.CopyFrom(spec)
    for volume in result.volumes:
        volume.ClearField("allocated_bytes")
    return result
