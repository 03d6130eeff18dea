"""What must outlive a worker that dies: the messages it was reading, and every change of mappings since the restore.

Both are memory shared by the keeper and its workers. The kernel tells each change once. It writes its messages straight
into the inbox, so that a successor finds those which were read and not yet heeded; changes are then kept in a log.
Replaying the log on what the images said gives everything that was ever left to the fill, at its present addresses.
Whether a page of that was filled already needs no record: the kernel refuses to map one twice, and what is given back
of the store is not filled again.
"""

import mmap
import os
import struct
from collections.abc import Iterator
from typing import NamedTuple

from migrator.fill import userfault
from migrator.fill.userfault import Event, Message

_MESSAGES = 64
_RECORD_BYTES = 64
_HEADER = struct.Struct("=QIIQ")  # read, index in it, space, and the child's number
# number of the read, and the space that is read
_STATE = struct.Struct("=QQ")
_INBOX = mmap.PAGESIZE


class Change(NamedTuple):
    """A message that changed mappings of a space. `child` is the number of the space of a forked one."""

    space: int
    message: Message
    child: int


class Journal:
    """Made by the keeper before it forks."""

    def __init__(self) -> None:
        self._shared = mmap.mmap(-1, 2 * mmap.PAGESIZE)
        self._inbox = memoryview(self._shared)[_INBOX : _INBOX + _MESSAGES * userfault.MESSAGE_BYTES]
        self._empty = bytes(len(self._inbox))
        self._log = os.memfd_create("fill-journal")

    def read(self, descriptor: int, space: int) -> list[Message]:
        """The messages that a userfaultfd has; none if there are none now.

        Each that changes mappings is to be recorded; then they are to be `settled`.
        """
        number, _ = _STATE.unpack_from(self._shared)
        _STATE.pack_into(self._shared, 0, number + 1, space)
        try:
            os.readv(descriptor, [self._inbox])
        except BlockingIOError:
            return []
        return [message for _, message in self._messages()]

    def settled(self) -> None:
        """All that was read has been recorded or answered."""
        self._inbox[:] = self._empty

    def unsettled(self) -> tuple[int, list[tuple[int, Message]]]:
        """What a worker that died had read and not recorded: the space, and messages with their place in the read.

        Faults among them are left out: who waits is to be woken.
        """
        number, space = _STATE.unpack_from(self._shared)
        last = max((place for place, _ in self._recorded()), default=(0, 0))
        left = [
            (index, message)
            for index, message in self._messages()
            if message.event != Event.FAULT and (number, index) > last
        ]
        return space, left

    def record(self, index: int, change: Change) -> None:
        """Keep a change that was message `index` of the last read."""
        number, _ = _STATE.unpack_from(self._shared)
        header = _HEADER.pack(number, index, change.space, change.child)
        message = bytes(self._inbox[index * userfault.MESSAGE_BYTES : (index + 1) * userfault.MESSAGE_BYTES])
        # Records do not straddle pages: a write of one is done whole or not at all.
        os.pwrite(self._log, (header + message).ljust(_RECORD_BYTES, b"\0"), self._size())

    def changes(self) -> Iterator[Change]:
        """All that were recorded, in order."""
        return (change for _, change in self._recorded())

    def _size(self) -> int:
        return os.fstat(self._log).st_size // _RECORD_BYTES * _RECORD_BYTES

    def _recorded(self) -> Iterator[tuple[tuple[int, int], Change]]:
        content = os.pread(self._log, self._size(), 0)
        for at in range(0, len(content), _RECORD_BYTES):
            number, index, space, child = _HEADER.unpack_from(content, at)
            start = at + _HEADER.size
            message = userfault.parse(content[start : start + userfault.MESSAGE_BYTES])
            assert message is not None
            yield (number, index), Change(space, message, child)

    def _messages(self) -> Iterator[tuple[int, Message]]:
        for index in range(_MESSAGES):
            at = index * userfault.MESSAGE_BYTES
            message = userfault.parse(bytes(self._inbox[at : at + userfault.MESSAGE_BYTES]))
            if message is None:
                return
            yield index, message
