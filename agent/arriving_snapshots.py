"""Snapshots that come with a container: stored piece by piece, and this host's own once all of them are complete."""

import os
import re
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from agent.snapshot_records import Snapshot, new_identifier
from agent.snapshots import SnapshotKeeper, check_name
from agent.specs import check_arrival
from blockdev import blocks, durable, reflink
from blockdev.blocks import Piece
from migrator import wire
from migrator.errors import InvalidArgument, PeerError
from migrator.v1 import container_pb2, peer_pb2

LIMIT = 1000
NUMBERS = re.compile(r"(0|[1-9][0-9]{0,3})/(0|[1-9][0-9]?)")


class ArrivingSnapshots:
    """Those of one container. Not kept over a restart of the agent: before they are complete nothing was promised."""

    def __init__(self, keeper: SnapshotKeeper, request: peer_pb2.PrepareRequest) -> None:
        self._keeper = keeper
        self._container: str = request.container
        self._wanted = list(request.snapshots)
        self._identifiers = [new_identifier() for _ in self._wanted]
        self._files: dict[tuple[int, int], int] = {}
        self._folders: dict[int, Path] = {}
        self._open = ExitStack()
        self._is_kept = self._is_closed = False

    def write(self, name: str, piece: Piece) -> None:
        """A piece of NUMBER/VOLUME. Raises PeerError, BlockError."""
        number, index = self._parse(name)
        blocks.write(self._file(number, index), piece, self._wanted[number].volumes[index].size_bytes)

    def keep(self, volumes: Sequence[tuple[Path, int]]) -> None:
        """Make them durable, and these volumes (image and size) what the current one has; repeatable."""
        if self._is_kept:
            return
        if not self._wanted:
            raise PeerError(f"{self._container} comes without snapshots", reason="OUT_OF_ORDER")
        for number, snapshot in enumerate(self._wanted):
            for index in range(len(snapshot.volumes)):
                # One that differs in nothing from its base has had no piece.
                os.fsync(self._file(number, index))
        self._open.close()
        # Their numbers may be other files' by now.
        self._files.clear()
        for identifier in self._identifiers:
            self._keeper.store.finish(identifier)
        self._folders.clear()
        self._keeper.records.bring(self._container, [self._record(number) for number in range(len(self._wanted))])
        self._is_kept = True
        current = next((n for n, snapshot in enumerate(self._wanted) if snapshot.is_current), len(self._wanted) - 1)
        images = self._keeper.store.images(self._identifiers[current])
        for image, (volume, size_bytes) in zip(images, volumes, strict=True):
            _become(volume, image, size_bytes)

    def close(self) -> None:
        """Delete what is not complete; repeatable."""
        self._is_closed = True
        self._open.close()
        self._files.clear()
        for identifier in self._identifiers:
            self._keeper.store.abandon(identifier)
            if not self._is_kept:
                self._keeper.store.delete(identifier)
        self._folders.clear()

    def _file(self, number: int, index: int) -> int:
        if (found := self._files.get((number, index))) is not None:
            return found
        # The oldest first: a chain of them may be longer than Python's stack.
        chain = [number]
        while (base := self._wanted[chain[-1]].base) and (base - 1, index) not in self._files:
            chain.append(base - 1)
        for each in reversed(chain):
            descriptor = self._make(each, index)
        return descriptor

    def _make(self, number: int, index: int) -> int:
        if self._is_kept or self._is_closed:
            raise PeerError(f"snapshot {number} is complete already", reason="OUT_OF_ORDER")
        if number not in self._folders:
            self._folders[number] = self._keeper.store.begin(self._identifiers[number])
        path = self._keeper.store.image_in(self._folders[number], index)
        wanted = self._wanted[number]
        if wanted.base:
            reflink.clone(self._keeper.store.image_in(self._folders[wanted.base - 1], index), path)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        self._open.callback(os.close, descriptor)
        os.truncate(descriptor, wanted.volumes[index].size_bytes)
        self._files[number, index] = descriptor
        return descriptor

    def _record(self, number: int) -> Snapshot:
        wanted = self._wanted[number]
        return Snapshot(
            id=self._identifiers[number],
            container=self._container,
            name=wanted.name,
            parent=self._identifiers[wanted.parent - 1] if wanted.parent else None,
            create_time_ms=wanted.create_time_ms,
            volumes=list(wanted.volumes),
            is_current=wanted.is_current,
        )

    def _parse(self, name: str) -> tuple[int, int]:
        number, _, index = name.partition("/")
        is_wanted = NUMBERS.fullmatch(name) and int(number) < len(self._wanted)
        if not is_wanted or int(index) >= len(self._wanted[int(number)].volumes):
            raise PeerError(f"snapshot {wire.shown(name)} is nothing that is expected here", reason="OUT_OF_ORDER")
        return int(number), int(index)


def check(request: peer_pb2.PrepareRequest) -> None:
    """Raises InvalidArgument for snapshots that cannot be this container's."""
    snapshots = request.snapshots
    if len(snapshots) > LIMIT:
        raise InvalidArgument(f"{request.container} comes with {len(snapshots)} snapshots: {LIMIT} are possible")
    names = {check_name(snapshot.name) for snapshot in snapshots}
    if len(names) != len(snapshots) or sum(snapshot.is_current for snapshot in snapshots) > 1:
        raise InvalidArgument(f"{request.container} comes with {len(snapshots)} snapshots that do not go together")
    for number, snapshot in enumerate(snapshots):
        spec = container_pb2.ContainerSpec()
        spec.CopyFrom(request.spec)
        del spec.volumes[:]
        spec.volumes.extend(snapshot.volumes)
        check_arrival(request.container, spec)
        wire.check_time(snapshot.create_time_ms, "create_time_ms")
        if [v.filesystem for v in spec.volumes] != [v.filesystem for v in request.spec.volumes]:
            raise InvalidArgument(f"snapshot {snapshot.name} has other volumes than {request.container}")
        if not (0 <= snapshot.parent <= number and 0 <= snapshot.base <= number):
            raise InvalidArgument(f"snapshot {snapshot.name} comes before its parent")


def _become(volume: Path, image: Path, size_bytes: int) -> None:
    """The volume's file stays the same one: it is open elsewhere."""
    with volume.open("r+b") as file, image.open("rb") as source:
        os.truncate(file.fileno(), 0)
        reflink.clone_into(source.fileno(), file.fileno())
        os.truncate(file.fileno(), size_bytes)
    durable.sync(volume)
