"""The records of the handover in the agent's database, both ends."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from sqlite3 import Cursor, Row

from agent.database import Database
from migrator import faults, handover, wire
from migrator.errors import NotFound
from migrator.handover import Decision, HandoverError, Incoming, Keep, Outgoing, Stage

# Records that are kept when all is done: the other end may have been away since, and may ask.
KEPT = 1000
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
) STRICT;
CREATE TABLE IF NOT EXISTS words (
    migration TEXT PRIMARY KEY,
    since_time_ms INTEGER NOT NULL,
    heard_time_ms INTEGER NOT NULL,
    said TEXT NOT NULL
) STRICT;
CREATE TABLE IF NOT EXISTS resolved (
    migration TEXT PRIMARY KEY,
    time_ms INTEGER NOT NULL
) STRICT
"""
_OUTGOING = "SELECT outgoing.*, resolved.time_ms AS resolved FROM outgoing LEFT JOIN resolved USING (migration)"
_INCOMING = "SELECT incoming.*, resolved.time_ms AS resolved FROM incoming LEFT JOIN resolved USING (migration)"


@dataclass(frozen=True)
class Word:
    """What the other end has said last, for people, and since when this end waits for its word. Unix times."""

    since_time_ms: int
    heard_time_ms: int
    said: str


class Outgoings:
    """Records of migrations away from this host (`migrator.handover.OutgoingJournal`)."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def begin(self, migration: str, container: str, destination: str, above: int) -> Outgoing:
        with self._database.transaction() as cursor:
            known = _epoch(cursor, container)
            wire.check_epoch(above, known)
            epoch = max(known, above) + 1
            cursor.execute("INSERT OR REPLACE INTO epochs VALUES (?, ?)", (container, epoch))
            record = Outgoing(migration, container, destination, epoch)
            _forget(cursor, "outgoing", "destination", destination)
            cursor.execute(
                "INSERT INTO outgoing (migration, container, destination, epoch, decision) VALUES (?, ?, ?, ?, ?)",
                (migration, container, destination, record.epoch, record.decision),
            )
        return record

    def get(self, migration: str) -> Outgoing | None:
        rows = self._database.rows(f"{_OUTGOING} WHERE migration = ?", migration)
        return _outgoing(rows[0]) if rows else None

    def unfinished(self) -> list[Outgoing]:
        """Records that a restarted agent has to finish."""
        return [_outgoing(row) for row in self._database.rows(f"{_OUTGOING} WHERE NOT finished")]

    def release(self, migration: str) -> Outgoing:
        return self._step(migration, "release", handover.release, said="it is ready")

    def abort(self, migration: str) -> Outgoing:
        return self._step(migration, "abort", handover.abort)

    def hear(self, migration: str, answer: Stage) -> Outgoing:
        return self._step(migration, "hear", lambda record: handover.hear(record, answer))

    def resolve(self, migration: str, keep: Keep) -> Outgoing:
        """`handover.resolve_outgoing`, durable on return."""
        return self._step(migration, "resolve", lambda record: handover.resolve_outgoing(record, keep))

    def finish(self, migration: str) -> None:
        self._step(migration, "finish", lambda record: replace(record, finished=True))

    def heard(self, migration: str, said: str) -> None:
        with self._database.transaction() as cursor:
            _note(cursor, migration, said)

    def word(self, migration: str) -> Word | None:
        """What the destination has said last, once `released` is written."""
        return _word(self._database, migration)

    def _step(self, migration: str, name: str, step: Callable[[Outgoing], Outgoing], said: str = "") -> Outgoing:
        with self._database.transaction() as cursor:
            row = cursor.execute(f"{_OUTGOING} WHERE migration = ?", (migration,)).fetchone()
            if row is None:
                raise NotFound(f"no record of migration {migration} here", reason="MIGRATION_NOT_FOUND")
            before = _outgoing(row)
            record = step(before)
            cursor.execute(
                "UPDATE outgoing SET decision = ?, answer = ?, finished = ? WHERE migration = ?",
                (record.decision, record.answer, int(record.finished), migration),
            )
            _note_step(cursor, migration, record, was_operators=before.by_operator, said=said)
            faults.point(f"source.journal.{name}")
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
            wire.check_epoch(epoch, known)
            if cursor.execute("SELECT 1 FROM incoming WHERE migration = ?", (migration,)).fetchone():
                raise HandoverError(f"migration {migration} was here before")
            _forget(cursor, "incoming", "source", source)
            cursor.execute("INSERT OR REPLACE INTO epochs VALUES (?, ?)", (container, epoch))
            cursor.execute(
                "INSERT INTO incoming (migration, container, source, epoch, stage) VALUES (?, ?, ?, ?, ?)",
                (migration, container, source, epoch, record.stage),
            )
        return record

    def get(self, migration: str) -> Incoming | None:
        rows = self._database.rows(f"{_INCOMING} WHERE migration = ?", migration)
        return _incoming(rows[0]) if rows else None

    def unfinished(self) -> list[Incoming]:
        """Records that a restarted agent has to finish."""
        return [_incoming(row) for row in self._database.rows(f"{_INCOMING} WHERE NOT finished")]

    def make_ready(self, migration: str) -> Incoming:
        return self._step(migration, "ready", handover.make_ready, said="restore it and hold it")

    def own(self, migration: str) -> Incoming:
        return self._step(migration, "own", handover.own)

    def refuse(self, migration: str) -> Incoming:
        return self._step(migration, "refuse", handover.refuse)

    def resolve(self, migration: str, keep: Keep) -> Incoming:
        return self._step(migration, "resolve", lambda record: handover.resolve_incoming(record, keep))

    def finish(self, migration: str) -> None:
        self._step(migration, "finish", lambda record: replace(record, finished=True))

    def heard(self, migration: str, said: str) -> None:
        with self._database.transaction() as cursor:
            _note(cursor, migration, said)

    def word(self, migration: str) -> Word | None:
        """What the source has said last, once `ready` is written."""
        return _word(self._database, migration)

    def _step(self, migration: str, name: str, step: Callable[[Incoming], Incoming], said: str = "") -> Incoming:
        with self._database.transaction() as cursor:
            row = cursor.execute(f"{_INCOMING} WHERE migration = ?", (migration,)).fetchone()
            if row is None:
                raise NotFound(f"no record of migration {migration} here", reason="MIGRATION_NOT_FOUND")
            before = _incoming(row)
            record = step(before)
            cursor.execute(
                "UPDATE incoming SET stage = ?, finished = ? WHERE migration = ?",
                (record.stage, int(record.finished), migration),
            )
            _note_step(cursor, migration, record, was_operators=before.by_operator, said=said)
            faults.point(f"destination.journal.{name}")
        return record


def _note_step(cursor: Cursor, migration: str, record: Outgoing | Incoming, *, was_operators: bool, said: str) -> None:
    if said:
        _note(cursor, migration, said)
    if record.by_operator and not was_operators:
        cursor.execute("INSERT OR REPLACE INTO resolved VALUES (?, ?)", (migration, _now_ms()))
    elif was_operators and not record.by_operator:
        cursor.execute("DELETE FROM resolved WHERE migration = ?", (migration,))
    if record.finished:
        cursor.execute("DELETE FROM words WHERE migration = ?", (migration,))


def _note(cursor: Cursor, migration: str, said: str) -> None:
    cursor.execute(
        "INSERT INTO words VALUES (:migration, :now, :now, :said)"
        " ON CONFLICT DO UPDATE SET heard_time_ms = :now, said = :said",
        {"migration": migration, "now": _now_ms(), "said": said},
    )


def _word(database: Database, migration: str) -> Word | None:
    rows = database.rows("SELECT since_time_ms, heard_time_ms, said FROM words WHERE migration = ?", migration)
    return Word(*rows[0]) if rows else None


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


def _epoch(cursor: Cursor, container: str) -> int:
    row = cursor.execute("SELECT epoch FROM epochs WHERE container = ?", (container,)).fetchone()
    return int(row["epoch"]) if row else 0


def _forget(cursor: Cursor, table: str, column: str, peer: str) -> None:
    """Finished records of one peer that it does not ask about any more, so that a table has a size."""
    newest = f"SELECT migration FROM {table} WHERE {column} = ? ORDER BY rowid DESC LIMIT {KEPT}"
    cursor.execute(f"DELETE FROM {table} WHERE finished AND {column} = ? AND migration NOT IN ({newest})", (peer, peer))


def _outgoing(row: Row) -> Outgoing:
    return Outgoing(
        row["migration"],
        row["container"],
        row["destination"],
        row["epoch"],
        Decision(row["decision"]),
        Stage(row["answer"]) if row["answer"] else None,
        bool(row["finished"]),
        row["resolved"] is not None,
    )


def _incoming(row: Row) -> Incoming:
    return Incoming(
        row["migration"],
        row["container"],
        row["source"],
        row["epoch"],
        Stage(row["stage"]),
        bool(row["finished"]),
        row["resolved"] is not None,
    )
