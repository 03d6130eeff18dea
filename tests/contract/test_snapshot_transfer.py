"""Snapshots on their way to another host: what is sent of them, and what becomes of it there."""

import os
import random
import sqlite3
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agent import arriving_snapshots, container_records, snapshot_records
from agent.arriving_snapshots import ArrivingSnapshots
from agent.assembly import volume_name
from agent.container_records import Records, State
from agent.database import Database
from agent.snapshots import SnapshotKeeper
from blockdev import blocks, extents, fiemap, reflink
from blockdev.blocks import Piece
from blockdev.errors import BlockError
from blockdev.extents import Range
from blockdev.volume import VolumeStore
from migrator.errors import InvalidArgument, PeerError
from migrator.snapshots import SnapshotCopy
from migrator.stream import Digests, Meter, Receiver, Sender
from migrator.v1 import container_pb2, peer_pb2

pytestmark = pytest.mark.root

BLOCK = 65536
BLOCKS = 64
SIZE = BLOCK * BLOCKS
NAME = "ct101"
# "/" has to hold an image; nothing of it is allocated here.
ROOM = 64 << 20


class End:
    """One host: volumes that are plain files, and their snapshots."""

    def __init__(self, folder: Path, state: State) -> None:
        self.database = Database(folder / "agent.db", [container_records.SCHEMA, snapshot_records.SCHEMA])
        self.volumes = VolumeStore(folder / "volumes")
        nothing: Any = None
        self.keeper = SnapshotKeeper(self.database, nothing, self.volumes, folder / "snapshots")
        self.spec = container_pb2.ContainerSpec(image="none", command=["sh"], hostname=NAME)
        for index, point in enumerate(("/", "/data")):
            self.spec.volumes.add(mount_point=point, size_bytes=ROOM, filesystem="ext4")
            self.volumes.receive(volume_name(NAME, index), ROOM, "ext4")
        self.records = Records(self.database)
        self.records.insert(NAME, self.spec, state)

    def path(self, index: int) -> Path:
        return self.volumes.open(volume_name(NAME, index)).path

    def write(self, index: int, block: int, data: bytes) -> None:
        with self.path(index).open("r+b") as file:
            os.pwrite(file.fileno(), data, block * BLOCK)
            os.fsync(file.fileno())

    def punch(self, index: int, block: int) -> None:
        with self.path(index).open("r+b") as file:
            blocks.write(file.fileno(), Piece(block * BLOCK, BLOCK, None), ROOM)

    def take(self, name: str) -> None:
        self.keeper.take(self.records.get(NAME), name, lambda: None)

    def contents(self) -> dict[str, list[bytes]]:
        return {
            snapshot.name: [image.read_bytes() for image in self.keeper.store.images(snapshot.id)]
            for snapshot in self.keeper.records.of(NAME)
        }

    def tree(self) -> list[tuple[str, str | None, bool, int]]:
        found = self.keeper.records.of(NAME)
        names = {snapshot.id: snapshot.name for snapshot in found}
        return [(s.name, names.get(s.parent or ""), s.is_current, s.create_time_ms) for s in found]


@pytest.fixture
def ends(pool_folder: Path) -> Iterator[tuple[End, End]]:
    with tempfile.TemporaryDirectory(dir=pool_folder) as here, tempfile.TemporaryDirectory(dir=pool_folder) as there:
        a, b = End(Path(here), State.STOPPED), End(Path(there), State.ARRIVING)
        yield a, b
        a.database.close()
        b.database.close()


def prepared(a: End) -> tuple[SnapshotCopy, peer_pb2.PrepareRequest]:
    copy = SnapshotCopy(a.keeper.leaving(NAME))
    return copy, peer_pb2.PrepareRequest(migration="m", container=NAME, spec=a.spec, snapshots=copy.described)


def send(copy: SnapshotCopy, arriving: ArrivingSnapshots) -> int:
    """Bytes that were sent and are not zeros."""
    sender, receiver, sent = Sender("m", 1, Digests(), Meter()), Receiver(Digests()), 0
    for request in copy.requests(sender):
        kind, _, name = request.target.partition("/")
        assert kind == "snapshot"
        piece = receiver.piece(request)
        sent += 0 if piece.data is None else piece.length
        arriving.write(name, piece)
    return sent


def volumes(end: End) -> list[tuple[Path, int]]:
    return [(end.path(index), ROOM) for index in range(2)]


def test_a_tree_arrives_as_it_was(ends: tuple[End, End]) -> None:
    a, b = ends
    for block in range(40):
        a.write(0, block, random.randbytes(BLOCK))
    a.take("one")
    a.write(0, 3, random.randbytes(BLOCK))
    a.punch(0, 5)
    a.write(1, 0, random.randbytes(4096))
    a.take("two")
    a.take("same")
    a.keeper.roll_back(a.keeper.records.get(NAME, "one"))
    a.write(0, 50, random.randbytes(BLOCK))
    a.take("three")
    copy, request = prepared(a)
    arriving_snapshots.check(request)
    arriving = ArrivingSnapshots(b.keeper, request)
    assert send(copy, arriving) == 40 * BLOCK + BLOCK + 4096 + BLOCK
    arriving.keep(volumes(b))
    arriving.keep(volumes(b))
    with pytest.raises(PeerError):
        arriving.write("0/0", Piece(0, 4096, b"x" * 4096))
    arriving.close()
    assert b.contents() == a.contents()
    assert b.tree() == a.tree()
    # The volumes begin as the one that the container is at, and share with it.
    images = b.keeper.store.images(b.keeper.records.get(NAME, "three").id)
    for index in range(2):
        with images[index].open("rb") as image, b.path(index).open("rb") as volume:
            assert fiemap.differing(image.fileno(), volume.fileno(), ROOM) == []
        assert b.path(index).read_bytes() == a.path(index).read_bytes()
        assert b.path(index).stat().st_size == ROOM
    b.keeper.delete_all(NAME)
    assert list(b.keeper.store.folder.iterdir()) == []


def test_what_fails_at_the_last_leaves_nothing(ends: tuple[End, End]) -> None:
    a, b = ends
    for name in ("one", "two"):
        a.take(name)
    copy, request = prepared(a)
    arriving = ArrivingSnapshots(b.keeper, request)
    send(copy, arriving)
    b.keeper.records.bring(NAME, [s for s in a.keeper.records.of(NAME) if s.name == "two"])
    with pytest.raises(sqlite3.IntegrityError):
        arriving.keep(volumes(b))
    arriving.close()
    assert list(b.keeper.store.folder.iterdir()) == []


def test_what_is_broken_off_leaves_nothing(ends: tuple[End, End]) -> None:
    a, b = ends
    a.write(0, 0, b"x" * BLOCK)
    a.take("one")
    copy, request = prepared(a)
    arriving = ArrivingSnapshots(b.keeper, request)
    send(copy, arriving)
    arriving.close()
    arriving.close()
    assert list(b.keeper.store.folder.iterdir()) == []
    assert b.keeper.records.of(NAME) == []


@pytest.mark.parametrize("name", ["1/0", "0/2", "0", "0/", "/0", "0/0/0", "-1/0", "../0", "٣/0"])
def test_pieces_of_nothing_are_refused(ends: tuple[End, End], name: str) -> None:
    a, b = ends
    a.take("one")
    arriving = ArrivingSnapshots(b.keeper, prepared(a)[1])
    with pytest.raises(PeerError):
        arriving.write(name, Piece(0, 4096, None))
    with pytest.raises(BlockError):
        arriving.write("0/0", Piece(ROOM, 4096, None))
    arriving.close()


def _broken(request: peer_pb2.PrepareRequest, what: str) -> None:
    first, second = request.snapshots
    match what:
        case "two of one name":
            second.name = first.name
        case "a path for a name":
            first.name = "../one"
        case "a parent that comes later":
            first.parent = 2
        case "a base that comes later":
            second.base = 3
        case "itself for a base":
            second.base = 2 + 1
        case "a negative parent":
            first.parent = -1
        case "two that are current":
            first.is_current = second.is_current = True
        case "too few volumes":
            del first.volumes[1:]
        case "another file system":
            first.volumes[1].filesystem = "xfs"
        case "no size":
            first.volumes[0].size_bytes = 0


@pytest.mark.parametrize(
    "what",
    [
        "two of one name",
        "a path for a name",
        "a parent that comes later",
        "a base that comes later",
        "itself for a base",
        "a negative parent",
        "two that are current",
        "too few volumes",
        "another file system",
        "no size",
    ],
)
def test_snapshots_that_cannot_be_are_refused(ends: tuple[End, End], what: str) -> None:
    a, _ = ends
    a.take("one")
    a.take("two")
    _, request = prepared(a)
    arriving_snapshots.check(request)
    _broken(request, what)
    with pytest.raises(InvalidArgument):
        arriving_snapshots.check(request)


CHANGES = st.lists(st.tuples(st.sampled_from(["write", "small", "zero"]), st.integers(0, BLOCKS - 1)), max_size=8)


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(before=CHANGES, after=CHANGES)
def test_what_differs_is_found_by_its_place(pool_folder: Path, before: Any, after: Any) -> None:
    """Every block with other bytes is in it, and a clone that was not written differs in nothing."""
    with tempfile.TemporaryDirectory(dir=pool_folder) as folder:
        source, clone = Path(folder, "source"), Path(folder, "clone")
        source.write_bytes(b"")
        os.truncate(source, SIZE)
        _change(source, before)
        reflink.clone(source, clone)
        assert _differing(source, clone) == []
        _change(source, after)
        ranges = _differing(source, clone)
        assert ranges == extents.merge(ranges)
        ours, theirs = bytearray(source.read_bytes()), clone.read_bytes()
        for part in ranges:
            ours[part.start : part.end] = theirs[part.start : part.end]
        assert ours == theirs
        assert extents.total(ranges) <= BLOCK * len({block for _, block in after})


def _change(path: Path, changes: Any) -> None:
    with path.open("r+b") as file:
        for what, block in changes:
            if what == "zero":
                blocks.write(file.fileno(), Piece(block * BLOCK, BLOCK, None), SIZE)
            else:
                os.pwrite(file.fileno(), os.urandom(BLOCK if what == "write" else 4096), block * BLOCK)
        os.fsync(file.fileno())


def _differing(a: Path, b: Path) -> list[Range]:
    with a.open("rb") as first, b.open("rb") as second:
        return fiemap.differing(first.fileno(), second.fileno(), SIZE)
