"""The memory's share of a migration at the source: everything populated once, then rounds over what was written.

Each process is a target of its own, named by its pid inside the container; offsets are its addresses.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, suppress

import structlog

from blockdev import extents
from blockdev.blocks import Piece
from blockdev.extents import Range
from migrator.errors import ExecutionError
from migrator.memory import Collected, Gone, MemoryTracker, Moment, ProcessGone, ProcessKey, mappings
from migrator.shm.copy import SharedCopy
from migrator.stream import Sender
from migrator.v1 import peer_pb2

# Above every address that a process can have: 47 bits on x86-64, 48 on arm64.
ADDRESS_END = 1 << 48

log = structlog.get_logger()


class MemoryCopy:
    """Copies the memory of one container's processes, private and shared."""

    def __init__(
        self,
        tracker: MemoryTracker,
        pid_inside: Callable[[int], int],
        pause: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self._tracker = tracker
        self._pause = pause
        self._pid_inside = pid_inside
        self._shared = SharedCopy(tracker)
        self._written: dict[ProcessKey, list[Range]] = {}
        self._gone: dict[ProcessKey, list[Range]] = {}
        # Which process each target holds: a pid may be used again.
        self._owners: dict[str, ProcessKey] = {}

    def collect(self, moment: Moment = Moment.RUNNING) -> int:
        """Look at what was written since the last time. Returns the bytes that `requests` would send now.

        Raises ExecutionError if direct I/O into the memory does not come to its end while the container stands still.
        """
        if moment is Moment.RUNNING and self._tracker.needs_pause:
            with self._pause():
                found = self._look(Moment.PAUSED)
        else:
            found = self._look(moment)
        for note in found.notes:
            log.info("memory", note=note)
        for change in found.processes:
            key = change.process
            self._written[key] = extents.merge([*self._written.get(key, []), *change.written])
            self._gone[key] = extents.merge([*self._gone.get(key, []), *change.gone])
        for key in found.ended:
            self._written.pop(key, None)
            self._gone.pop(key, None)
        if moment is Moment.LAST:
            self._add_vdso()
        return sum(map(extents.total, self._written.values())) + self._shared.add(found, moment)

    def left_out(self) -> list[os.stat_result]:
        """With the container frozen: the shared memory that CRIU need not dump."""
        return self._shared.left_out()

    def compare(self) -> None:
        """With the container frozen: look at all shared memory, so that the last collect need not."""
        self._drain()
        self._tracker.compare()

    def _look(self, moment: Moment) -> Collected:
        if moment is not Moment.RUNNING:
            self._drain()
        return self._tracker.collect(moment)

    def _drain(self) -> None:
        if problems := self._tracker.drain():
            raise ExecutionError(f"what is read into memory could be missed: {'; '.join(problems)}", reason="DIRECT_IO")

    def _add_vdso(self) -> None:
        """The kernel's own code in each process, which is no memory of the process: but CRIU looks at the old one."""
        for key, ranges in self._written.items():
            with suppress(ProcessGone):
                ranges.extend(Range(area.start, area.end) for area in mappings.read(key.pid) if area.name == "[vdso]")

    def requests(self, sender: Sender) -> Iterator[peer_pb2.SendRequest]:
        """All that was collected and not yet sent."""
        written, self._written = self._written, {}
        gone, self._gone = self._gone, {}
        for key, ranges in written.items():
            try:
                target = f"memory/{self._pid_inside(key.pid)}"
                yield from sender.batched(target, self._pieces(target, key, ranges, gone[key]))
            except ProcessGone:
                continue  # the next collect says so, too
        yield from self._shared.requests(sender)

    def _pieces(self, target: str, key: ProcessKey, written: Iterable[Range], gone: Iterable[Range]) -> Iterator[Piece]:
        if self._owners.setdefault(target, key) != key:
            self._owners[target] = key
            yield Piece(0, ADDRESS_END, None)
        for part in gone:
            yield Piece(part.start, part.length, None)
        # After what is gone: it may be back by now, and is then among this.
        for piece in self._tracker.read(key, written):
            yield Piece(piece.start, piece.end - piece.start, None) if isinstance(piece, Gone) else piece
