"""The agent's durable state: one SQLite file, written through to the disk before anything is said or done.

WAL with synchronous=FULL: a committed transaction survives a power cut (sqlite.org/pragma.html#pragma_synchronous).
Each module that keeps a table names its schema; this one only opens, shares and serialises.
"""

import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from migrator import faults
from migrator.errors import ExecutionError

BUSY_TIMEOUT_S = 10.0


class DatabaseError(ExecutionError):
    """The agent's state could not be read or written: the disk is full or failing, say."""

    reason = "DATABASE_FAILED"


@contextmanager
def _errors(doing: str) -> Iterator[None]:
    """A failing disk is a failure like others; a mistake in the SQL is not."""
    try:
        yield
    except (sqlite3.DatabaseError, OSError) as error:
        if isinstance(error, sqlite3.IntegrityError | sqlite3.ProgrammingError):
            raise
        message = f"{doing} the agent's database failed: {error}; look after the disk of its state folder"
        raise DatabaseError(message) from error


class Database:
    """One connection for all threads of a process; several processes (agent, guard) may have the file open."""

    def __init__(self, path: Path, schemas: Sequence[str]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Specs hold environments, and these secrets. The files beside it get the same mode from SQLite.
        if path.exists():
            path.chmod(0o600)
        else:
            path.touch(mode=0o600)
        self._connection = sqlite3.connect(path, timeout=BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False)
        self._connection.row_factory = sqlite3.Row
        self._lock = threading.RLock()
        self._connection.execute("PRAGMA journal_mode=WAL")
        self._connection.execute("PRAGMA synchronous=FULL")
        with self.transaction() as cursor:
            for schema in schemas:
                for statement in filter(str.strip, schema.split(";")):
                    cursor.execute(statement)

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Cursor]:
        """A write transaction: durable when the block ends, undone if it raises. Raises DatabaseError.

        If it is the commit that failed, a crash before the next one may still find it on the disk.
        """
        with self._lock, _errors("writing"):
            cursor = self._connection.cursor()
            cursor.execute("BEGIN IMMEDIATE")
            try:
                yield cursor
                faults.point("database.commit")
                cursor.execute("COMMIT")
            except BaseException:
                # SQLite has ended it by itself after some errors, such as a full disk.
                if self._connection.in_transaction:
                    cursor.execute("ROLLBACK")
                raise

    def rows(self, query: str, *parameters: object) -> list[sqlite3.Row]:
        """All rows of a SELECT. Raises DatabaseError."""
        with self._lock, _errors("reading"):
            return self._connection.execute(query, parameters).fetchall()

    def close(self) -> None:
        """Close the file; the object is of no use afterwards."""
        with self._lock:
            self._connection.close()
