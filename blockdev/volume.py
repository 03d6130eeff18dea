"""Volumes: sparse image files in one folder, each with a file system, attached and mounted as they are needed."""

import os
import re
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

from blockdev import durable, filesystem, loop, reflink
from blockdev.errors import BlockError
from blockdev.loop import LoopDevice

NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
SUFFIX = ".img"
UNFINISHED = ".new"
# Where an XFS or btrfs is mounted while it is grown, beside its image.
MOUNT = ".mount"


@dataclass(frozen=True)
class MountedVolume:
    """A volume's file system where it is mounted, and the loop device under it."""

    device: LoopDevice
    at: Path

    def unmount(self) -> None:
        """Thaw, unmount and detach. A frozen file system that is unmounted would keep its device for ever."""
        filesystem.thaw(self.at)
        filesystem.unmount(self.at)
        self.device.detach()


@dataclass(frozen=True)
class Volume:
    """An image file with a file system of this kind."""

    path: Path
    kind: str

    @property
    def size_bytes(self) -> int:
        """What the file system sees."""
        return self.path.stat().st_size

    @property
    def allocated_bytes(self) -> int:
        """What the image takes on the host, shared with its clones or not."""
        return self.path.stat().st_blocks * 512

    def mount(self, at: Path) -> MountedVolume:
        """Attach and mount; undone if it fails."""
        device = loop.attach(self.path)
        try:
            filesystem.mount(device.path, at, self.kind)
        except BaseException:
            device.detach()
            raise
        return MountedVolume(device, at)


class VolumeStore:
    """The volumes of one folder. A file appears under its name only when it is complete and on the disk."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.folder = folder

    def create(self, name: str, size_bytes: int, kind: str) -> Volume:
        """A sparse image with an empty file system. Raises BlockError, also if the name is taken."""
        return self._finish(name, kind, lambda path: _empty(path, size_bytes, kind))

    def clone(self, source_image: Path, name: str, size_bytes: int, kind: str) -> Volume:
        """A clone of an image, grown to this size; it cannot be smaller than the image."""
        smallest = source_image.stat().st_size
        if size_bytes < smallest:
            raise BlockError(f"a volume of {size_bytes} bytes cannot be cloned from an image of {smallest}")

        def fill(path: Path) -> None:
            reflink.clone(source_image, path)
            if size_bytes > smallest:
                os.truncate(path, size_bytes)
                self._grow(Volume(path, kind))

        return self._finish(name, kind, fill)

    def replace(self, name: str, source_image: Path) -> None:
        """Let a volume at rest be a clone of this image, identity and size included; durable on return.

        Raises BlockError if there is no such volume, or it is attached. Interrupted, it is the one or the other.
        """
        path = self.open(name).path
        if loop.find(path):
            raise BlockError(f"volume {name} is in use: it cannot be replaced")
        unfinished = path.with_name(path.name + UNFINISHED)
        unfinished.unlink(missing_ok=True)
        try:
            reflink.clone(source_image, unfinished)
            durable.sync(unfinished)
            unfinished.rename(path)
        except BaseException:
            unfinished.unlink(missing_ok=True)
            raise
        durable.sync(self.folder)

    def receive(self, name: str, size_bytes: int, kind: str, base: Path | None = None) -> Volume:
        """A sparse image with nothing in it but what `base` has: the rest comes from elsewhere."""

        def fill(path: Path) -> None:
            if base is None:
                _sparse(path, size_bytes)
            else:
                reflink.clone(base, path)
                os.truncate(path, size_bytes)

        return self._finish(name, kind, fill)

    def open(self, name: str, kind: str = "") -> Volume:
        """A volume that is there; `kind` is needed only to mount it. Raises BlockError if there is none."""
        path = self._path(name)
        if not path.exists():
            raise BlockError(f"there is no volume {name} in {self.folder}")
        return Volume(path, kind)

    def allocated_bytes(self, name: str) -> int:
        """What a volume takes on the host; 0 if it is not there."""
        try:
            return Volume(self._path(name), "").allocated_bytes
        except FileNotFoundError:
            return 0

    def delete(self, name: str) -> None:
        """Delete the image, durably, and detach it should it still be attached; repeatable."""
        path = self._path(name)
        if path.exists():
            for device in loop.find(path):
                device.detach()
            path.unlink()
            # Its record goes next, in another file system: without one nobody would ever delete it.
            durable.sync(self.folder)

    def names(self) -> list[str]:
        """All volumes."""
        return sorted(path.name.removesuffix(SUFFIX) for path in self.folder.glob(f"*{SUFFIX}"))

    def sweep(self) -> None:
        """Delete what an interrupted creation has left, mounted or not.

        What fails is raised when all have been tried.
        """
        with ExitStack() as each:  # from the last to the first
            for path in self.folder.glob(f"*{UNFINISHED}"):
                each.callback(_discard, path)
            for at in self.folder.glob(f"*{UNFINISHED}{MOUNT}"):
                each.callback(_discard_mount, at)

    def release(self) -> list[str]:
        """Detach what is attached without being mounted, which a crash can leave. The names of these volumes.

        What fails is raised when all have been tried.
        """
        released = []
        with ExitStack() as each:
            for image, device in loop.find_all(self._path(name) for name in self.names()):
                if not device.is_mounted():
                    each.callback(device.detach)
                    released.append(image.name.removesuffix(SUFFIX))
        return released

    def let_go(self, name: str) -> None:
        """Detach what a volume that is mounted nowhere is still attached to; repeatable.

        Raises BlockError if it is mounted after all, in another mount namespace: who mounted it once more, on another
        device, would destroy what is in it.
        """
        path = self._path(name)
        for device in loop.find(path) if path.exists() else []:
            if device.is_mounted():
                raise BlockError(
                    f"volume {name} is still mounted, by {device.path}, in the mount namespace of some process that has"
                    f" entered it, with nsenter say: end that (`grep -l {device.path} /proc/[0-9]*/mounts` finds it)"
                )
            device.detach()

    def find_mounted(self, name: str, at: Path) -> MountedVolume | None:
        """The volume as it is mounted there; None if it is not, or not at all."""
        path = self._path(name)
        if not path.exists() or not filesystem.is_mounted(at):
            return None
        mounted_from = None
        with suppress(OSError):  # it has shut down
            mounted_from = at.stat().st_dev
        for device in loop.find(path):
            # btrfs has device numbers of its own; its one mount at this place is told by /proc/self/mountinfo.
            if device.path.stat().st_rdev == mounted_from or filesystem.mounted_source(at) == str(device.path):
                return MountedVolume(device, at)
        return None

    def _grow(self, volume: Volume) -> None:
        if volume.kind == "ext4":
            filesystem.grow_image(volume.path)
            return
        at = self.folder / f"{volume.path.name}{MOUNT}"
        at.mkdir()
        try:
            mounted = volume.mount(at)
            try:
                filesystem.grow(at, volume.kind)
            finally:
                mounted.unmount()
        finally:
            at.rmdir()

    def _finish(self, name: str, kind: str, fill: Callable[[Path], None]) -> Volume:
        path = self._path(name)
        if path.exists():
            raise BlockError(f"there is a volume {name} in {self.folder} already")
        unfinished = path.with_name(path.name + UNFINISHED)
        unfinished.unlink(missing_ok=True)
        try:
            fill(unfinished)
            durable.sync(unfinished)
            unfinished.rename(path)
        except BaseException:
            unfinished.unlink(missing_ok=True)
            raise
        durable.sync(self.folder)
        return Volume(path, kind)

    def _path(self, name: str) -> Path:
        if not NAME.fullmatch(name):
            raise BlockError(f"{name!r} cannot be the name of a volume")
        return self.folder / f"{name}{SUFFIX}"


def _sparse(path: Path, size_bytes: int) -> None:
    with path.open("xb") as file:
        os.truncate(file.fileno(), size_bytes)


def _empty(path: Path, size_bytes: int, kind: str) -> None:
    _sparse(path, size_bytes)
    filesystem.make(path, kind)


def _discard(path: Path) -> None:
    for device in loop.find(path):
        device.detach()
    path.unlink()


def _discard_mount(at: Path) -> None:
    while filesystem.is_mounted(at):
        filesystem.unmount(at)
    at.rmdir()
