"""The volumes of this host's containers: listed, resized, written out in formats that others read."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import structlog

from agent import image_sizes
from agent.assembly import volume_name
from agent.container_records import Record, Records, State
from agent.containers import Containers
from agent.database import Database
from agent.disk_images import PLOOP, QCOW2, RAW
from agent.snapshots import SnapshotKeeper
from agent.specs import MINIMUM_DISK_BYTES
from agent.tarball import Cancel
from blockdev import extents, fiemap, pool, reflink, resize
from blockdev.errors import BlockError
from blockdev.formats import descriptor, qemu
from blockdev.formats.disk import LARGEST_BYTES
from blockdev.programs import ProgramFailed
from blockdev.volume import Volume, VolumeStore
from migrator.errors import InvalidArgument, NotFound, Precondition
from migrator.units import format_size

EXPORT_FORMATS = (RAW, QCOW2, PLOOP)
PLOOP_FILE = "root.hds"

log = structlog.get_logger()
Report = Callable[[str], None]


@dataclass(frozen=True)
class ContainerVolume:
    """One volume as it is now."""

    container: str
    mount_point: str
    size_bytes: int
    allocated_bytes: int
    filesystem: str


@dataclass(frozen=True)
class ExportedFile:
    """A file of an export, to be read and sent."""

    name: str
    path: Path


class Volumes:
    """What may be done with volumes beside containers' lives; each operation holds its container."""

    def __init__(
        self,
        database: Database,
        store: VolumeStore,
        containers: Containers,
        snapshots: SnapshotKeeper,
        staging: Callable[[], AbstractContextManager[Path]],
    ) -> None:
        self._records = Records(database)
        self._store = store
        self._containers = containers
        self._snapshots = snapshots
        self._staging = staging

    def recover(self) -> None:
        """Let each record say how large its volumes are: a resize may have been interrupted before that was noted."""
        for record in self._records.all():
            if record.state is not State.ARRIVING:
                for index in range(len(record.spec.volumes)):
                    try:
                        size_bytes = self._open(record, index).size_bytes
                    except BlockError as error:
                        log.error("volume is missing", container=record.name, error=str(error))
                        continue
                    if size_bytes != record.spec.volumes[index].size_bytes:
                        log.warning("volume was resized", container=record.name, volume=index, size_bytes=size_bytes)
                        self._note(record.name, index, size_bytes)

    def all(self, container: str = "") -> list[ContainerVolume]:
        """By container, in the order of the spec. Raises NotFound for a container that is not here."""
        records = [self._containers.record(container)] if container else self._containers.all()
        found = []
        for record in records:
            if record.state is not State.ARRIVING:
                for index in range(len(record.spec.volumes)):
                    try:
                        found.append(self._describe(record, index))
                    except (BlockError, FileNotFoundError):
                        continue  # deleted meanwhile
        return found

    def resize(self, container: str, mount_point: str, size_bytes: int) -> ContainerVolume:
        """Give a volume this size. Raises InvalidArgument, NotFound, Busy, Precondition; ExecutionError if it fails."""
        size_bytes = -(-size_bytes // resize.ALIGN_BYTES) * resize.ALIGN_BYTES
        if not 0 < size_bytes <= LARGEST_BYTES:
            raise InvalidArgument(f"a volume cannot have {size_bytes} bytes")
        with self._containers.hold(container, "its volume is being resized"):
            record = self._containers.record(container)
            record.refuse("resize a volume of", State.ARRIVING)
            index = self._index(record, mount_point)
            volume = self._open(record, index)
            if size_bytes > volume.size_bytes:
                self._check_room(size_bytes - volume.size_bytes)
            if record.state.is_live:
                self._resize_mounted(record, index, volume, size_bytes)
            else:
                self._resize_at_rest(record, volume, size_bytes)
            return self._describe(self._note(container, index, size_bytes), index)

    @contextmanager
    def export(
        self, container: str, mount_point: str, snapshot: str, kind: str, report: Report, cancel: Cancel
    ) -> Iterator[list[ExportedFile]]:
        """The files of an export of a volume, or of what it was at a snapshot, for the time of the block.

        Its container is held for a moment. Raises InvalidArgument, NotFound, Busy, Precondition (RUNNING, NO_SPACE).
        """
        if kind not in EXPORT_FORMATS:
            raise InvalidArgument(f"format {kind!r} is not one of {', '.join(EXPORT_FORMATS)}")
        with ExitStack() as resources:
            folder = resources.enter_context(self._staging())
            clone = folder / "disk.raw"
            with self._containers.hold(container, "its volume is being exported"):
                reflink.clone(self._exported(container, mount_point, snapshot), clone)
            if kind == RAW:
                yield [ExportedFile("disk.raw", clone)]
                return
            size_bytes = clone.stat().st_size
            with clone.open("rb") as file:
                data_bytes = extents.total(fiemap.allocated(file.fileno(), size_bytes))
            self._check_room(data_bytes)
            report(f"converting {format_size(data_bytes)} to {kind}")
            if kind == QCOW2:
                target = folder / "disk.qcow2"
                qemu.from_raw(clone, target, "qcow2", cancel.covering)
                cancel.check()
                yield [ExportedFile(target.name, target)]
                return
            # Whole clusters: ploop's own tools count the disk in them and leave out the rest.
            os.truncate(clone, image_sizes.whole_mib(size_bytes))
            target = folder / PLOOP_FILE
            qemu.from_raw(clone, target, "parallels", cancel.covering)
            cancel.check()
            described = folder / descriptor.FILE
            described.write_bytes(descriptor.write(clone.stat().st_size, PLOOP_FILE))
            yield [ExportedFile(PLOOP_FILE, target), ExportedFile(descriptor.FILE, described)]

    # Inside

    def _exported(self, container: str, mount_point: str, snapshot: str) -> Path:
        """A file at rest."""
        record = self._containers.record(container)
        record.refuse("export a volume of", State.ARRIVING)
        if snapshot:
            found = self._snapshots.records.get(container, snapshot)
            points = [volume.mount_point for volume in found.volumes]
            return self._snapshots.store.images(found.id)[_index(container, points, mount_point)]
        if record.state.is_live:
            raise Precondition(
                f"container {container} is {record.state}, and its volume is being written to: stop it first, or export"
                f" a snapshot of it (`migrator snapshot create {container}`, then --snapshot)",
                reason="RUNNING",
            )
        return self._open(record, self._index(record, mount_point)).path

    def _resize_mounted(self, record: Record, index: int, volume: Volume, size_bytes: int) -> None:
        if size_bytes < volume.size_bytes:
            raise Precondition(
                f"container {record.name} is {record.state}: a volume can be made smaller only while it is stopped",
                reason="RUNNING",
            )
        if not resize.may_grow_mounted(volume.kind):
            raise Precondition(
                f"the agent lacks CAP_SYS_RESOURCE, without which a mounted ext4 cannot grow: stop {record.name} first,"
                " or let the agent have it",
                reason="CANNOT_GROW_MOUNTED",
            )
        mounted = self._containers.mounted_volumes(record.name)[index]
        try:
            resize.grow_mounted(volume, mounted, size_bytes)
        finally:
            # Also when only the file has grown: a migration goes by the file at one end, by the record at the other.
            self._note(record.name, index, volume.size_bytes)

    def _resize_at_rest(self, record: Record, volume: Volume, size_bytes: int) -> None:
        if size_bytes < volume.size_bytes:
            if volume.kind not in resize.SHRINKABLE:
                raise Precondition(
                    f"{volume.kind} cannot be made smaller: create a container with a smaller disk and copy the files",
                    reason="CANNOT_SHRINK",
                )
            if size_bytes < MINIMUM_DISK_BYTES[volume.kind]:
                raise InvalidArgument(
                    f"{volume.kind} needs at least {format_size(MINIMUM_DISK_BYTES[volume.kind])}", reason="TOO_SMALL"
                )
        try:
            resize.resize_at_rest(volume, size_bytes)
        except ProgramFailed as error:
            if size_bytes > volume.size_bytes:
                raise
            raise Precondition(
                f"the volume of {record.name} cannot be made as small as {format_size(size_bytes)} and is as it was:"
                f" {error}",
                reason="CANNOT_SHRINK",
            ) from error

    def _open(self, record: Record, index: int) -> Volume:
        return self._store.open(volume_name(record.name, index), record.spec.volumes[index].filesystem)

    def _describe(self, record: Record, index: int) -> ContainerVolume:
        spec = record.spec.volumes[index]
        volume = self._open(record, index)
        return ContainerVolume(
            record.name, spec.mount_point, volume.size_bytes, volume.allocated_bytes, spec.filesystem
        )

    def _index(self, record: Record, mount_point: str) -> int:
        return _index(record.name, [volume.mount_point for volume in record.spec.volumes], mount_point)

    def _note(self, container: str, index: int, size_bytes: int) -> Record:
        """The size is part of the spec, by which a destination makes the volume."""
        spec = self._records.get(container).spec
        spec.volumes[index].size_bytes = size_bytes
        return self._records.set_spec(container, spec)

    def _check_room(self, needed_bytes: int) -> None:
        free_bytes = pool.room(self._store.folder).available_bytes
        if needed_bytes > free_bytes:
            raise Precondition(
                f"no room: {format_size(needed_bytes)} more are asked for, {format_size(free_bytes)} are free in the"
                " pool; remove images or containers, or make the pool larger",
                reason="NO_SPACE",
            )


def _index(container: str, points: Sequence[str], mount_point: str) -> int:
    wanted = mount_point or "/"
    if wanted not in points:
        raise NotFound(
            f"container {container} has no volume at {wanted}: it has {', '.join(points)}", reason="VOLUME_NOT_FOUND"
        )
    return points.index(wanted)
