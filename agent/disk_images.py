"""Disk images from anywhere made into volumes: the format opened, the root file system found, copied and checked.

A file system that cannot be mounted on devices with blocks of 4096 bytes, or should be of another kind, has its files
copied into a new one.
"""

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from agent import image_sizes, repack, tarball
from agent.tarball import Cancel
from blockdev import check, extents, filesystem, loop
from blockdev.errors import BlockError
from blockdev.formats import delta, descriptor, ploop, qcow2, qemu, rootfs
from blockdev.formats.disk import Disk, RawDisk, copy, open_file
from blockdev.formats.errors import FormatError
from blockdev.formats.rootfs import Located
from blockdev.programs import ProgramFailed
from blockdev.volume import Volume, VolumeStore
from migrator.errors import InvalidArgument, MigratorError, NotFound, Precondition
from migrator.units import format_size

TARBALL, RAW, QCOW2, PLOOP = "tarball", "raw", "qcow2", "ploop"
FORMATS = (TARBALL, RAW, QCOW2, PLOOP)
_HEAD_BYTES = 512
# How the kernel says that a file system is not what it should be.
_BAD_FILESYSTEM = (errno.EINVAL, errno.EIO, errno.EUCLEAN, errno.EBADMSG, errno.ENODATA)

Report = Callable[[str], None]


@dataclass(frozen=True)
class DiskSource:
    """A disk image on this host. A ploop one is a folder, or a single delta that stands for itself."""

    path: Path
    format: str
    snapshot: str = ""
    partition: int | None = None


def recognise(path: Path, wanted: str = "") -> str:
    """The format of what is there, which is `wanted` if that is given. Raises InvalidArgument, NotFound.

    A raw disk is never recognised: whoever wrote on it could have it taken for something else.
    """
    if wanted and wanted not in FORMATS:
        raise InvalidArgument(f"format {wanted!r} is not one of {', '.join(FORMATS)}")
    if not path.is_absolute():
        raise InvalidArgument(f"{str(path)!r} is not an absolute path on the agent's host")
    if not path.exists():
        raise NotFound(f"there is no {path} on the agent's host", reason="FILE_NOT_FOUND")
    if wanted:
        return wanted
    if path.is_dir() or path.name == descriptor.FILE:
        return PLOOP
    with _told(path, Cancel()):
        file = open_file(str(path))
        try:
            head = os.pread(file, _HEAD_BYTES, 0)
        finally:
            os.close(file)
    if head.startswith(qcow2.MAGIC):
        return QCOW2
    if delta.is_delta(head):
        return PLOOP
    if tarball.is_tarball(head):
        return TARBALL
    raise InvalidArgument(
        f"{path} is not a tarball, qcow2 or ploop: say --format raw if it is a disk byte by byte",
        reason="UNKNOWN_FORMAT",
    )


def make_volume(
    source: DiskSource,
    store: VolumeStore,
    names: tuple[str, str],
    folders: tuple[Path, Path],
    wanted_kind: str,
    check_room: Callable[[int], None],
    report: Report,
    cancel: Cancel,
) -> Volume:
    """The root file system of a disk as a volume of the store, under one of two names; the caller deletes both.

    `folders` are a mount point and an empty folder for files in between. Raises InvalidArgument (BAD_IMAGE),
    Precondition (NO_SPACE), Cancelled.
    """
    at, scratch = folders
    with _told(source.path, cancel), ExitStack() as resources:
        disk = resources.enter_context(_opened(source, scratch, check_room, report, cancel))
        located = rootfs.locate(disk, source.partition)
        found = located.found
        check_room(extents.total(disk.ranges(located.part.start, located.part.end)))
        report(f"copying {found.kind} of {format_size(found.size_bytes)} from {_place(located)}")
        volume = store.receive(names[0], image_sizes.whole_mib(located.part.length), found.kind)
        copy(disk, located.part, volume.path, cancel.check)
        resources.close()
        cancel.check()
        report(f"checking the {found.kind}")
        block_bytes = min(found.sector_bytes, loop.BLOCK_BYTES)
        check.check(volume.path, found.kind, at, block_bytes=block_bytes)
        _check_not_empty(volume, block_bytes, at)
        cancel.check()
        kind = wanted_kind or found.kind
        if found.fits_our_devices and kind == found.kind:
            return volume
        why = "its blocks are too small for volumes" if kind == found.kind else f"{kind} was asked for"
        report(f"copying its files into a new {kind}, since {why}")
        return _repacked(volume, block_bytes, store, names[1], kind, at, check_room, cancel)


def _check_not_empty(volume: Volume, block_bytes: int, at: Path) -> None:
    """Raises FormatError: what has no file in it was hardly meant."""
    with _looking(volume, block_bytes, at):
        is_empty = not any(entry.name != "lost+found" for entry in at.iterdir())
    if is_empty:
        raise FormatError(f"the {volume.kind} on it is empty")


@contextmanager
def _looking(volume: Volume, block_bytes: int, at: Path) -> Iterator[None]:
    """The volume is mounted, and nothing on it changes."""
    device = loop.attach(volume.path, read_only=True, block_bytes=block_bytes)
    try:
        filesystem.mount(device.path, at, volume.kind, read_only=True)
        try:
            yield
        finally:
            filesystem.unmount(at)
    finally:
        device.detach()


@contextmanager
def _opened(
    source: DiskSource, scratch: Path, check_room: Callable[[int], None], report: Report, cancel: Cancel
) -> Iterator[Disk]:
    if source.snapshot and source.format != PLOOP:
        raise InvalidArgument("a snapshot can be chosen of a ploop folder only")
    if source.format == PLOOP:
        folder = source.path.parent if source.path.name == descriptor.FILE else source.path
        if folder.is_dir():
            with ploop.opened(folder, source.snapshot) as disk:
                yield disk
        elif (folder.parent / descriptor.FILE).exists():
            raise InvalidArgument(f"{source.path} is one file of a ploop disk: give its folder {folder.parent}")
        else:
            with ploop.opened_delta(folder) as disk:
                yield disk
        return
    path = source.path
    if source.format == QCOW2:
        report(f"checking {path.name}")
        qemu.check_qcow2(path)
        check_room(qemu.measure_raw(path))
        report(f"converting {path.name}")
        path = scratch / "disk.raw"
        qemu.to_raw(source.path, path, cancel.covering)
        cancel.check()
    descriptor_number = open_file(str(path))
    try:
        yield RawDisk(descriptor_number, path.name)
    finally:
        os.close(descriptor_number)


def _repacked(
    volume: Volume,
    block_bytes: int,
    store: VolumeStore,
    name: str,
    kind: str,
    at: Path,
    check_room: Callable[[int], None],
    cancel: Cancel,
) -> Volume:
    old, new = at / "old", at / "new"
    old.mkdir()
    new.mkdir()
    try:
        with _looking(volume, block_bytes, old):
            status = os.statvfs(old)
            used_bytes = (status.f_blocks - status.f_bfree) * status.f_frsize
            check_room(used_bytes)
            size_bytes = max(image_sizes.size_for(used_bytes, kind), volume.size_bytes)
            while True:
                try:
                    return _filled(store, name, size_bytes, kind, old, new, cancel)
                except tarball.Full:
                    store.delete(name)
                    size_bytes *= 2
                    check_room(used_bytes)
    finally:
        old.rmdir()
        new.rmdir()


def _filled(store: VolumeStore, name: str, size_bytes: int, kind: str, old: Path, new: Path, cancel: Cancel) -> Volume:
    volume = store.create(name, size_bytes, kind)
    mounted = volume.mount(new)
    try:
        repack.copy_files(old, new, cancel)
        filesystem.sync(new)
    finally:
        mounted.unmount()
    return volume


def _place(located: Located) -> str:
    return f"partition {located.partition}" if located.partition else "the whole disk"


@contextmanager
def _told(path: Path, cancel: Cancel) -> Iterator[None]:
    """What is wrong with the image is the image's fault, and told as that."""
    try:
        yield
    except (FormatError, ProgramFailed) as error:
        cancel.check()
        raise InvalidArgument(f"{path} cannot be imported: {error}", reason="BAD_IMAGE") from error
    except MigratorError:
        raise
    except (BlockError, OSError) as error:
        number = error.errno if isinstance(error, OSError) else None
        if number == errno.ENOSPC or "no space left" in str(error).lower():
            raise Precondition(f"no room for {path}: the pool is full", reason="NO_SPACE") from error
        if number in _BAD_FILESYSTEM:
            raise InvalidArgument(f"{path} cannot be imported: {error}", reason="BAD_IMAGE") from error
        raise
