"""How one migration goes: its phases and times, its numbers, its end, and whether somebody wants it to stop.

The worker writes, any number of watchers read. Times are from the monotonic clock of this host.
"""

import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from migrator.errors import Cancelled, MigratorError, TimedOut
from migrator.stream import Meter
from migrator.v1 import migration_pb2, peer_pb2

# Targets of streams that are memory, by what their names begin with.
MEMORY_KINDS = ("memory", "shared", "image", "images")


class Progress:
    """A migration resource that changes; watchers are woken at each change but that of bytes sent."""

    def __init__(self, migration: migration_pb2.Migration, timeout_ms: int = 0, bandwidth_bytes_per_s: int = 0) -> None:
        """No limit where 0 is given."""
        self.meter = Meter(bandwidth_bytes_per_s, self.check)
        """Of all that is sent."""
        self._migration = migration
        self._condition = threading.Condition()
        self._began = time.monotonic()
        self._deadline = self._began + timeout_ms / 1000 if timeout_ms else None
        self._cancelled = False
        self._committed = False
        self._version = 0

    def snapshot(self) -> migration_pb2.Migration:
        """The migration as it is now."""
        with self._condition:
            copy = migration_pb2.Migration()
            copy.CopyFrom(self._migration)
            return copy

    def wait(self, version: int, timeout_s: float) -> tuple[int, migration_pb2.Migration]:
        """Wait for a change after `version` (0: none seen yet) or the timeout; returns version and migration."""
        with self._condition:
            self._condition.wait_for(lambda: self._version > version, timeout_s)
            copy = migration_pb2.Migration()
            copy.CopyFrom(self._migration)
            return self._version, copy

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """One phase; its start and duration are noted, also if it fails."""
        with self._change() as migration:
            phase = migration.phases.add(name=name, start_ms=self._elapsed_ms())
        try:
            yield
        finally:
            with self._change():
                phase.duration_ms = self._elapsed_ms() - phase.start_ms

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """One step of the phase that runs."""
        began = time.monotonic()
        try:
            yield
        finally:
            self.steps([peer_pb2.TimedStep(name=name, duration_ms=(time.monotonic() - began) * 1000)])

    def steps(self, steps: Iterable[peer_pb2.TimedStep]) -> None:
        """Steps of the phase that runs, timed elsewhere."""
        with self._condition:
            phase = self._migration.phases[-1]
            phase.steps.extend(migration_pb2.Step(name=s.name, duration_ms=s.duration_ms) for s in steps)

    def sent(self, planned_bytes: int = 0) -> None:
        """The meter has counted more. It wakes nobody: it comes often. `planned_bytes` are what the disk has to send at
        least: progress is told as a part of that."""
        content = self.meter.content_bytes
        copied = content.get("volume", 0) + content.get("snapshot", 0)
        with self._condition:
            counted = self._migration.bytes
            counted.memory = sum(content.get(kind, 0) for kind in MEMORY_KINDS)
            counted.disk, counted.wire = copied, self.meter.wire_bytes
            self._migration.progress = min(1.0, copied / planned_bytes) if planned_bytes else 1.0

    def queued(self, position: int, host: str) -> None:
        """It waits for one of this host's places; 0: no more."""
        with self._change() as migration:
            migration.queue_position = position
            migration.queue_host = host if position else ""

    def note(self, text: str) -> None:
        """Something for those who want to know more."""
        with self._change() as migration:
            migration.notes.append(text)

    def downtime(self, milliseconds: float) -> None:
        """The container stood still for so long."""
        with self._change() as migration:
            migration.downtime_ms = milliseconds

    def missing(self, count: int) -> None:
        """So many bytes of memory are only here yet, while it runs at the destination."""
        with self._change() as migration:
            migration.missing_bytes = count
            migration.where_running = migration.destination

    def cancel(self) -> bool:
        """Ask it to end; False if it is committed already."""
        with self._condition:
            if not self._committed:
                self._cancelled = True
            return self._cancelled

    def check(self) -> None:
        """Raise Cancelled or TimedOut if it has to end, which it need not once it is committed."""
        if self._committed:
            return
        if self._cancelled:
            raise Cancelled("cancelled before the handover")
        if self._deadline is not None and time.monotonic() > self._deadline:
            raise TimedOut("the time given with --timeout passed before the handover")

    def commit(self) -> None:
        """The last check: from here it cannot be cancelled."""
        with self._condition:
            self.check()
            self._committed = True

    def end(self, outcome: migration_pb2.Outcome, where: str, error: MigratorError | None = None) -> None:
        """How it ended and where the container is. An uncertain one may end again."""
        with self._change() as migration:
            migration.outcome = outcome
            migration.queue_position, migration.queue_host = 0, ""
            migration.missing_bytes = 0
            migration.where_running = where
            migration.total_ms = self._elapsed_ms()
            migration.error = str(error) if error else ""
            migration.reason = error.reason if error else ""
            migration.exit_code = int(error.exit_code) if error else 0

    def _elapsed_ms(self) -> float:
        return (time.monotonic() - self._began) * 1000

    @contextmanager
    def _change(self) -> Iterator[migration_pb2.Migration]:
        with self._condition:
            yield self._migration
            self._version += 1
            self._condition.notify_all()
