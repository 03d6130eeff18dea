"""What the agent's database says about containers: what each is, and whether it should run."""

import time
from dataclasses import dataclass
from enum import StrEnum
from sqlite3 import Row

from agent.database import Database
from migrator.errors import AlreadyExists, Busy, NotFound, Precondition
from migrator.v1 import container_pb2
from migrator.v1.container_pb2 import ContainerSpec, ContainerState

SCHEMA = """
CREATE TABLE IF NOT EXISTS containers (
    name TEXT PRIMARY KEY,
    spec BLOB NOT NULL,
    state TEXT NOT NULL,
    should_run INTEGER NOT NULL DEFAULT 0,
    create_time_ms INTEGER NOT NULL,
    start_time_ms INTEGER NOT NULL DEFAULT 0,
    exit_code INTEGER,
    restarts INTEGER NOT NULL DEFAULT 0,
    init_pid INTEGER NOT NULL DEFAULT 0,
    init_ticks INTEGER NOT NULL DEFAULT 0,
    conmon_pid INTEGER NOT NULL DEFAULT 0,
    conmon_ticks INTEGER NOT NULL DEFAULT 0
) STRICT;
CREATE TABLE IF NOT EXISTS losses (
    container TEXT PRIMARY KEY,
    time_ms INTEGER NOT NULL
) STRICT
"""
_SELECT = (
    "SELECT containers.*, coalesce(losses.time_ms, 0) AS lost_time_ms"
    " FROM containers LEFT JOIN losses ON losses.container = containers.name"
)


class State(StrEnum):
    """Where a container is in its life."""

    CREATED = "created"
    RUNNING = "running"
    PAUSED = "paused"
    STOPPED = "stopped"
    ARRIVING = "arriving"

    @property
    def is_live(self) -> bool:
        """Whether there are processes."""
        return self in (State.RUNNING, State.PAUSED)

    @property
    def message(self) -> ContainerState:
        """As the API has it."""
        return _MESSAGES[self]


_MESSAGES = {
    State.CREATED: container_pb2.CONTAINER_STATE_CREATED,
    State.RUNNING: container_pb2.CONTAINER_STATE_RUNNING,
    State.PAUSED: container_pb2.CONTAINER_STATE_PAUSED,
    State.STOPPED: container_pb2.CONTAINER_STATE_STOPPED,
    State.ARRIVING: container_pb2.CONTAINER_STATE_ARRIVING,
}


@dataclass(frozen=True)
class Record:
    """One container. Times are milliseconds since 1970; pids with their start times (see agent.processes)."""

    name: str
    spec: ContainerSpec
    state: State
    should_run: bool
    create_time_ms: int
    start_time_ms: int
    exit_code: int | None
    restarts: int
    init_pid: int
    init_ticks: int
    conmon_pid: int
    conmon_ticks: int
    # When it was found to have ended without anybody having seen how; 0 if that has not been, or was heeded.
    lost_time_ms: int = 0

    def refuse(self, verb: str, *states: State) -> None:
        """Raise Precondition (WRONG_STATE) in one of these states, but Busy where it is on its way here."""
        if self.state in states:
            self._refuse_arriving()
            raise Precondition(f"cannot {verb} container {self.name}: it is {self.state}", reason="WRONG_STATE")

    def require(self, verb: str, *states: State) -> None:
        """Raise Precondition (WRONG_STATE) in any other state, but Busy where it is on its way here."""
        if self.state not in states:
            self._refuse_arriving()
            wanted = " or ".join(states)
            raise Precondition(
                f"cannot {verb} container {self.name}: it is {self.state}, not {wanted}", reason="WRONG_STATE"
            )

    def _refuse_arriving(self) -> None:
        if self.state is State.ARRIVING:
            raise Busy(f"container {self.name} is busy: it is on its way to this host; try again when it has arrived")


class Records:
    """The table of containers."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def get(self, name: str) -> Record:
        """The record; raises NotFound."""
        rows = self._database.rows(f"{_SELECT} WHERE name = ?", name)
        if not rows:
            raise NotFound(f"there is no container {name} on this host: see migrator ps", reason="CONTAINER_NOT_FOUND")
        return _record(rows[0])

    def all(self) -> list[Record]:
        return [_record(row) for row in self._database.rows(f"{_SELECT} ORDER BY name")]

    def insert(self, name: str, spec: ContainerSpec, state: State, create_time_ms: int = 0) -> Record:
        """A new record; raises AlreadyExists."""
        with self._database.transaction() as cursor:
            if cursor.execute("SELECT 1 FROM containers WHERE name = ?", (name,)).fetchone():
                raise AlreadyExists(f"there is a container {name} on this host already: choose another name")
            cursor.execute(
                "INSERT INTO containers (name, spec, state, create_time_ms) VALUES (?, ?, ?, ?)",
                (name, spec.SerializeToString(), state, create_time_ms or now_ms()),
            )
        return self.get(name)

    def update(self, name: str, **columns: int | str | None) -> Record:
        """Set columns; the names are ours, not a caller's."""
        assignments = ", ".join(f"{column} = ?" for column in columns)
        with self._database.transaction() as cursor:
            cursor.execute(f"UPDATE containers SET {assignments} WHERE name = ?", (*columns.values(), name))
        return self.get(name)

    def set_spec(self, name: str, spec: ContainerSpec) -> Record:
        """Replace the spec of a container whose volume has another size now."""
        with self._database.transaction() as cursor:
            cursor.execute("UPDATE containers SET spec = ? WHERE name = ?", (spec.SerializeToString(), name))
        return self.get(name)

    def note_loss(self, name: str) -> Record:
        """It has ended, and nobody has seen how."""
        with self._database.transaction() as cursor:
            cursor.execute("INSERT OR REPLACE INTO losses VALUES (?, ?)", (name, now_ms()))
        return self.get(name)

    def heed_loss(self, name: str) -> None:
        """An operator knows of it; nothing to do if there was none."""
        with self._database.transaction() as cursor:
            cursor.execute("DELETE FROM losses WHERE container = ?", (name,))

    def delete(self, name: str) -> None:
        with self._database.transaction() as cursor:
            cursor.execute("DELETE FROM containers WHERE name = ?", (name,))
            cursor.execute("DELETE FROM losses WHERE container = ?", (name,))


def now_ms() -> int:
    return time.time_ns() // 1_000_000


def _record(row: Row) -> Record:
    values = {key: row[key] for key in row.keys()}  # noqa: SIM118 - iterating a Row gives values
    values["spec"] = ContainerSpec.FromString(values["spec"])
    values["state"] = State(values["state"])
    values["should_run"] = bool(values["should_run"])
    return Record(**values)
