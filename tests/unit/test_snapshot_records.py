"""The tree of snapshots: who is whose parent and where the container is, whatever is deleted in which order."""

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent import container_records, snapshot_records
from agent.container_records import Records, State
from agent.database import Database
from agent.snapshot_records import SnapshotRecords, new_identifier
from migrator.errors import AlreadyExists, NotFound
from migrator.v1.container_pb2 import ContainerSpec, Volume

# a - b - c
#       - d
NAMES = ("a", "b", "c", "d")
PARENTS = {"a": None, "b": "a", "c": "b", "d": "b"}


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    opened = Database(tmp_path / "agent.db", [container_records.SCHEMA, snapshot_records.SCHEMA])
    yield opened
    opened.close()


def small(size_bytes: int = 1) -> list[Volume]:
    return [Volume(mount_point="/", size_bytes=size_bytes, filesystem="ext4")]


def grow(database: Database, container: str = "ct101") -> SnapshotRecords:
    """The tree above; the container is at d."""
    Records(database).insert(container, ContainerSpec(image="redis", volumes=small(5)), State.STOPPED)
    records = SnapshotRecords(database)
    for name in "abc":
        records.add(new_identifier(), container, name, small())
    records.end_rollback(records.get(container, "b"))
    records.add(new_identifier(), container, "d", small(7))
    return records


def shape(records: SnapshotRecords, container: str = "ct101") -> tuple[dict[str, str | None], str | None]:
    """Each name's parent, and where the container is."""
    found = records.of(container)
    names = {snapshot.id: snapshot.name for snapshot in found}
    parents = {snapshot.name: names[snapshot.parent] if snapshot.parent else None for snapshot in found}
    current = [snapshot.name for snapshot in found if snapshot.is_current]
    assert len(current) <= 1
    return parents, current[0] if current else None


def test_a_snapshot_is_a_child_of_where_the_container_is(database: Database) -> None:
    records = grow(database)
    assert shape(records) == (PARENTS, "d")
    assert [snapshot.name for snapshot in records.of("ct101")] == ["a", "b", "c", "d"]
    with pytest.raises(AlreadyExists):
        records.check_free("ct101", "a")
    records.check_free("ct101", "e")
    with pytest.raises(NotFound):
        records.get("ct101", "e")


@pytest.mark.parametrize("order", list(itertools.permutations(NAMES)), ids="".join)
def test_deleted_in_any_order(database: Database, order: tuple[str, ...]) -> None:
    records = grow(database)
    parents, current = dict(PARENTS), "d"
    for name in order:
        records.delete(records.get("ct101", name))
        heir = parents.pop(name)
        parents = {child: heir if parent == name else parent for child, parent in parents.items()}
        current = heir if current == name else current  # type: ignore[assignment]
        assert shape(records) == (parents, current)
    assert records.of("ct101") == []


def test_a_rollback_brings_the_volumes_sizes_back(database: Database) -> None:
    records = grow(database)
    snapshot = records.get("ct101", "d")
    records.begin_rollback(snapshot)
    assert records.pending("ct101") is not None
    records.end_rollback(snapshot)
    assert records.pending("ct101") is None
    spec = Records(database).get("ct101").spec
    assert (spec.image, [volume.size_bytes for volume in spec.volumes]) == ("redis", [7])


def test_containers_do_not_share_snapshots(database: Database) -> None:
    records = grow(database)
    grow(database, "ct102")
    records.delete_all("ct101")
    assert records.of("ct101") == []
    assert shape(records, "ct102") == (PARENTS, "d")
    Records(database).delete("ct102")
    assert records.identifiers() == set()
    assert records.of("ct102") == []


def test_the_tree_comes_along(database: Database, tmp_path: Path) -> None:
    there = grow(database)
    other = Database(tmp_path / "other.db", [container_records.SCHEMA, snapshot_records.SCHEMA])
    try:
        here = SnapshotRecords(other)
        here.bring("ct101", there.of("ct101"))
        assert here.of("ct101") == there.of("ct101")
    finally:
        other.close()
