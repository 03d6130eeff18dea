"""From the images of a dump that wrote no pages to images for a lazy restore (criu.org/Images; CRIU 4.1 and 4.2).

A pagemap says where pages are: PARENT in images that do not exist, LAZY where `criu dump --lazy-pages` left them out,
PRESENT in the pages file, with LAZY or without. Afterwards it says LAZY of what the fill maps (without PRESENT: the
pages file holds none of it), and PARENT of the rest that was sent: the parent has a pagemap that claims all addresses,
and for its pages the process' file in the store, where the offset is the address. So nothing is copied.
This runs while the container is frozen.
"""

import os
import struct
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from pycriu.images import mm_pb2, pagemap_pb2
from pycriu.images.magic import by_name

from blockdev import extents
from blockdev.extents import Range
from migrator.errors import ExecutionError
from migrator.fill import missing
from migrator.fill import store as page_store
from migrator.fill.missing import Marks
from migrator.fill.spaces import Segment
from migrator.fill.store import ADDRESS_END, PAGE_BYTES
from migrator.images import HEADER_BYTES, entries, joined, read, replace

# CRIU counts pages of a lazy entry in an int of bytes.
LARGEST_ENTRY_BYTES = 64 << 20
# Older images count pages of an entry in 32 bits, and so do versions of CRIU before 4.2.
_LARGEST_PARENT_BYTES = 4 << 40

_PARENT, _LAZY, _PRESENT = 1, 2, 4
# Of mmap(2), and of CRIU's own for what a mapping is.
_MAP_PRIVATE, _MAP_ANONYMOUS, _MAP_LOCKED, _MAP_HUGETLB = 0x2, 0x20, 0x2000, 0x40000
_VSYSCALL, _VDSO, _VVAR, _AIO_RING, _SHADOW_STACK = 1 << 2, 1 << 3, 1 << 12, 1 << 13, 1 << 15
_OF_THE_KERNEL = _VSYSCALL | _VDSO | _VVAR | _AIO_RING | _SHADOW_STACK


class _Range(NamedTuple):
    start: int
    end: int
    lazy: bool
    vdso: bool


def prepare(images: Path, store: Path) -> None:
    """Amend the images of all processes, and make the store their parent. Both are on one file system.

    Raises ExecutionError where they do not fit together, or the store lacks what no process can start without.
    """
    parent = images / "parent"
    parent.unlink(missing_ok=True)  # to where it was at the source
    parent.mkdir()
    names = os.listdir(images)  # noqa: PTH208  # half the time of Path.iterdir
    for number, name in enumerate(names, 1):
        if name.startswith("pagemap-") and name[8:-4].isdecimal():
            pid = int(name[8:-4])
            prepare_process(images, store, pid)
            _make_parent(parent, number, page_store.path_of(store, pid), name)


def prepare_process(images: Path, store: Path, pid: int) -> None:
    """Amend the images of one process; `pid` is that in the container's pid namespace. Raises as `prepare` does."""
    path = f"{images}/pagemap-{pid}.img"
    content = _read(path)
    messages = entries(content)
    amended = [next(messages)]
    mappings = _mappings(images, pid)
    ends = [vma.end for vma in mappings]
    present_bytes = 0
    with _Checks(store, pid) as checks:
        for entry, start, end in _entries(messages):
            # A plain dump marks what could be lazy, and writes it all the same.
            if entry.flags & _PRESENT or not entry.flags & (_PARENT | _LAZY):
                amended.append(_entry(start, end, _PRESENT))
                present_bytes += end - start
                continue
            for piece in _pieces(mappings, ends, start, end, pid):
                amended.append(_entry(piece.start, piece.end, _LAZY if piece.lazy else _PARENT))
                if not piece.lazy:
                    checks.expect_all(piece.start, piece.end)
                    if piece.vdso:
                        checks.expect_data(piece.start, "[vdso]")
    number = pagemap_pb2.pagemap_head.FromString(amended[0]).pages_id
    # At the end of the file CRIU would go on trying for ever.
    if present_bytes and (images / f"pages-{number}.img").stat().st_size < present_bytes:
        raise ExecutionError("the images do not fit together: a file of pages is too short")
    replace(path, content[:HEADER_BYTES], amended)


def _make_parent(parent: Path, number: int, pages: Path, pagemap: str) -> None:
    """The images of an earlier dump of a process that wrote all that a process can have: this file in the store."""
    pages.touch(0o600)
    os.truncate(pages, ADDRESS_END)
    os.link(pages, parent / f"pages-{number}.img")
    head = pagemap_pb2.pagemap_head(pages_id=number).SerializeToString()
    (parent / pagemap).write_bytes(_PAGEMAP_HEADER + joined([head, *_EVERYTHING]))


def lazy_ranges(images: Path, pid: int) -> list[Range]:
    """The addresses of one process that `prepare` leaves to the fill if they have pages."""
    return [Range(vma.start, vma.end) for vma in _mappings(images, pid) if vma.lazy]


def lazy_segments(images: Path, pid: int) -> list[Segment]:
    """What `prepare` left to the fill, of one process: adjacent entries are joined, but not across mappings."""
    messages = entries(_read(f"{images}/pagemap-{pid}.img"))
    next(messages)
    borders = {vma.end for vma in _mappings(images, pid)}
    segments: list[Segment] = []
    for entry, start, end in _entries(messages):
        if not entry.flags & _LAZY:
            continue
        first = segments.pop().start if segments and segments[-1].end == start and start not in borders else start
        segments.append(Segment(first, end, first))
    return segments


class _Checks:
    """What a process cannot start without."""

    def __init__(self, store: Path, pid: int) -> None:
        self._source = _open_if_there(page_store.path_of(store, pid))
        self._marks = Marks.open_if_there(missing.path_of(store, pid))

    def __enter__(self) -> "_Checks":
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if self._source is not None:
            os.close(self._source)
        if self._marks is not None:
            self._marks.close()

    def expect_all(self, start: int, end: int) -> None:
        """Raises ExecutionError if anything there is missing."""
        if self._marks is not None and self._marks.first(start, end) is not None:
            raise ExecutionError(f"memory at {start:x} was left at the source, which cannot be pulled")

    def expect_data(self, start: int, what: str) -> None:
        """Raises ExecutionError if the store has nothing there."""
        if self._source is None or extents.first_data(self._source, start, start + PAGE_BYTES) is None:
            raise ExecutionError(f"the page store lacks {what}: it has to be sent like other private memory")


def _mappings(images: Path, pid: int) -> Sequence[_Range]:
    (message,) = entries(_read(f"{images}/mm-{pid}.img"))
    wanted, unwanted = _MAP_ANONYMOUS | _MAP_PRIVATE, _MAP_LOCKED | _MAP_HUGETLB
    mask = wanted | unwanted
    return [
        _Range(
            vma.start,
            vma.end,
            vma.flags & mask == wanted and not vma.status & _OF_THE_KERNEL,
            vma.status & _VDSO != 0,
        )
        for vma in mm_pb2.mm_entry.FromString(message).vmas
    ]


def _entries(messages: Iterator[bytes]) -> Iterator[tuple[pagemap_pb2.pagemap_entry, int, int]]:
    parse = pagemap_pb2.pagemap_entry.FromString
    for message in messages:
        entry = parse(message)
        if entry.in_parent:
            entry.flags |= _PARENT
        start = entry.vaddr
        yield entry, start, start + (entry.nr_pages or entry.compat_nr_pages) * PAGE_BYTES


def _pieces(mappings: Sequence[_Range], ends: Sequence[int], start: int, end: int, pid: int) -> Iterator[_Range]:
    """A range cut where mappings end, and in pieces that CRIU can take."""
    for number in range(bisect_right(ends, start), len(mappings)):
        vma = mappings[number]
        if vma.start > start:
            break
        stop = min(end, vma.end)
        while start < stop:
            last = min(stop, start + LARGEST_ENTRY_BYTES)
            yield _Range(start, last, vma.lazy, vma.vdso)
            start = last
        if start == end:
            return
    raise ExecutionError(f"the images do not fit together: process {pid} has pages at {start:x} and no mapping there")


def _entry(start: int, end: int, flags: int) -> bytes:
    count = (end - start) // PAGE_BYTES
    entry = pagemap_pb2.pagemap_entry(vaddr=start, compat_nr_pages=count, flags=flags, nr_pages=count)
    serialized: bytes = entry.SerializeToString()
    return serialized


def _open_if_there(path: str | Path) -> int | None:
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None


def _read(path: str) -> bytes:
    try:
        return read(path)
    except FileNotFoundError as error:
        raise ExecutionError(f"the images do not fit together: {path} is missing") from error


_PAGEMAP_HEADER = struct.pack("<II", by_name["IMG_COMMON"], by_name["PAGEMAP"])
_EVERYTHING = [
    _entry(start, start + _LARGEST_PARENT_BYTES, _PRESENT) for start in range(0, ADDRESS_END, _LARGEST_PARENT_BYTES)
]
