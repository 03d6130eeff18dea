"""The memory's share of a migration at the source: everything populated once, then rounds over what was written.

A process is named by its pid inside the container; offsets are its addresses.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, suppress
from pathlib import Path

import structlog

from blockdev import blocks, extents
from blockdev.blocks import Batch, Piece
from blockdev.extents import Range
from migrator import pageless
from migrator.errors import ExecutionError
from migrator.fill import images as fill_images
from migrator.fill import missing
from migrator.fill.store import ADDRESS_END
from migrator.memory import Collected, MemoryTracker, Moment, ProcessChange, ProcessGone, ProcessKey
from migrator.shm.copy import SharedCopy
from migrator.stream import MAX_PIECE_BYTES, Sender
from migrator.v1 import peer_pb2

log = structlog.get_logger()


FEATURE = "memory-together-v1"


class MemoryCopy:
    """Copies the memory of one container's processes, private and shared.

    `together` if the destination takes several processes in one request (`FEATURE`).
    """

    def __init__(
        self,
        tracker: MemoryTracker,
        pid_inside: Callable[[int], int],
        pause: Callable[[], AbstractContextManager[None]],
        *,
        together: bool = True,
    ) -> None:
        self._tracker = tracker
        self._together = together
        self._pause = pause
        self._pid_inside = pid_inside
        self._shared = SharedCopy(tracker)
        self._written: dict[ProcessKey, list[Range]] = {}
        self._gone: dict[ProcessKey, list[Range]] = {}
        # Those that the last collect has found, and of these those that were looked at ahead of the next one.
        self._found: list[ProcessKey] = []
        self._ahead: set[ProcessKey] = set()
        # Where the kernel's own code is in each process, once that is to be sent.
        self._vdso: dict[ProcessKey, list[Range]] = {}
        # Their pids inside the container.
        self._inside: dict[ProcessKey, int] = {}
        # Which process each pid inside stands for: it may be used again.
        self._owners: dict[int, ProcessKey] = {}
        self.shared_bytes = 0
        """Of what the last look has found, what is shared."""
        self.stays_behind = False
        """Post-copy: what is collected of private memory is not sent, but left to `leave`."""

    @property
    def is_quick(self) -> bool:
        """Whether a look does not stop the container."""
        return not self._tracker.needs_pause

    def collect(self, moment: Moment = Moment.RUNNING) -> int:
        """Look at what was written since the last time. Returns the bytes that `requests` would send now.

        Raises ExecutionError if direct I/O into the memory does not come to its end while the container stands still.
        """
        if moment.is_running and self._tracker.needs_pause:
            with self._pause():
                found = self._look(Moment.PAUSED)
        else:
            found = self._look(moment)
        if moment.is_running:
            self._tracker.get_ready()
        for note in found.notes:
            log.info("memory", note=note)
        for change in found.processes:
            self._take(change)
        for key in found.ended:
            for known in (self._written, self._gone, self._inside, self._vdso):
                known.pop(key, None)
        self._found = [change.process for change in found.processes]
        self._ahead.clear()
        self.shared_bytes = self._shared.add(found, moment)
        written = sum(map(extents.total, self._written.values())) + extents.total(found.unseen)
        return written + self.shared_bytes

    def left_out(self) -> list[os.stat_result]:
        """With the container frozen: the shared memory that CRIU need not dump."""
        return self._shared.left_out()

    def collect_dumped(self, images: Path) -> None:
        """While CRIU dumps into `images`, after the collect with the container stopped: look for the last time at those
        processes that it has done with. It then writes the image of this name (cr-dump.c, CRIU 4.2)."""
        for key in self._found:
            with suppress(ProcessGone):
                if key not in self._ahead and (images / f"fs-{self._number(key)}.img").exists():
                    self._ahead.add(key)
                    if change := self._tracker.collect_ahead(key):
                        self._take(change)

    def complete(self, images: Path) -> None:
        """After the last collect: amend CRIU's dump with the memory that it was kept from looking through."""
        for key in self._found:
            with suppress(ProcessGone):
                inside, areas = self._number(key), self._tracker.areas(key)
                pageless.add_pages(images, inside, self._tracker.populated(key), areas)

    def compare(self) -> None:
        """After the collect with the container stopped: look at all shared memory."""
        self._shared.take(self._tracker.compare())

    def _look(self, moment: Moment) -> Collected:
        # Once it is stopped, nothing is begun any more.
        if moment in (Moment.PAUSED, Moment.STOPPED) and (problems := self._tracker.drain()):
            raise ExecutionError(f"what is read into memory could be missed: {'; '.join(problems)}", reason="DIRECT_IO")
        return self._tracker.collect(moment)

    def _take(self, change: ProcessChange) -> None:
        key = change.process
        # The kernel's own code, which is no memory of the process: but CRIU looks at the old one.
        vdso = [Range(area.start, area.end) for area in self._tracker.areas(key) if area.name == "[vdso]"]
        new = vdso if self._vdso.get(key) != vdso else []
        self._vdso[key] = vdso
        self._written[key] = extents.merge([*self._written.get(key, []), *change.written, *new])
        self._gone[key] = extents.merge([*self._gone.get(key, []), *change.gone])

    def requests(self, sender: Sender) -> Iterator[peer_pb2.SendRequest]:
        """All that was collected and not yet sent."""
        if not self.stays_behind:
            yield from self._private(sender)
        yield from self._shared.requests(sender)

    def leave(self, sender: Sender, images: Path) -> Iterator[peer_pb2.SendRequest]:
        """After the last collect and CRIU's dump into `images`: what was collected of memory that the destination fills
        in while the process runs is only marked as missing there; the rest is sent, for no process starts without it.
        """
        for key, ranges in list(self._written.items()):
            with suppress(ProcessGone):
                inside, merged = self._number(key), extents.merge(ranges)
                left = extents.intersect(merged, fill_images.lazy_ranges(images, inside))
                self._written[key] = extents.subtract(merged, left)
                marks = missing.marked(left, MAX_PIECE_BYTES)
                yield from sender.requests(f"missing/{inside}", (Piece(at, len(m), m) for at, m in marks))
        yield from self._private(sender)

    def _number(self, key: ProcessKey) -> int:
        """Its pid inside. Raises ProcessGone."""
        if key not in self._inside:
            self._inside[key] = self._pid_inside(key.pid)
        return self._inside[key]

    def _private(self, sender: Sender) -> Iterator[peer_pb2.SendRequest]:
        written, self._written = self._written, {}
        gone, self._gone = self._gone, {}
        if self._together:
            yield from sender.batches("memory", self._of_all(written, gone))
            return
        for key, ranges in written.items():
            with suppress(ProcessGone):  # the next collect says so, too
                inside = self._number(key)
                yield from sender.batches(f"memory/{inside}", self._batches(inside, key, ranges, gone[key]))

    def _of_all(self, written: dict[ProcessKey, list[Range]], gone: dict[ProcessKey, list[Range]]) -> Iterator[Batch]:
        for key, ranges in written.items():
            with suppress(ProcessGone):
                inside = self._number(key)
                for batch in self._batches(inside, key, ranges, gone[key]):
                    yield Batch([inside, 0, *batch.layout], batch.data)

    def _batches(self, inside: int, key: ProcessKey, written: list[Range], gone: list[Range]) -> Iterator[Batch]:
        if self._owners.setdefault(inside, key) != key:
            self._owners[inside] = key
            yield from blocks.zeros([Range(0, ADDRESS_END)])
        yield from blocks.zeros(gone)
        if written:
            # After what is gone: it may be back by now, and is then among this.
            yield from self._tracker.read(key, written)
