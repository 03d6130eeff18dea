"""Where the bytes of a file lie on its device (FS_IOC_FIEMAP, Documentation/filesystems/fiemap.rst), and by that which
parts of it hold data, and what two clones share without reading either."""

import errno
import fcntl
import struct
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from blockdev import extents
from blockdev.extents import Range, merge

_FIEMAP = 0xC020660B  # _IOWR('f', 11, struct fiemap)
_HEADER, _EXTENT = struct.Struct("=QQLLLL"), struct.Struct("=QQQQQLLLL")
_COUNT = 4096
# Of an extent, on any file system that is used.
_LEAST_BYTES = 512
_SYNC = 1
_LAST, _UNWRITTEN, _SHARED, _MERGED = 0x1, 0x800, 0x2000, 0x1000
# Other flags say that the place is not known, or that something else than the bytes lies there.
_PLAIN = _LAST | _UNWRITTEN | _SHARED | _MERGED


class Extent(NamedTuple):
    """Bytes of the file that lie in one piece; `place` is where its first byte is, None where that is not known."""

    start: int
    end: int
    place: int | None
    is_zero: bool


def allocated(descriptor: int, size_bytes: int, start: int = 0) -> Iterator[Range]:
    """The parts of a sparse file from `start` up to its size that hold data.

    By its extents, not by lseek(2): on XFS, where a clone has been written to, SEEK_DATA takes data for a hole if the
    room that was laid out for copies on write reaches over it (seen on Linux 6.1). A file system without extents, as
    tmpfs, is asked as `extents.sought` does.
    """
    try:
        yield from _with_data(mapped(descriptor, size_bytes, start))
    except OSError as error:
        if error.errno != errno.EOPNOTSUPP:
            raise
        yield from extents.sought(descriptor, size_bytes, start)


def _with_data(found: Iterable[Extent]) -> Iterator[Range]:
    begin = end = 0
    for extent in found:
        if extent.is_zero:
            continue
        if extent.start != end:
            if begin < end:
                yield Range(begin, end)
            begin = extent.start
        end = extent.end
    if begin < end:
        yield Range(begin, end)


def mapped(descriptor: int, size_bytes: int, start: int = 0) -> Iterator[Extent]:
    """The extents of a file from `start` up to its size, in order; 2.5 us each. Raises OSError."""
    at = start
    while at < size_bytes:
        most = min(_COUNT, (size_bytes - at) // _LEAST_BYTES + 1)
        buffer = bytearray(_HEADER.pack(at, size_bytes - at, _SYNC, 0, most, 0) + bytes(_EXTENT.size * most))
        try:
            fcntl.ioctl(descriptor, _FIEMAP, buffer)
        except OSError as error:
            raise OSError(error.errno, f"FS_IOC_FIEMAP: {error.strerror}", f"descriptor {descriptor}") from error
        count = _HEADER.unpack_from(buffer)[3]
        for index in range(count):
            begin, place, length, _, _, flags, *_ = _EXTENT.unpack_from(buffer, _HEADER.size + index * _EXTENT.size)
            first, at = max(begin, at), min(begin + length, size_bytes)  # the first begins before what was asked for
            known = None if flags & ~_PLAIN else place + first - begin
            yield Extent(first, at, known, bool(flags & _UNWRITTEN))
            if flags & _LAST:
                return
        if count == 0:
            return


def differing(ours: int, theirs: int, size_bytes: int) -> list[Range]:
    """The ranges of the first file that do not lie where the other's lie, holes included; both are at rest.

    What lies in the same place is the same; what does not need not differ.
    """
    cuts: dict[int, list[tuple[int, object]]] = {}
    for which, descriptor in enumerate((ours, theirs)):
        for extent in mapped(descriptor, size_bytes):
            # Of an unknown place nothing is the same.
            shift: object = object() if extent.place is None else (extent.place - extent.start, extent.is_zero)
            cuts.setdefault(extent.start, []).append((which, shift))
            cuts.setdefault(extent.end, []).insert(0, (which, None))
    found: list[Range] = []
    now: list[object] = [None, None]
    before = 0
    for at in sorted(cuts):
        if now[0] != now[1]:
            found.append(Range(before, at))
        for which, shift in cuts[at]:
            now[which] = shift
        before = at
    return merge(found)
