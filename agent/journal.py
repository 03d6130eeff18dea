"""The records of the handover in the agent's database, both ends."""

from collections.abc import Callable
from dataclasses import replace
from sqlite3 import Cursor, Row

from agent.database import Database
from migrator import handover
from migrator.errors import NotFound
from migrator.handover import Decision, HandoverError, Incoming, Outgoing, Stage

SCHEMA = """
CREATE TABLE IF NOT EXISTS epochs (
    container TEXT PRIMARY KEY,
    epoch INTEGER NOT NULL
) STRICT;
CREATE TABLE IF NOT EXISTS outgoing (
    migration TEXT PRIMARY KEY,
    container TEXT NOT NULL,
    destination TEXT NOT NULL,
    epoch INTEGER NOT NULL,
    decision TEXT NOT NULL,
    answer TEXT,
    finished INTEGER NOT NULL DEFAULT 0
) STRICT;
CREATE TABLE IF NOT EXISTS incoming (
    migration TEXT PRIMARY KEY,
    container TEXT NOT NULL,
    source TEXT NOT NULL,
    epoch INTEGER NOT NULL,
    stage TEXT NOT NULL,
    finished INTEGER NOT NULL DEFAULT 0
) STRICT
"""


class Outgoings:
    """Records of migrations away from this host (`migrator.handover.OutgoingJournal`)."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def begin(self, migration: str, container: str, destination: str, above: int) -> Outgoing:
        with self._database.transaction() as cursor:
            epoch = max(_epoch(cursor, container), above) + 1
            cursor.execute("INSERT OR REPLACE INTO epochs VALUES (?, ?)", (container, epoch))
            record = Outgoing(migration, container, destination, epoch)
            cursor.execute(
                "INSERT INTO outgoing (migration, container, destination, epoch, decision) VALUES (?, ?, ?, ?, ?)",
                (migration, container, destination, record.epoch, record.decision),
            )
        return record

    def get(self, migration: str) -> Outgoing | None:
        rows = self._database.rows("SELECT * FROM outgoing WHERE migration = ?", migration)
        return _outgoing(rows[0]) if rows else None

    def unfinished(self) -> list[Outgoing]:
        """Records that a restarted agent has to finish."""
        return [_outgoing(row) for row in self._database.rows("SELECT * FROM outgoing WHERE NOT finished")]

    def release(self, migration: str) -> Outgoing:
        return self._step(migration, handover.release)

    def abort(self, migration: str) -> Outgoing:
        return self._step(migration, handover.abort)

    def hear(self, migration: str, answer: Stage) -> Outgoing:
        return self._step(migration, lambda record: handover.hear(record, answer))

    def finish(self, migration: str) -> None:
        self._step(migration, lambda record: replace(record, finished=True))

    def _step(self, migration: str, step: Callable[[Outgoing], Outgoing]) -> Outgoing:
        with self._database.transaction() as cursor:
            row = cursor.execute("SELECT * FROM outgoing WHERE migration = ?", (migration,)).fetchone()
            if row is None:
                raise NotFound(f"no record of migration {migration} here", reason="MIGRATION_NOT_FOUND")
            record = step(_outgoing(row))
            cursor.execute(
                "UPDATE outgoing SET decision = ?, answer = ?, finished = ? WHERE migration = ?",
                (record.decision, record.answer, int(record.finished), migration),
            )
        return record


class Incomings:
    """Records of migrations to this host (`migrator.handover.IncomingJournal`)."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def last_epoch(self, container: str) -> int:
        """The highest epoch that a container of this name has had here; 0 if none."""
        rows = self._database.rows("SELECT epoch FROM epochs WHERE container = ?", container)
        return int(rows[0]["epoch"]) if rows else 0

    def begin(self, migration: str, container: str, source: str, epoch: int) -> Incoming:
        record = Incoming(migration, container, source, epoch)
        with self._database.transaction() as cursor:
            known = _epoch(cursor, container)
            if epoch <= known:
                raise HandoverError(f"{container} was here with epoch {known}; {source} offers epoch {epoch}: refused")
            cursor.execute("INSERT OR REPLACE INTO epochs VALUES (?, ?)", (container, epoch))
            cursor.execute(
                "INSERT INTO incoming (migration, container, source, epoch, stage) VALUES (?, ?, ?, ?, ?)",
                (migration, container, source, epoch, record.stage),
            )
        return record

    def get(self, migration: str) -> Incoming | None:
        rows = self._database.rows("SELECT * FROM incoming WHERE migration = ?", migration)
        return _incoming(rows[0]) if rows else None

    def unfinished(self) -> list[Incoming]:
        """Records that a restarted agent has to finish."""
        return [_incoming(row) for row in self._database.rows("SELECT * FROM incoming WHERE NOT finished")]

    def make_ready(self, migration: str) -> Incoming:
        return self._step(migration, handover.make_ready)

    def own(self, migration: str) -> Incoming:
        return self._step(migration, handover.own)

    def refuse(self, migration: str) -> Incoming:
        return self._step(migration, handover.refuse)

    def finish(self, migration: str) -> None:
        self._step(migration, lambda record: replace(record, finished=True))

    def _step(self, migration: str, step: Callable[[Incoming], Incoming]) -> Incoming:
        with self._database.transaction() as cursor:
            row = cursor.execute("SELECT * FROM incoming WHERE migration = ?", (migration,)).fetchone()
            if row is None:
                raise NotFound(f"no record of migration {migration} here", reason="MIGRATION_NOT_FOUND")
            record = step(_incoming(row))
            cursor.execute(
                "UPDATE incoming SET stage = ?, finished = ? WHERE migration = ?",
                (record.stage, int(record.finished), migration),
            )
        return record


def _epoch(cursor: Cursor, container: str) -> int:
    row = cursor.execute("SELECT epoch FROM epochs WHERE container = ?", (container,)).fetchone()
    return int(row["epoch"]) if row else 0


def _outgoing(row: Row) -> Outgoing:
    answer = Stage(row["answer"]) if row["answer"] else None
    decision = Decision(row["decision"])
    return Outgoing(
        row["migration"], row["container"], row["destination"], row["epoch"], decision, answer, bool(row["finished"])
    )


def _incoming(row: Row) -> Incoming:
    return Incoming(
        row["migration"], row["container"], row["source"], row["epoch"], Stage(row["stage"]), bool(row["finished"])
    )
