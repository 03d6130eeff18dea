"""The memory of a container's processes, followed from look to look: what was written, and what is no longer there.

What a caller does, round by round: `collect()`, then `read()` what it reports, in this order. What is written after a
collect, also while it is being read, is in the next one. The last collect is with `Moment.LAST`.

Memory that is written past the page tables (a read with O_DIRECT or by AIO into a buffer) can escape a look at a
running container: the page is protected while the read is in flight, and what the read brings is not seen. Processes
that have files open for that are named in `Collected.direct_io`, and all of their memory counts as written in the first
paused collect after. A caller who does not want to pay that freezes the container for a moment at every round, calls
`drain` and collects with `Moment.PAUSED`: then nothing is in flight, nothing is missed and nothing is told twice.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol

from blockdev.blocks import Batch
from blockdev.extents import Range
from migrator.memory.mappings import Mapping
from migrator.memory.processes import ProcessKey
from migrator.memory.shared import ObjectKey

Pids = Callable[[], Iterable[int]]


class Moment(Enum):
    """What the container does during a collect, which the caller sees to."""

    RUNNING = "running"
    # As RUNNING, but the look is to be short: of what is no longer there in large mappings the next one tells.
    HURRIED = "hurried"
    # All tasks are frozen (the freezer says FROZEN) and `drain` found nothing in flight. It may run again afterwards.
    PAUSED = "paused"
    # As PAUSED, and it stands still until the end: what was written to shared memory is left to `compare`.
    STOPPED = "stopped"
    # As STOPPED, and what is reported has to be complete: shared memory is compared as a whole, if it was not since the
    # container was stopped, and none is released.
    LAST = "last"

    @property
    def is_running(self) -> bool:
        """Whether the container runs meanwhile."""
        return self in (Moment.RUNNING, Moment.HURRIED)


@dataclass(frozen=True)
class ProcessChange:
    """Addresses in private memory. `gone` and `written` have nothing in common. `watched` is False where all that is
    there is told, since the process cannot be watched yet."""

    process: ProcessKey
    written: list[Range]
    gone: list[Range]
    watched: bool


@dataclass(frozen=True)
class SharedChange:
    """Offsets in an object of shared memory; `name` as in /proc/PID/maps."""

    key: ObjectKey
    name: str
    size_bytes: int
    written: list[Range]
    gone: list[Range]


@dataclass(frozen=True)
class Collected:
    """What changed since the last collect. In the first one that is everything populated.

    `ended` processes and `released` objects have nothing more to be kept. An object is released when no process maps it
    or, of a memfd, has it open; one that is seen again is told as a new one. `direct_io` are processes with I/O past
    the page tables. `unseen` is what page tables say in a STOPPED collect of shared memory: `compare` finds so much at
    the most, but for what was written by other means. `notes` are sentences for a log.
    """

    processes: list[ProcessChange] = field(default_factory=list)
    shared: list[SharedChange] = field(default_factory=list)
    ended: list[ProcessKey] = field(default_factory=list)
    released: list[ObjectKey] = field(default_factory=list)
    direct_io: list[ProcessKey] = field(default_factory=list)
    unseen: list[Range] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


class MemoryTracker(Protocol):
    """Reports what was written in a set of processes. Use it from one thread at a time; after `close` not at all."""

    @property
    def name(self) -> str:
        """Of the method."""

    @property
    def needs_pause(self) -> bool:
        """Whether a collect while the container runs tells no more than what is populated."""

    def start(self) -> None:
        """Begin to watch the processes that there are. Raises Untrackable, naming the one that cannot be."""

    def collect(self, moment: Moment = Moment.RUNNING) -> Collected:
        """See Collected. A process that comes, goes or calls exec meanwhile is no error."""

    def drain(self, seconds: float = 1.0) -> list[str]:
        """With the container frozen: wait until no direct I/O of it is in flight.

        What still is after `seconds`, or cannot be seen, as sentences: with any of these, a PAUSED or LAST collect can
        miss what it brings."""

    def read(self, process: ProcessKey, ranges: Iterable[Range]) -> Iterator[Batch]:
        """What is at addresses now, in order; zeros where nothing is any more, of which the next collect tells.

        Raises ProcessGone."""

    def read_shared(self, key: ObjectKey, ranges: Iterable[Range]) -> Iterator[Batch]:
        """The same of an object that the last collect reported."""

    def populated(self, process: ProcessKey) -> list[Range]:
        """Addresses of all private memory that a process had in the last collect, which reported it."""

    def areas(self, process: ProcessKey) -> list[Mapping]:
        """The mappings that a process had in the last collect, which reported it."""

    def get_ready(self) -> None:
        """After a collect, while the container runs: do for `compare` what can be done before."""

    def compare(self) -> list[SharedChange]:
        """After a STOPPED collect: what has changed in any way in shared memory since the last look at it.

        It may be called in another thread while nothing else asks the tracker."""

    def collect_ahead(self, process: ProcessKey) -> ProcessChange | None:
        """After a STOPPED collect: what has changed in one process since. Nothing writes to it any more: a LAST collect
        does not look at its private memory again. None if it has to."""

    def status(self, key: ObjectKey) -> os.stat_result:
        """Of an object that the last collect reported."""

    def close(self) -> None:
        """Leave the processes as they were."""
