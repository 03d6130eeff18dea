"""From the images of a dump that wrote no pages to images for a lazy restore (criu.org/Images; CRIU 4.1 and 4.2).

A pagemap says where pages are: PARENT in images that do not exist, LAZY where `criu dump --lazy-pages` left them out,
PRESENT in the pages file, with LAZY or without. Afterwards it says LAZY of what the fill maps (without PRESENT: the
pages file holds none of it), and PRESENT of the rest, with its pages in the pages file in the order of the entries.
This runs while the container is frozen.
"""

import os
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from pycriu.images import mm_pb2, pagemap_pb2

from blockdev import extents
from blockdev.extents import Range
from migrator import wire
from migrator.errors import ExecutionError
from migrator.fill import missing
from migrator.fill import store as page_store
from migrator.fill.missing import Marks
from migrator.fill.spaces import Segment
from migrator.fill.store import PAGE_BYTES
from migrator.images import HEADER_BYTES, entries, joined, read

# CRIU counts pages of a lazy entry in an int of bytes.
LARGEST_ENTRY_BYTES = 64 << 20

_PARENT, _LAZY, _PRESENT = 1, 2, 4
# Of mmap(2), and of CRIU's own for what a mapping is.
_MAP_PRIVATE, _MAP_ANONYMOUS, _MAP_LOCKED, _MAP_HUGETLB = 0x2, 0x20, 0x2000, 0x40000
_VSYSCALL, _VDSO, _VVAR, _AIO_RING, _SHADOW_STACK = 1 << 2, 1 << 3, 1 << 12, 1 << 13, 1 << 15
_OF_THE_KERNEL = _VSYSCALL | _VDSO | _VVAR | _AIO_RING | _SHADOW_STACK
_PIECE_BYTES = 1 << 20
_NEAR_BYTES = 64 << 10


class _Range(NamedTuple):
    start: int
    end: int
    lazy: bool
    vdso: bool


def prepare(images: Path, store: Path) -> None:
    """Amend the images of all processes and take the link to their parent away.

    Raises ExecutionError where they do not fit together, or the store lacks what no process can start without.
    """
    for name in os.listdir(images):  # noqa: PTH208  # half the time of Path.iterdir
        if name.startswith("pagemap-") and name[8:-4].isdecimal():
            prepare_process(images, store, int(name[8:-4]))
    (images / "parent").unlink(missing_ok=True)


def prepare_process(images: Path, store: Path, pid: int) -> None:
    """Amend the images of one process; `pid` is that in the container's pid namespace. Raises as `prepare` does."""
    path = f"{images}/pagemap-{pid}.img"
    content = _read(path)
    messages = entries(content)
    head = next(messages)
    mappings = _mappings(images, pid)
    ends = [vma.end for vma in mappings]
    pages = f"{images}/pages-{pagemap_pb2.pagemap_head.FromString(head).pages_id}.img"
    amended = [head]
    with _Pages(pages, store, pid) as output:
        for entry, start, end in _entries(messages):
            # A plain dump marks what could be lazy, and writes it all the same.
            if entry.flags & _PRESENT or not entry.flags & (_PARENT | _LAZY):
                amended.append(_entry(start, end, _PRESENT))
                output.keep(end - start)
                continue
            for piece in _pieces(mappings, ends, start, end, pid):
                if piece.lazy:
                    amended.append(_entry(piece.start, piece.end, _LAZY))
                else:
                    amended.append(_entry(piece.start, piece.end, _PRESENT))
                    output.expect_all(piece.start, piece.end)
                    output.copy(piece.start, piece.end)
                    if piece.vdso:
                        output.expect_data(piece.start, "[vdso]")
    _write(path, content[:HEADER_BYTES] + joined(amended))


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


class _Pages:
    """A pages file that is written anew: from the store, and from what it was."""

    def __init__(self, path: str, store: Path, pid: int) -> None:
        self._old = _open_if_there(path)
        self._source = _open_if_there(page_store.path_of(store, pid))
        self._marks = Marks.open_if_there(missing.path_of(store, pid))
        if self._old is not None and os.fstat(self._old).st_size:
            Path(path).unlink()
        self._new = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._offset = 0
        self._wanted: list[Range] = []
        self._waiting: list[bytes | memoryview] = []

    def __enter__(self) -> "_Pages":
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        try:
            if kind is None:
                self._take()
                self._flush()
        finally:
            for descriptor in (self._old, self._source, self._new):
                if descriptor is not None:
                    os.close(descriptor)
            if self._marks is not None:
                self._marks.close()

    def keep(self, length: int) -> None:
        """Take over what the file had next. Raises ExecutionError if it is shorter."""
        end = 0 if self._old is None else os.fstat(self._old).st_size
        if self._offset + length > end:
            raise ExecutionError("the images do not fit together: a file of pages is too short")
        self._take()
        self._append(self._old, self._offset, length)
        self._offset += length

    def copy(self, start: int, end: int) -> None:
        """Append what the store has of a range; ranges come in order."""
        if self._wanted and (start - self._wanted[-1].end > _NEAR_BYTES or end - self._wanted[0].start > _PIECE_BYTES):
            self._take()
        if end - start > _PIECE_BYTES:
            self._append(self._source, start, end - start)
        else:
            self._wanted.append(Range(start, end))

    def expect_all(self, start: int, end: int) -> None:
        """Raises ExecutionError if anything there is missing: no process can start without."""
        if self._marks is not None and self._marks.first(start, end) is not None:
            raise ExecutionError(f"memory at {start:x} was left at the source, which cannot be pulled")

    def expect_data(self, start: int, what: str) -> None:
        """Raises ExecutionError if the store has nothing there."""
        if self._source is None or extents.first_data(self._source, start, start + PAGE_BYTES) is None:
            raise ExecutionError(f"the page store lacks {what}: it has to be sent like other private memory")

    def _take(self) -> None:
        """Of ranges near to each other, as one has them of a mapping, each read would take longer than all of it."""
        if self._wanted:
            first, last = self._wanted[0].start, self._wanted[-1].end
            data = b"" if self._source is None else os.pread(self._source, last - first, first)
            whole = memoryview(data.ljust(last - first, b"\0"))
            self._waiting += [whole[part.start - first : part.end - first] for part in self._wanted]
            self._wanted.clear()

    def _append(self, source: int | None, at: int, length: int) -> None:
        while length:
            size = min(length, _PIECE_BYTES)
            data = os.pread(source, size, at) if source is not None else b""
            self._waiting.append(data.ljust(size, b"\0"))
            at, length = at + size, length - size
            if size == _PIECE_BYTES:
                self._flush()

    def _flush(self) -> None:
        data = b"".join(self._waiting)
        self._waiting = []
        wire.check_room(self._new, len(data))
        view = memoryview(data)
        while view:
            view = view[os.write(self._new, view) :]


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


def _write(path: str, content: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_TRUNC | os.O_CLOEXEC)
    try:
        os.write(descriptor, content)
    finally:
        os.close(descriptor)
