"""Snapshots of containers: taken, rolled back to and deleted.

An image is complete on disk before its record is made, and a record is deleted before its image: what has no record is
removed at the next start. A rollback is noted before the first volume is replaced, and carried out to the end later if
it was interrupted: until then the container does not start.
"""

import re
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path

import structlog

from agent.assembly import Assembly, volume_name
from agent.container_records import Record, Records, State
from agent.containers import Containers
from agent.database import Database
from agent.salvage import tried
from agent.snapshot_records import Snapshot, SnapshotRecords, new_identifier
from blockdev import filesystem, tracker
from blockdev.bpf_tracker import BpfTracker
from blockdev.snapshot import SnapshotStore
from blockdev.volume import VolumeStore
from migrator import faults
from migrator.destination import FAILURES
from migrator.errors import Busy, InvalidArgument, Precondition
from migrator.snapshots import LeavingSnapshot

NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,39}")

log = structlog.get_logger()


class SnapshotKeeper:
    """What is done with the snapshots of a container that somebody holds (`Containers.hold`)."""

    def __init__(self, database: Database, assembly: Assembly, volumes: VolumeStore, folder: Path) -> None:
        self.records = SnapshotRecords(database)
        self.store = SnapshotStore(folder)
        self._containers = Records(database)
        self._assembly = assembly
        self._volumes = volumes

    def take(self, record: Record, name: str, check: Callable[[], None]) -> tuple[Snapshot, float]:
        """A snapshot, and for how many seconds the container's writes stood still; `check` may break it off."""
        identifier, container = new_identifier(), record.name
        images = [self._volumes.open(volume_name(container, index)).path for index in range(len(record.spec.volumes))]
        stood_still_s = 0.0
        if record.state.is_live:
            volumes = list(zip(images, self._assembly.mounted(container, record.spec), strict=True))
            track = BpfTracker if tracker.probe() is None else None
            stood_still_s = self.store.take(identifier, volumes, track, check)
        else:
            self.store.copy(identifier, images)
        faults.point("snapshot.taken")
        return self.records.add(identifier, container, name, record.spec.volumes), stood_still_s

    def roll_back(self, snapshot: Snapshot) -> None:
        """Every volume, or after a failure or a crash those that are left, by `settle`."""
        self.records.begin_rollback(snapshot)
        for index, image in enumerate(self.store.images(snapshot.id)):
            self._volumes.replace(volume_name(snapshot.container, index), image)
            faults.point("snapshot.rollback")
        self.records.end_rollback(snapshot)

    def settle(self, container: str) -> Record:
        """Carry out a rollback that was begun; before anything is done with the container's volumes."""
        snapshot = self.records.pending(container)
        if snapshot is not None:
            log.info("carry on a rollback", container=container, snapshot=snapshot.name)
            self.roll_back(snapshot)
        return self._containers.get(container)

    def leaving(self, container: str) -> Sequence[LeavingSnapshot]:
        """All of a container's, to be sent to another host."""
        found = self.records.of(container)
        numbers: dict[str | None, int] = {snapshot.id: number for number, snapshot in enumerate(found)}
        return [
            LeavingSnapshot(
                name=snapshot.name,
                parent=numbers.get(snapshot.parent),
                create_time_ms=snapshot.create_time_ms,
                is_current=snapshot.is_current,
                volumes=snapshot.volumes,
                images=self.store.images(snapshot.id),
            )
            for snapshot in found
        ]

    def delete(self, snapshot: Snapshot) -> None:
        """What shares extents with it keeps them."""
        self.records.delete(snapshot)
        self.store.delete(snapshot.id)

    def delete_all(self, container: str) -> None:
        """Those of a container that is deleted; repeatable."""
        found = self.records.of(container)
        self.records.delete_all(container)
        for snapshot in found:
            self.store.delete(snapshot.id)

    def sweep(self) -> None:
        """Delete what a crash has left: unfinished images, images without a record, records without a container."""
        self.store.sweep()
        recorded = self.records.identifiers()
        for identifier in self.store.identifiers():
            if identifier not in recorded:
                log.warning("remove unknown snapshot", id=identifier)
                self.store.delete(identifier)


class Snapshots:
    """Snapshots as operators ask for them; thread-safe. Call `recover` once before use."""

    def __init__(self, keeper: SnapshotKeeper, containers: Containers) -> None:
        self._keeper = keeper
        self._records = keeper.records
        self._containers = containers

    def create(
        self, container: str, name: str = "", check: Callable[[], None] = lambda: None
    ) -> tuple[Snapshot, float]:
        """A snapshot, and for how many seconds the container's writes stood still.

        Raises NotFound, AlreadyExists, InvalidArgument, Busy, Precondition, BlockError; what `check` raises.
        """
        with self._containers.hold(container, "a snapshot of it is being taken"):
            record = self._containers.record(container)
            record.refuse("take a snapshot of", State.ARRIVING)
            name = check_name(name) if name else self._free_name(container)
            self._records.check_free(container, name)
            record = self._keeper.settle(container)
            snapshot, stood_still_s = self._keeper.take(record, name, check)
        log.info("snapshot", container=container, name=name, freeze_ms=round(stood_still_s * 1000, 1))
        return snapshot, stood_still_s

    def list(self, container: str) -> list[Snapshot]:
        """Parents come before their children. Raises NotFound."""
        return self._records.of(self._containers.record(container).name)

    def allocated_bytes(self, snapshot: Snapshot) -> Sequence[int]:
        """What each of its images takes on the host, shared or not; nothing if it is deleted at this moment."""
        return self._keeper.store.allocated_bytes(snapshot.id)

    def rollback(self, container: str, name: str, *, force: bool = False) -> Snapshot:
        """Set a stopped container back; with `force` one that runs is stopped first, and started again.

        Raises NotFound, Busy, Precondition, BlockError.
        """
        self._containers.record(container)
        self._records.get(container, name)
        was_running = False
        if force:
            was_running = self._containers.record(container).state is State.RUNNING
            self._containers.stop(container)
        with self._containers.hold(container, f"it is being rolled back to {name}"):
            record = self._containers.record(container)
            if record.state.is_live:
                raise Precondition(
                    f"container {container} is {record.state}: stop it first, or use --force, which stops it and"
                    f" starts it again; what it has written since its last snapshot is lost",
                    reason="RUNNING",
                )
            record.refuse("roll back", State.ARRIVING)
            self._keeper.roll_back(self._records.get(container, name))
        log.info("rolled back", container=container, snapshot=name)
        if was_running:
            self._containers.start(container)
        return self._records.get(container, name)

    def delete(self, container: str, name: str) -> None:
        """In any order. Raises NotFound, Busy."""
        with self._containers.hold(container, f"its snapshot {name} is being deleted"):
            self._containers.record(container).refuse("delete a snapshot of", State.ARRIVING)
            self._keeper.settle(container)
            self._keeper.delete(self._records.get(container, name))

    def recover(self) -> None:
        """After a start of the agent: let go what was frozen, carry on what was begun, remove what was not finished.

        Containers whose migration is not finished are left to it.
        """
        with tried("unfinished snapshots"):
            self._keeper.sweep()
        for record in self._containers.all():
            if record.state is State.ARRIVING:
                continue
            try:
                with self._containers.hold(record.name, "it is being looked at after a start of the agent"):
                    if not record.state.is_live:
                        self._keeper.settle(record.name)
                    elif not self._containers.has_ended(record.name):
                        self._thaw(record.name)
            except Busy:
                continue
            except FAILURES as error:
                log.warning("recovering snapshots", container=record.name, error=str(error))

    def _thaw(self, container: str) -> None:
        for mounted in self._containers.mounted_volumes(container):
            if filesystem.thaw(mounted.at):
                log.warning("a file system was left frozen", container=container, at=str(mounted.at))

    def _free_name(self, container: str) -> str:
        """The time, and a number if that is taken."""
        taken = {snapshot.name for snapshot in self._records.of(container)}
        name = first = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
        number = 1
        while name in taken:
            number += 1
            name = f"{first}-{number}"
        return name


def check_name(name: str) -> str:
    """The name, if it can be a snapshot's. Raises InvalidArgument."""
    if not NAME.fullmatch(name):
        raise InvalidArgument(
            f"{name!r} cannot be a snapshot's name: 1 to 40 of a-z, 0-9, '.', '-' and '_'; the first a letter or digit"
        )
    return name
