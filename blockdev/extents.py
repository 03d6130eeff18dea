"""Ranges of bytes, and which ranges of a sparse file in memory hold data."""

import errno
import os
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from operator import itemgetter
from typing import NamedTuple

_start, _end = itemgetter(0), itemgetter(1)


class Range(NamedTuple):
    """Bytes from start up to and without end. A tuple because there are many thousands of them inside a freeze."""

    start: int
    end: int

    @property
    def length(self) -> int:
        """In bytes."""
        return self.end - self.start


def merge(ranges: Iterable[Range]) -> list[Range]:
    """The same bytes as few ranges in order, none touching another."""
    merged: list[Range] = []
    last = -1
    # Unpacked, which is several times faster than by name.
    for part in sorted(ranges):
        start, end = part
        if start <= last:
            if end > last:
                merged[-1] = Range(merged[-1][0], end)
                last = end
        elif end > start:
            merged.append(part)
            last = end
    return merged


def subtract(before: list[Range], now: list[Range]) -> list[Range]:
    """What is in the first and not in the second: both in order, without overlaps."""
    if before == now:
        return []
    left: list[Range] = []
    at = 0
    for start, end in before:
        while at < len(now) and now[at].end <= start:
            at += 1
        look, begin = at, start
        while look < len(now) and now[look].start < end:
            if now[look].start > begin:
                left.append(Range(begin, now[look].start))
            begin = max(begin, now[look].end)
            look += 1
        if begin < end:
            left.append(Range(begin, end))
    return left


def intersect(left: list[Range], right: list[Range]) -> list[Range]:
    """What is in both: each in order, without overlaps. Quick where one of them is short, however long the other is."""
    if len(left) < len(right):
        left, right = right, left
    found: list[Range] = []
    for start, end in right:
        low = bisect_right(left, start, key=_end)
        high = bisect_left(left, end, lo=low, key=_start)
        if low < high:
            some = left[low:high]
            some[0] = Range(max(start, some[0].start), some[0].end)
            some[-1] = Range(some[-1].start, min(end, some[-1].end))
            found += some
    return found


def total(ranges: Iterable[Range]) -> int:
    """Bytes in all of them."""
    return sum(part.length for part in ranges)


def pieces(ranges: Iterable[Range], longest_bytes: int) -> Iterator[Range]:
    """The ranges cut so that none is longer and none crosses a multiple of `longest_bytes`."""
    for part in ranges:
        at = part.start
        while at < part.end:
            end = min(part.end, (at // longest_bytes + 1) * longest_bytes)
            yield Range(at, end)
            at = end


def first_data(descriptor: int, start: int, end: int) -> int | None:
    """Where the first data of a file in memory is between two offsets; None if there is only a hole (lseek(2)).

    Not where it ends: to find that the kernel goes through it page by page, 10 ms for each GiB (Linux 6.18).
    """
    try:
        first = os.lseek(descriptor, start, os.SEEK_DATA)
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise
        return None
    return first if first < end else None


def sought(descriptor: int, size_bytes: int, start: int = 0) -> Iterator[Range]:
    """The parts of a file in memory from `start` up to its size that hold data, by SEEK_DATA and SEEK_HOLE (lseek(2)).

    Of one on a disk, see `fiemap.allocated`.
    """
    at = start
    while at < size_bytes and (first := first_data(descriptor, at, size_bytes)) is not None:
        at = min(size_bytes, os.lseek(descriptor, first, os.SEEK_HOLE))
        yield Range(first, at)
