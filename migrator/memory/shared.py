"""Memory that several processes may map, once per object: shared anonymous, memfd, System V, tmpfs and hugetlbfs files.

What page tables say of it is not the whole truth: pages are also written by write(2), by processes that have ended or
unmapped it since, and by mappings that were thrown away (MADV_DONTNEED), which leaves nothing in the page tables that
are there. So page tables only give candidates, for rounds in which the container runs. What decides is the content, by
digest, and at the end all of it is looked at. Writing by write(2), punching a hole and truncating show in the object's
ctime (fine-grained from Linux 6.13 on, in ticks before).
"""

import ctypes
import mmap
import os
import time
from collections.abc import Iterable, Iterator
from functools import cache
from typing import NamedTuple

from blockdev import extents
from blockdev.blocks import Batch
from blockdev.extents import Range
from migrator.memory import reading
from migrator.memory.digests import Digests
from migrator.memory.pagemap import PAGE_BYTES

# Of linux/magic.h.
_TMPFS, _HUGETLBFS = 0x01021994, 0x958458F6

# Names of the kernel's own tmpfs; a file of that name is on another device.
_SYSTEM_V, _ANONYMOUS = "/SYSV", "/dev/zero (deleted)"

_REALTIME_COARSE = 5  # of linux/time.h
_MADV_POPULATE_READ = 22  # of asm-generic/mman-common.h, Linux 5.14
# Less is read as fast, and could be in more objects than a process can map.
_LEAST_MAPPED_BYTES = 4 << 20
# Python holds its lock meanwhile: 0.1 ms.
_POPULATED_AT_ONCE_BYTES = 1 << 20

_libc = ctypes.CDLL(None, use_errno=True)


class ObjectKey(NamedTuple):
    """A device number as in stat(2), and an inode number. The inode number of System V memory is its id: that may be
    another object's number too."""

    device: int
    inode: int
    is_system_v: bool = False


def key_of(device: int, inode: int, name: str) -> ObjectKey:
    """By the name as in /proc/PID/maps, or what a link in /proc points to."""
    return ObjectKey(device, inode, name.startswith(_SYSTEM_V))


class Change(NamedTuple):
    """Offsets in an object: written, and no longer there."""

    written: list[Range]
    gone: list[Range]


class SharedObject:
    """One of them, held open for reading so that it is not replaced by another with the same key. Close it."""

    def __init__(self, descriptor: int, name: str) -> None:
        self.descriptor, self.name = descriptor, name
        status = os.fstat(descriptor)
        self.key, self.size_bytes = key_of(status.st_dev, status.st_ino, name), status.st_size
        self._digests = Digests()
        self._populated: list[Range] = []
        self._changed_ns, self._blocks = -1, -1
        # As long as another write could have left the same ctime behind.
        self._settled = False
        # Of one that has a descriptor others could cut off a part, which would end this process (SIGBUS).
        self._may_be_mapped = status.st_dev == _kernels_device() and name.startswith((_SYSTEM_V, _ANONYMOUS))
        self._mapped: mmap.mmap | None = None
        self._mapped_in: list[Range] = []

    def look(self, candidates: Iterable[Range], *, at_all: bool) -> Change:
        """What has changed since the last look, judged by content, among the candidates (offsets), or, with all who use
        it stopped, `at_all` that is there. Written by descriptor is found in either case."""
        status = os.fstat(self.descriptor)
        by_descriptor = not self._settled or status.st_ctime_ns != self._changed_ns
        self._changed_ns = status.st_ctime_ns
        self._settled = _settled(status.st_ctime_ns)
        self.size_bytes = status.st_size
        populated = self._populated
        if by_descriptor or status.st_blocks != self._blocks:
            self._blocks = status.st_blocks
            end = -(-status.st_size // PAGE_BYTES) * PAGE_BYTES
            found = extents.sought(self.descriptor, status.st_size)
            populated = extents.merge(_whole_pages(part, end) for part in found)
        gone = extents.subtract(self._populated, populated)
        self._digests.forget(gone)
        if at_all or by_descriptor:
            look_at = populated
        else:
            # Also those that came to be without a trace in the page tables of the processes that are there.
            new = extents.subtract(populated, self._populated)
            look_at = extents.intersect(extents.merge([*candidates, *new]), populated)
        self._populated = populated
        # In the copy that is made otherwise nobody writes while it is looked at.
        mapped = self._mapped if at_all else None
        return Change(self._digests.changed(self.descriptor, look_at, mapped), gone)

    def get_ready(self, room_bytes: int) -> int:
        """While those who use it run: map what was there at the last look, so that a look at all of it need not copy
        it, which takes as long again. Returns how long the mapping is; it is none if it would be more than this."""
        if self._mapped is None:
            too_little = extents.total(self._populated) < _LEAST_MAPPED_BYTES
            if too_little or not self._may_be_mapped or self.size_bytes > room_bytes:
                return 0
        try:
            if self._mapped is None:
                self._mapped = mmap.mmap(self.descriptor, self.size_bytes, mmap.MAP_SHARED, mmap.PROT_READ)
            # Only what is there: a page that is not would come to be.
            for part in extents.pieces(extents.subtract(self._populated, self._mapped_in), _POPULATED_AT_ONCE_BYTES):
                self._mapped.madvise(_MADV_POPULATE_READ, part.start, part.length)
        except OSError:  # an older kernel, or a page that cannot be read: whoever reads it is told so
            self._unmap()
            self._may_be_mapped = False
            return 0
        self._mapped_in = self._populated
        return len(self._mapped)

    def _unmap(self) -> None:
        mapped, self._mapped = self._mapped, None
        if mapped is not None:
            mapped.close()

    def read(self, ranges: Iterable[Range]) -> Iterator[Batch]:
        """What is in it now, which later looks are compared to."""
        return reading.read_object(self.descriptor, ranges, self._digests.seen)

    def populated(self) -> list[Range]:
        """Offsets of what was there at the last look."""
        return self._populated

    def close(self) -> None:
        """Let go of it."""
        self._unmap()
        os.close(self.descriptor)


def is_memory(descriptor: int) -> bool:
    """Whether a file's contents are memory and nothing else."""
    buffer = ctypes.create_string_buffer(256)
    if _libc.fstatfs(descriptor, buffer) < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"fstatfs: {os.strerror(number)}", f"descriptor {descriptor}")
    return int.from_bytes(buffer.raw[:8], "little") in (_TMPFS, _HUGETLBFS)


@cache
def _kernels_device() -> int:
    """Of the tmpfs that holds what has no name in any file system; tmpfs mounts have others."""
    descriptor = os.memfd_create("device")
    try:
        return os.fstat(descriptor).st_dev
    finally:
        os.close(descriptor)


def _whole_pages(part: Range, end: int) -> Range:
    return Range(part.start // PAGE_BYTES * PAGE_BYTES, min(end, -(-part.end // PAGE_BYTES) * PAGE_BYTES))


def _settled(ctime_ns: int) -> bool:
    """Whether a write from now on will have another ctime: the kernel's coarse clock has gone on since."""
    return time.clock_gettime_ns(_REALTIME_COARSE) > ctime_ns
