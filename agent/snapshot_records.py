"""What the agent's database says about snapshots: a tree for each container, and where in it the container is."""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from sqlite3 import Row

from agent.container_records import now_ms
from agent.database import Database
from migrator.errors import AlreadyExists, NotFound
from migrator.v1.container_pb2 import ContainerSpec, Volume

# `volumes` is a ContainerSpec with nothing else in it. `is_pending`: the container is being rolled back to this one.
SCHEMA = """
CREATE TABLE IF NOT EXISTS snapshots (
    id TEXT PRIMARY KEY,
    container TEXT NOT NULL,
    name TEXT NOT NULL,
    parent TEXT,
    create_time_ms INTEGER NOT NULL,
    volumes BLOB NOT NULL,
    is_current INTEGER NOT NULL DEFAULT 0,
    is_pending INTEGER NOT NULL DEFAULT 0,
    UNIQUE (container, name)
) STRICT
"""


@dataclass(frozen=True)
class Snapshot:
    """One snapshot. `parent` is the identifier of another one of the container, or None; times are ms since 1970."""

    id: str
    container: str
    name: str
    parent: str | None
    create_time_ms: int
    volumes: Sequence[Volume]
    is_current: bool


class SnapshotRecords:
    """The table of snapshots."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def get(self, container: str, name: str) -> Snapshot:
        """Raises NotFound."""
        rows = self._database.rows("SELECT * FROM snapshots WHERE container = ? AND name = ?", container, name)
        if not rows:
            raise NotFound(
                f"container {container} has no snapshot {name}: see migrator snapshot ls {container}",
                reason="SNAPSHOT_NOT_FOUND",
            )
        return _snapshot(rows[0])

    def of(self, container: str) -> list[Snapshot]:
        """The snapshots of one container; parents come before their children, older ones before younger."""
        rows = self._database.rows(
            "SELECT * FROM snapshots WHERE container = ? ORDER BY create_time_ms, name", container
        )
        children: dict[str | None, list[Snapshot]] = {}
        for row in rows:
            children.setdefault(row["parent"], []).append(_snapshot(row))
        ordered: list[Snapshot] = []
        waiting = children.get(None, [])[::-1]
        while waiting:
            ordered.append(waiting.pop())
            waiting.extend(children.get(ordered[-1].id, [])[::-1])
        return ordered

    def check_free(self, container: str, name: str) -> None:
        """Raises AlreadyExists."""
        if any(snapshot.name == name for snapshot in self.of(container)):
            raise AlreadyExists(
                f"container {container} has a snapshot {name} already: choose another name", reason="SNAPSHOT_EXISTS"
            )

    def add(self, identifier: str, container: str, name: str, volumes: Sequence[Volume]) -> Snapshot:
        """A snapshot that was just taken: a child of where the container is, and where it is from now on."""
        with self._database.transaction() as cursor:
            cursor.execute(
                "INSERT INTO snapshots (id, container, name, parent, create_time_ms, volumes) VALUES (?, ?, ?,"
                " (SELECT id FROM snapshots WHERE container = ? AND is_current), ?, ?)",
                (identifier, container, name, container, now_ms(), _packed(volumes)),
            )
            cursor.execute("UPDATE snapshots SET is_current = (id = ?) WHERE container = ?", (identifier, container))
        return self.get(container, name)

    def begin_rollback(self, snapshot: Snapshot) -> None:
        """From now on the container is to become what this snapshot is, whatever happens."""
        with self._database.transaction() as cursor:
            cursor.execute(
                "UPDATE snapshots SET is_pending = (id = ?) WHERE container = ?", (snapshot.id, snapshot.container)
            )

    def end_rollback(self, snapshot: Snapshot) -> None:
        """Now it is; its spec has the snapshot's volumes."""
        with self._database.transaction() as cursor:
            row = cursor.execute("SELECT spec FROM containers WHERE name = ?", (snapshot.container,)).fetchone()
            spec = ContainerSpec.FromString(row["spec"])
            del spec.volumes[:]
            spec.volumes.extend(snapshot.volumes)
            cursor.execute(
                "UPDATE containers SET spec = ? WHERE name = ?", (spec.SerializeToString(), snapshot.container)
            )
            cursor.execute(
                "UPDATE snapshots SET is_pending = 0, is_current = (id = ?) WHERE container = ?",
                (snapshot.id, snapshot.container),
            )

    def pending(self, container: str) -> Snapshot | None:
        """The snapshot that a rollback was begun to and has not ended."""
        rows = self._database.rows("SELECT * FROM snapshots WHERE container = ? AND is_pending", container)
        return _snapshot(rows[0]) if rows else None

    def delete(self, snapshot: Snapshot) -> None:
        """Its parent takes its place, for its children and for the container."""
        with self._database.transaction() as cursor:
            # As they are now, not as they were when it was read.
            row = cursor.execute("SELECT * FROM snapshots WHERE id = ?", (snapshot.id,)).fetchone()
            if row is None:
                return
            cursor.execute("UPDATE snapshots SET parent = ? WHERE parent = ?", (row["parent"], snapshot.id))
            if row["is_current"]:
                cursor.execute("UPDATE snapshots SET is_current = 1 WHERE id = ?", (row["parent"],))
            cursor.execute("DELETE FROM snapshots WHERE id = ?", (snapshot.id,))

    def delete_all(self, container: str) -> None:
        """Repeatable."""
        with self._database.transaction() as cursor:
            cursor.execute("DELETE FROM snapshots WHERE container = ?", (container,))

    def bring(self, container: str, snapshots: Sequence[Snapshot]) -> None:
        """Enter those that come with a container from another host, as they are."""
        with self._database.transaction() as cursor:
            for snapshot in snapshots:
                cursor.execute(
                    "INSERT INTO snapshots (id, container, name, parent, create_time_ms, volumes, is_current)"
                    " VALUES (?, ?, ?, ?, ?, ?, ?)",
                    (
                        snapshot.id,
                        container,
                        snapshot.name,
                        snapshot.parent,
                        snapshot.create_time_ms,
                        _packed(snapshot.volumes),
                        snapshot.is_current,
                    ),
                )

    def identifiers(self) -> set[str]:
        """Of all snapshots of all containers that there are; those of others are forgotten."""
        with self._database.transaction() as cursor:
            cursor.execute("DELETE FROM snapshots WHERE container NOT IN (SELECT name FROM containers)")
            return {row["id"] for row in cursor.execute("SELECT id FROM snapshots").fetchall()}


def new_identifier() -> str:
    """For the next snapshot; it is never another one's."""
    return secrets.token_hex(8)


def _packed(volumes: Sequence[Volume]) -> bytes:
    return ContainerSpec(volumes=volumes).SerializeToString()


def _snapshot(row: Row) -> Snapshot:
    return Snapshot(
        id=row["id"],
        container=row["container"],
        name=row["name"],
        parent=row["parent"],
        create_time_ms=row["create_time_ms"],
        volumes=list(ContainerSpec.FromString(row["volumes"]).volumes),
        is_current=bool(row["is_current"]),
    )
