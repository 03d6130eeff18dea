"""What a container stands on, put together and taken apart: volumes, mounts, network namespace and OCI bundle.

A container that does not run has none of it but its image files: it is at rest.
"""

import json
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Protocol

from agent import oci, rootfs, shm_folder
from agent.runtime import Runtime
from blockdev.volume import MountedVolume, VolumeStore
from migrator.errors import ExecutionError
from migrator.network import Interface, PublishedPort
from migrator.v1 import container_pb2
from migrator.v1.container_pb2 import ContainerSpec

RESOLV_CONF = Path("/etc/resolv.conf")


class Networks(Protocol):
    """The containers' network namespaces (`agent.network`)."""

    def create(self, container: str, interfaces: Sequence[Interface]) -> Path: ...

    def destroy(self, container: str) -> None: ...

    def connect(self, container: str, interfaces: Sequence[Interface]) -> None: ...

    def disconnect(self, container: str, interfaces: Sequence[Interface]) -> None: ...

    def announce(self, container: str, interfaces: Sequence[Interface]) -> None: ...


class Publisher(Protocol):
    """Ports of the host that are forwarded to containers."""

    def publish(self, container: str, interfaces: Sequence[Interface], ports: Sequence[PublishedPort]) -> None: ...

    def unpublish(self, container: str) -> None: ...


class Assembly:
    """Puts containers together from a host's volumes and networks."""

    def __init__(self, runtime: Runtime, volumes: VolumeStore, networks: Networks, publisher: Publisher) -> None:
        self._runtime = runtime
        self._volumes = volumes
        self._networks = networks
        self._publisher = publisher

    def create(self, name: str, spec: ContainerSpec, image: Path) -> None:
        """Make the volumes of a new container, the first one cloned from `image`; undone if it fails."""
        with ExitStack() as undo:
            undo.callback(self.delete, name, spec)
            paths = self._runtime.paths(name)
            paths.bundle.mkdir(parents=True, mode=0o700, exist_ok=True)
            for index, volume in enumerate(spec.volumes):
                kind = (volume_name(name, index), volume.size_bytes, volume.filesystem)
                if index == 0:
                    self._volumes.clone(image, *kind)
                else:
                    self._volumes.create(*kind)
            self.mount(name, spec)
            try:
                addresses = [address for interface in interfaces(spec) for address in interface.addresses]
                resolver = RESOLV_CONF.read_text() if RESOLV_CONF.exists() else ""
                rootfs.write_identity(paths.rootfs, spec.hostname or name, addresses, resolver)
            finally:
                self._unmount(name, spec)
            undo.pop_all()

    def delete(self, name: str, spec: ContainerSpec) -> None:
        """Delete the volumes, the log and the bundle; repeatable."""
        self._unmount(name, spec)
        for index in range(len(spec.volumes)):
            self._volumes.delete(volume_name(name, index))
        bundle = self._runtime.paths(name).bundle
        if bundle.exists():
            shutil.rmtree(bundle)

    def up(self, name: str, spec: ContainerSpec) -> None:
        """Mount, make the network and write config.json; undone if it fails. The network is not yet connected."""
        with ExitStack() as undo:
            undo.callback(self.down, name, spec)
            self.mount(name, spec)
            shm_folder.mount(self._runtime.paths(name).shm, spec.shm_bytes)
            self._networks.create(name, interfaces(spec))
            self.write_bundle(name, spec)
            undo.pop_all()

    def connect(self, name: str, spec: ContainerSpec) -> None:
        """Attach the links, tell the network, forward the published ports."""
        links = interfaces(spec)
        self._networks.connect(name, links)
        self._networks.announce(name, links)
        self.publish(name, spec)

    def publish(self, name: str, spec: ContainerSpec) -> None:
        """Forward the published ports of this host to the container."""
        self._publisher.publish(name, interfaces(spec), ports(spec))

    def down(self, name: str, spec: ContainerSpec) -> None:
        """Undo `connect` and `up`; repeatable, and right whatever part of it is there.

        Raises BlockError as long as a process that is none of the container's keeps a volume mounted.
        """
        self._publisher.unpublish(name)
        self._networks.destroy(name)
        self._unmount(name, spec)

    def write_bundle(self, name: str, spec: ContainerSpec) -> None:
        """Write config.json; the root volume is mounted, since the user is looked up there."""
        paths = self._runtime.paths(name)
        user = rootfs.find_user(paths.rootfs, spec.user)
        value = oci.config(
            name,
            spec,
            user,
            shm=paths.shm,
            volumes=paths.volumes,
            cgroup=self._runtime.cgroup(name).path,
            netns=paths.netns,
        )
        temporary = paths.bundle / "config.json.new"
        temporary.write_text(json.dumps(value, indent=1))
        temporary.replace(paths.bundle / "config.json")

    def mounted(self, name: str, spec: ContainerSpec) -> list[MountedVolume]:
        """The mounted volumes in the order of the spec. Raises ExecutionError if one is not mounted."""
        result = []
        for index, at in enumerate(self.mount_points(name, spec)):
            found = self._volumes.find_mounted(volume_name(name, index), at)
            if found is None:
                raise ExecutionError(f"volume {volume_name(name, index)} is not mounted at {at}")
            result.append(found)
        return result

    def disk_bytes(self, name: str, spec: ContainerSpec) -> list[int]:
        """What each volume takes on the host; 0 for one that is not there, as while the container is being removed."""
        return [self._volumes.allocated_bytes(volume_name(name, index)) for index in range(len(spec.volumes))]

    def mount_points(self, name: str, spec: ContainerSpec) -> list[Path]:
        """Where the volumes are mounted, in the order of the spec."""
        paths = self._runtime.paths(name)
        return [paths.rootfs, *(paths.volumes / str(index) for index in range(1, len(spec.volumes)))]

    def mount(self, name: str, spec: ContainerSpec) -> None:
        """Attach and mount the volumes; repeatable."""
        for index, at in enumerate(self.mount_points(name, spec)):
            at.mkdir(parents=True, exist_ok=True)
            if self._volumes.find_mounted(volume_name(name, index), at) is None:
                self._volumes.open(volume_name(name, index), spec.volumes[index].filesystem).mount(at)

    def _unmount(self, name: str, spec: ContainerSpec) -> None:
        # From the last to the first; what fails with one is raised when all have been seen to.
        with ExitStack() as each:
            for index, at in enumerate(self.mount_points(name, spec)):
                each.callback(self._unmount_volume, volume_name(name, index), at)
            each.callback(shm_folder.unmount, self._runtime.paths(name).shm)

    def _unmount_volume(self, volume: str, at: Path) -> None:
        mounted = self._volumes.find_mounted(volume, at)
        if mounted is not None:
            mounted.unmount()
        else:
            self._volumes.let_go(volume)


def volume_name(name: str, index: int) -> str:
    """The name of a container's volume in the store."""
    return f"{name}-{index}"


def interfaces(spec: ContainerSpec) -> list[Interface]:
    """The spec's interfaces, which are complete, as values."""
    return [
        Interface(
            name=interface.name,
            mac=interface.mac,
            bridge=interface.bridge,
            ipv4=tuple(address for address in interface.addresses if ":" not in address),
            ipv6=tuple(address for address in interface.addresses if ":" in address),
            gateway4=interface.gateway4 or None,
            gateway6=interface.gateway6 or None,
        )
        for interface in spec.interfaces
    ]


def ports(spec: ContainerSpec) -> list[PublishedPort]:
    """The spec's published ports as values."""
    return [_port(port) for port in spec.ports]


def _port(port: container_pb2.PublishedPort) -> PublishedPort:
    return PublishedPort(port.host_port, port.container_port, port.protocol or "tcp")
