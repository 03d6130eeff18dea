"""The destination's store of shared memory: the very objects that the restored processes will have."""

import os
import threading
from typing import NamedTuple

from blockdev import blocks
from blockdev.blocks import Piece
from migrator.errors import PeerError
from migrator.shm import targets
from migrator.shm.targets import Target

# Each is an open file here.
MAX_OBJECTS = 4096
# What their offsets stay below.
OFFSET_END = 1 << 48


class Stored(NamedTuple):
    """A memfd, open for reading and writing."""

    target: Target
    descriptor: int


class SharedStore:
    """Objects by what they are called on the wire. Close it when the restored processes have them."""

    def __init__(self) -> None:
        self._objects: dict[tuple[bool, int], Stored] = {}
        # Of inode numbers that were used again. Another stream may be writing to one, so none is closed before the end.
        self._replaced: list[int] = []
        self._lock = threading.Lock()

    def write(self, rest: str, piece: Piece) -> None:
        """A piece of the target `shared/` and `rest`. Raises PeerError, BlockError."""
        blocks.write(self._descriptor(targets.parse(rest)), piece, OFFSET_END)

    def memfd(self, number: int) -> int | None:
        """The object with this inode number at the source, None if nothing was sent of it."""
        stored = self._objects.get((False, number))
        return None if stored is None else stored.descriptor

    def system_v(self, number: int) -> int | None:
        """The same by the id of System V memory."""
        stored = self._objects.get((True, number))
        return None if stored is None else stored.descriptor

    def close(self) -> None:
        """Repeatable."""
        with self._lock:
            for descriptor in (*(stored.descriptor for stored in self._objects.values()), *self._replaced):
                os.close(descriptor)
            self._objects.clear()
            self._replaced.clear()

    def _descriptor(self, target: Target) -> int:
        key = (target.is_system_v, target.number)
        with self._lock:
            stored = self._objects.get(key)
            if stored is None or stored.target != target:
                if len(self._objects) + len(self._replaced) >= MAX_OBJECTS:
                    raise PeerError(f"more than {MAX_OBJECTS} objects of shared memory")
                if stored is not None:  # an inode number that is used again
                    os.truncate(stored.descriptor, 0)
                    self._replaced.append(stored.descriptor)
                name = os.fsdecode(target.name)
                stored = Stored(target, os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING))
                self._objects[key] = stored
            return stored.descriptor
