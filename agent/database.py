"""The agent's durable state: one SQLite file, written through to the disk before anything is said or done.

WAL with synchronous=FULL: a committed transaction survives a power cut (sqlite.org/pragma.html#pragma_synchronous).
Each module that keeps a table names its schema; this one only opens, shares and serialises.
"""

import os
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

BUSY_TIMEOUT_S = 10.0


class Database:
    """One connection for all threads of a process; several processes (agent, guard) may have the file open."""

    def __init__(self, path: Path, schemas: Sequence[str]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Specs hold environments, and these secrets. The files beside it get the same mode from SQLite.
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        path.chmod(0o600)
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
        """A write transaction: durable when the block ends, undone if it raises."""
        with self._lock:
            cursor = self._connection.cursor()
            cursor.execute("BEGIN IMMEDIATE")
            try:
                yield cursor
            except BaseException:
                cursor.execute("ROLLBACK")
                raise
            cursor.execute("COMMIT")

    def rows(self, query: str, *parameters: object) -> list[sqlite3.Row]:
        """All rows of a SELECT."""
        with self._lock:
            return self._connection.execute(query, parameters).fetchall()

    def close(self) -> None:
        """Close the file; the object is of no use afterwards."""
        with self._lock:
            self._connection.close()
