"""Containers are paused before the pool is full, and go on when there is room: a full pool is I/O errors for them.

A pause is noted before it is made, so that a restarted agent knows which containers it has paused itself.
"""

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import structlog

from agent.container_records import Record, State, now_ms
from agent.containers import Containers
from agent.database import Database
from blockdev import pool
from blockdev.pool import Room
from migrator.errors import Busy, MigratorError, NotFound, Precondition
from migrator.units import format_size

SCHEMA = """
CREATE TABLE IF NOT EXISTS room_pauses (
    container TEXT PRIMARY KEY,
    since_ms INTEGER NOT NULL
) STRICT
"""
REASON = "NO_SPACE"
LOOK_S = 0.25
# Containers are paused early enough for so long at the rate at which the pool fills.
HORIZON_S = 2.0
WORKERS = 64
# Tasks that wait for a slow disk stop when that is over; those of the container that can be stopped are meanwhile.
FREEZE_S = 60.0

log = structlog.get_logger()


def is_short(room: Room, unwritten_bytes: int, bytes_per_s: float, *, was_short: bool) -> bool:
    """Whether containers have to stand still. What the page cache has of theirs is written also when they do."""
    if was_short:
        return room.free_bytes < 2 * room.reserve_bytes
    return room.free_bytes < room.reserve_bytes + unwritten_bytes + max(0.0, bytes_per_s) * HORIZON_S


@dataclass(frozen=True)
class _Seen:
    free_bytes: int
    at_s: float


class RoomGuard:
    """Looks after the pool of a host; thread-safe. Call `look` every `LOOK_S`.

    `cancel_migration` lets go of a container by rolling its migration back, if there is no time to wait for its end.
    """

    def __init__(
        self,
        database: Database,
        containers: Containers,
        folder: Path,
    ) -> None:
        self._database = database
        self._containers = containers
        self._folder = folder
        self.cancel_migration: Callable[[str], None] = lambda container: None
        self._last: _Seen | None = None
        self._short = bool(self.pauses())
        self._looking = threading.Lock()

    def pauses(self) -> set[str]:
        """The containers that stand still for want of room."""
        return {row["container"] for row in self._database.rows("SELECT container FROM room_pauses")}

    def check_resume(self, container: str) -> None:
        """Raises Precondition (NO_SPACE) for a container that has to wait for room."""
        if self._short and container in self.pauses():
            room = pool.room(self._folder)
            raise Precondition(
                f"container {container} is paused, since the pool is nearly full: {format_size(room.free_bytes)} are"
                f" free. It goes on by itself when {format_size(2 * room.reserve_bytes)} are: remove images, snapshots"
                " or containers, or move it to another host",
                reason=REASON,
            )

    def look(self) -> None:
        """Pause or resume what has to be."""
        with self._looking:
            room, now = pool.room(self._folder), time.monotonic()
            rate = 0.0
            if self._last is not None and now > self._last.at_s:
                rate = (self._last.free_bytes - room.free_bytes) / (now - self._last.at_s)
            self._last = _Seen(room.free_bytes, now)
            was_short, self._short = self._short, self._decide(room, rate)
            if self._short != was_short:
                say = log.warning if self._short else log.info
                text = "the pool is nearly full: containers are paused" if self._short else "the pool has room again"
                say(text, free_bytes=room.free_bytes, reserve_bytes=room.reserve_bytes)
            if self._short:
                running = [record for record in self._containers.all() if self._has_to_stop(record)]
                with ThreadPoolExecutor(WORKERS, thread_name_prefix="room") as workers:
                    list(workers.map(lambda record: self._pause(record, room), running))
            for name in sorted(self.pauses()):
                self._settle(name)

    # Inside

    def _decide(self, room: Room, rate: float) -> bool:
        unwritten_bytes = 0
        # What all of the host has unwritten is one file to read; most of the time that is enough to know.
        if is_short(room, _dirty_bytes(), rate, was_short=self._short):
            for record in self._containers.all():
                if record.state is State.RUNNING:
                    unwritten_bytes += self._containers.cgroup(record.name).unwritten_bytes()
        return is_short(room, unwritten_bytes, rate, was_short=self._short)

    def _has_to_stop(self, record: Record) -> bool:
        if record.state is State.RUNNING:
            return True
        # One whose migration was rolled back runs, since it would have gone on elsewhere.
        return (
            record.state is State.PAUSED
            and record.name in self.pauses()
            and not self._containers.cgroup(record.name).is_frozen()
        )

    def _pause(self, record: Record, room: Room) -> None:
        name = record.name
        is_new = self._note(name)
        try:
            self._containers.pause(name, again=True, timeout_s=FREEZE_S)
        except Busy as error:
            if is_new:
                log.warning("cannot be paused for want of room yet", container=name, error=str(error))
            if record.state is State.RUNNING and room.free_bytes < room.reserve_bytes // 2:
                self.cancel_migration(name)
        except NotFound:
            return
        except MigratorError as error:
            log.error("cannot be paused for want of room", container=name, error=str(error))
        else:
            log.warning("paused: the pool is nearly full", container=name, free_bytes=room.free_bytes)

    def _settle(self, name: str) -> None:
        """Forget the note of one that does not stand still, and let it go on if there is room."""
        try:
            state = self._containers.record(name).state
            if state is State.PAUSED:
                if self._short:
                    return
                self._containers.resume(name)
                log.info("resumed: the pool has room again", container=name)
            elif self._short and state is State.RUNNING:
                return  # it could not be paused yet
        except NotFound:
            pass
        except Busy:
            return
        except MigratorError as error:
            log.error("cannot resume", container=name, error=str(error))
            return
        with self._database.transaction() as cursor:
            cursor.execute("DELETE FROM room_pauses WHERE container = ?", (name,))

    def _note(self, name: str) -> bool:
        """Whether it was not noted before."""
        if name in self.pauses():
            return False
        with self._database.transaction() as cursor:
            cursor.execute("INSERT INTO room_pauses VALUES (?, ?)", (name, now_ms()))
        return True


def _dirty_bytes() -> int:
    """What the host's page cache has still to write (proc_meminfo(5))."""
    found = 0
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith(("Dirty:", "Writeback:")):
            found += int(line.split()[1]) << 10
    return found
