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
from contextlib import suppress
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
_SYSTEM_V = "/SYSV"

_REALTIME_COARSE = 5  # of linux/time.h
_MADV_POPULATE_READ = 22  # of asm-generic/mman-common.h, Linux 5.14
# Less is read as fast, and could be in more objects than a process can map; for more the page tables would be much of
# this process' memory.
_LEAST_MAPPED_BYTES, _MOST_MAPPED_BYTES = 4 << 20, 8 << 30

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
        self._mapped: mmap.mmap | None = None

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
        if not at_all:
            self._map(populated, extents.subtract(populated, self._populated))
        self._populated = populated
        mapped = self._mapped if at_all and self._mapped and len(self._mapped) <= self.size_bytes else None
        return Change(self._digests.changed(self.descriptor, look_at, mapped), gone)

    def _map(self, populated: list[Range], new: list[Range]) -> None:
        """So that a look at all of it, while nothing runs, need not copy it, which takes as long again. Only what is
        there is touched: a page that is not would come to be."""
        length = self.size_bytes // PAGE_BYTES * PAGE_BYTES
        # Of a file with a name others could cut off a part, which would end this process (SIGBUS).
        has_name = os.fstat(self.descriptor).st_nlink > 0
        is_huge = os.fstatvfs(self.descriptor).f_bsize != PAGE_BYTES
        if has_name or is_huge or extents.total(populated) < _LEAST_MAPPED_BYTES or length > _MOST_MAPPED_BYTES:
            return
        with suppress(OSError, ValueError):  # an older kernel, or it is shorter by now: what is not mapped is read
            if self._mapped is None or len(self._mapped) != length:
                self._unmap()
                self._mapped, new = mmap.mmap(self.descriptor, length, mmap.MAP_SHARED, mmap.PROT_READ), populated
            for part in extents.intersect(new, [Range(0, length)]):
                self._mapped.madvise(_MADV_POPULATE_READ, part.start, part.length)

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


def _whole_pages(part: Range, end: int) -> Range:
    return Range(part.start // PAGE_BYTES * PAGE_BYTES, min(end, -(-part.end // PAGE_BYTES) * PAGE_BYTES))


def _settled(ctime_ns: int) -> bool:
    """Whether a write from now on will have another ctime: the kernel's coarse clock has gone on since."""
    return time.clock_gettime_ns(_REALTIME_COARSE) > ctime_ns
