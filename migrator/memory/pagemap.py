"""Which pages of a process are there, and which were written: /proc/PID/pagemap, and PAGEMAP_SCAN on it (Linux 6.7).

Documented in the kernel's Documentation/admin-guide/mm/pagemap.rst and include/uapi/linux/fs.h.
"""

import ctypes
import errno
import fcntl
import functools
import os
import struct
import threading
from array import array
from collections import deque
from collections.abc import Iterator
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

from migrator.memory.errors import ProcessGone
from migrator.memory.mappings import Mapping

PAGE_BYTES = os.sysconf("SC_PAGESIZE")

# Categories of a page.
WRITTEN, FILE, PRESENT, SWAPPED, ZERO_PAGE, SOFT_DIRTY = 1 << 1, 1 << 2, 1 << 3, 1 << 4, 1 << 5, 1 << 7

_SCAN = 0xC0606610  # _IOWR('f', 16, struct pm_scan_arg)
_PROTECT, _FAIL_IF_UNPROTECTABLE = 1, 2
_ARGUMENT = struct.Struct("12Q")
_REGIONS, _REGION_BYTES = 16384, 24
# What is walked through by one thread at a time, and how many such parts there are at the most: a mapping may be large
# and empty. What is found in so many is kept, of 24 bytes for each region.
_PART_BYTES, _MOST_PARTS, _PARTS_AHEAD = 256 << 20, 256, 16
_WALKERS = 8

# Bits of an entry of the file.
ENTRY_PRESENT, ENTRY_SWAPPED, ENTRY_FILE, ENTRY_SOFT_DIRTY = 1 << 63, 1 << 62, 1 << 61, 1 << 55
_SWAP_TYPE_BITS = 5
_FRAME_BITS = 55
# Swap areas have lower types. The kernel's markers have one of these, and a few bits in place of the offset.
_LEAST_SPECIAL_TYPE = 23
_MARKER_BITS = 3
# Of addresses, whose entries are read in one go.
_READ_BYTES = 256 << 20


class Wanted(NamedTuple):
    """Which pages to report: all of `all_of`, none of `none_of`, one of `one_of`; and what to say of them."""

    all_of: int
    none_of: int
    one_of: int
    told: int


# Memory of a process' own: not what it sees of a file, and not the page of zeros.
PRIVATE = Wanted(0, FILE | ZERO_PAGE, PRESENT | SWAPPED, WRITTEN | SWAPPED)
# The same where no file is mapped. To find out that a page is none of a file takes ten times as long as all else: 13 ms
# for 1 GiB (Linux 6.18).
ANONYMOUS = Wanted(0, ZERO_PAGE, PRESENT | SWAPPED, WRITTEN | SWAPPED)
PRIVATE_WRITTEN = Wanted(WRITTEN, FILE | ZERO_PAGE, PRESENT | SWAPPED, WRITTEN | SWAPPED)
PRIVATE_SOFT_DIRTY = Wanted(0, FILE | ZERO_PAGE, PRESENT | SWAPPED, SOFT_DIRTY | SWAPPED)
ANONYMOUS_SOFT_DIRTY = Wanted(0, ZERO_PAGE, PRESENT | SWAPPED, SOFT_DIRTY | SWAPPED)
# Whatever is not protected, a page that is not there included.
UNPROTECTED = Wanted(WRITTEN, 0, 0, WRITTEN)
SHARED = Wanted(0, 0, PRESENT | SWAPPED, WRITTEN)
SHARED_WRITTEN = Wanted(WRITTEN, 0, PRESENT | SWAPPED, PRESENT)
SHARED_SOFT_DIRTY = Wanted(0, 0, PRESENT | SWAPPED, SOFT_DIRTY)


class Region(NamedTuple):
    """Pages in a row with the same categories, of those that were to be told."""

    start: int
    end: int
    categories: int


class Pagemap:
    """The file of one process, of the memory that it has now: after exec it is of no use. Close it."""

    def __init__(self, pid: int) -> None:
        # PAGEMAP_SCAN is allowed on a descriptor for reading.
        try:
            self.descriptor = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        except (FileNotFoundError, ProcessLookupError) as error:
            raise ProcessGone(f"process {pid} is gone") from error
        self._pid = pid

    def __enter__(self) -> "Pagemap":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.descriptor)

    def scan(
        self, start: int, end: int, wanted: Wanted, *, protect: bool = False, registered: bool = False
    ) -> Iterator[Region]:
        """Regions in order. With `protect` those found are protected in the same step: what is written from then on
        is WRITTEN the next time. Then, or with `registered`, raises PermissionError where a mapping is not registered
        for that, and what was found before it must not be relied on; ProcessGone. Page markers and guard regions are
        left out."""
        flags = (_PROTECT if protect else 0) | (_FAIL_IF_UNPROTECTABLE if protect or registered else 0)
        for values in self._walk(start, end, wanted, flags):
            found = map(Region, values[0::3], values[1::3], values[2::3])
            if not any(categories & SWAPPED for categories in set(values[2::3])):
                yield from found
                continue
            for region in found:
                if region.categories & SWAPPED:
                    yield from self._without_markers(*region)
                else:
                    yield region

    def _walk(self, start: int, end: int, wanted: Wanted, flags: int) -> Iterator["array[int]"]:
        """What `_calls` yields, in order; a long range in parts, several at once: the kernel lets go of no processor in
        4 ms for a GiB (Linux 6.18)."""
        longest = max(_PART_BYTES, -(-(end - start) // _MOST_PARTS // PAGE_BYTES) * PAGE_BYTES)
        if end - start <= longest:
            yield from self._calls(start, end, wanted, flags)
            return
        walking: deque[Future[list[array[int]]]] = deque()
        try:
            for first in range(start, end, longest):
                walking.append(_walkers().submit(self._called, first, min(first + longest, end), wanted, flags))
                if len(walking) > _PARTS_AHEAD:
                    yield from walking.popleft().result()
            while walking:
                yield from walking.popleft().result()
        finally:
            futures.wait(walking)  # they use the descriptor

    def _called(self, start: int, end: int, wanted: Wanted, flags: int) -> "list[array[int]]":
        return list(self._calls(start, end, wanted, flags))

    def _calls(self, start: int, end: int, wanted: Wanted, flags: int) -> Iterator["array[int]"]:
        """Of each call: start, end and categories of one region after the other."""
        regions = _own_regions()
        inverted = wanted.none_of
        while start < end:
            argument = bytearray(
                _ARGUMENT.pack(
                    _ARGUMENT.size, flags, start, end, 0, ctypes.addressof(regions), _REGIONS, 0,
                    inverted, wanted.all_of | inverted, wanted.one_of, wanted.told,
                )
            )  # fmt: skip
            try:
                count = fcntl.ioctl(self.descriptor, _SCAN, argument)
            except ProcessLookupError as error:
                raise ProcessGone(f"process {self._pid} has ended or called exec") from error
            except OSError as error:
                where = f"process {self._pid}, {start:x}-{end:x}"
                raise type(error)(error.errno, f"PAGEMAP_SCAN: {error.strerror}", where) from error
            # Where all was walked through, the kernel leaves an earlier end of its own there, or none (Linux 6.18).
            start = _ARGUMENT.unpack(argument)[4] if count == _REGIONS else end
            yield array("Q", memoryview(regions).cast("B")[: count * _REGION_BYTES].tobytes())

    def populated(self, area: Mapping) -> list[Region]:
        """What a mapping holds, private or shared, with SOFT_DIRTY where the kernel has it; on any kernel."""
        if has_scan():
            alone = ANONYMOUS_SOFT_DIRTY if area.is_anonymous else PRIVATE_SOFT_DIRTY
            return list(self.scan(area.start, area.end, SHARED_SOFT_DIRTY if area.is_shared else alone))
        found: list[Region] = []
        for first in range(area.start, area.end, _READ_BYTES):
            last = min(area.end, first + _READ_BYTES)
            kinds = (kind_of(entry, shared=area.is_shared) for entry in self.entries(first, last))
            found.extend(region for region in runs(first, kinds) if region.categories)
        return found

    def entries(self, start: int, end: int) -> "array[int]":
        """The 64-bit entries of pages, fewer at the end of the address space."""
        data = os.pread(self.descriptor, (end - start) // PAGE_BYTES * 8, start // PAGE_BYTES * 8)
        return array("Q", data)

    def _without_markers(self, start: int, end: int, categories: int) -> Iterator[Region]:
        """The kernel tells markers in page tables (a protected page that was thrown away, a guard) as swapped pages."""
        entries = self.entries(start, end)
        for held in runs(start, (0 if is_marker(entry) else 1 for entry in entries)):
            if held.categories:
                yield Region(held.start, held.end, categories)


@functools.cache
def _walkers() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(min(_WALKERS, len(os.sched_getaffinity(0))), "pagemap")


_own = threading.local()


def _own_regions() -> "ctypes.Array[ctypes.c_uint64]":
    """Where the kernel puts what it finds for this thread: to make it takes longer than a small scan."""
    if not hasattr(_own, "regions"):
        _own.regions = (ctypes.c_uint64 * (_REGIONS * 3))()
    made: ctypes.Array[ctypes.c_uint64] = _own.regions
    return made


@functools.cache
def has_scan() -> bool:
    """Whether this kernel has PAGEMAP_SCAN."""
    with Pagemap(os.getpid()) as own:
        try:
            list(own.scan(0, PAGE_BYTES, PRIVATE))
        except OSError as error:
            if error.errno not in (errno.ENOTTY, errno.EINVAL):
                raise
            return False
    return True


def kind_of(entry: int, *, shared: bool) -> int:
    """Categories by an entry of the file, 0 for a page that is not there or only seen of a file."""
    if not entry & (ENTRY_PRESENT | ENTRY_SWAPPED) or is_marker(entry):
        return 0
    if entry & ENTRY_FILE and not shared:
        return 0
    return PRESENT | (SOFT_DIRTY if entry & ENTRY_SOFT_DIRTY else 0)


def is_marker(entry: int) -> bool:
    """Whether an entry of the file says that there is nothing, with a mark on it, rather than a swapped page."""
    if entry & ENTRY_PRESENT or not entry & ENTRY_SWAPPED:
        return False
    frame = entry & ((1 << _FRAME_BITS) - 1)
    special = frame & ((1 << _SWAP_TYPE_BITS) - 1) >= _LEAST_SPECIAL_TYPE
    return special and frame >> _SWAP_TYPE_BITS < 1 << _MARKER_BITS


def runs(start: int, kinds: Iterator[int]) -> Iterator[Region]:
    """Pages from `start` on, a kind for each, as regions of the same kind."""
    begin = at = start
    current: int | None = None
    for kind in kinds:
        if kind != current:
            if current is not None:
                yield Region(begin, at, current)
            begin, current = at, kind
        at += PAGE_BYTES
    if current is not None:
        yield Region(begin, at, current)
