"""Shared memory's share of a migration at the source: what was written of each object since it was sent last."""

import os
from collections.abc import Iterable, Iterator

from blockdev import blocks, extents
from blockdev.blocks import Batch, Piece
from blockdev.extents import Range
from migrator.memory import Collected, MemoryTracker, Moment, ObjectKey, SharedChange
from migrator.shm import targets
from migrator.shm.store import OFFSET_END
from migrator.stream import Sender
from migrator.v1 import peer_pb2


class SharedCopy:
    """Copies the objects of one container's processes, each once.

    What `left_out` says is not in CRIU's dump, and is sent to the end. Of others, which came to be just before the
    freeze, the dump has the contents.
    """

    def __init__(self, tracker: MemoryTracker) -> None:
        self._tracker = tracker
        self._device = targets.internal_device()
        self._names: dict[ObjectKey, str] = {}
        self._written: dict[ObjectKey, list[Range]] = {}
        self._gone: dict[ObjectKey, list[Range]] = {}
        self._left_out: set[ObjectKey] = set()
        self._forgotten: set[str] = set()

    def add(self, found: Collected, moment: Moment) -> int:
        """Take in a collect. Returns the bytes that `requests` would send now."""
        for key in found.released:
            self._forget(key)
        self.take(found.shared)
        if moment is Moment.LAST:
            for key in [key for key in self._names if key not in self._left_out]:
                self._forget(key)
        return sum(map(extents.total, self._written.values()))

    def take(self, changes: Iterable[SharedChange]) -> None:
        """Take in what has changed."""
        for change in changes:
            key = change.key
            if key.device == self._device and key.inode < 1 << 32 and change.size_bytes <= OFFSET_END:
                self._names[key] = str(targets.of(key, change.name))
                self._written[key] = extents.merge([*self._written.get(key, []), *change.written])
                self._gone[key] = extents.merge([*self._gone.get(key, []), *change.gone])
            else:
                self._forget(key)

    def left_out(self) -> list[os.stat_result]:
        """With the container frozen: the objects that CRIU need not dump, which are those known by now."""
        self._left_out = set(self._names)
        return [self._tracker.status(key) for key in self._names]

    def requests(self, sender: Sender) -> Iterator[peer_pb2.SendRequest]:
        """All that was collected and not yet sent."""
        for target in sorted(self._forgotten):
            yield from sender.requests(target, [Piece(0, OFFSET_END, None)])
        self._forgotten.clear()
        written, self._written = self._written, {}
        gone, self._gone = self._gone, {}
        for key, ranges in written.items():
            yield from sender.batches(self._names[key], self._batches(key, ranges, gone[key]))

    def _batches(self, key: ObjectKey, written: list[Range], gone: list[Range]) -> Iterator[Batch]:
        yield from blocks.zeros(gone)
        yield from self._tracker.read_shared(key, written)

    def _forget(self, key: ObjectKey) -> None:
        """Its number may be another object's soon, which must not have anything of this one."""
        name = self._names.pop(key, None)
        if name is not None:
            self._forgotten.add(name)
        self._written.pop(key, None)
        self._gone.pop(key, None)
