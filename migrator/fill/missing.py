"""Pages that the page store has not got yet (post-copy).

Beside each process' pages is a file of marks, a byte for each page, 1 as long as it is missing. Who brings pages writes
them to the store first and takes their marks away afterwards. Two pipes join it with the fill's worker: by one the
worker says which pages are waited for, by the other it hears that some have come. Both are files, so that either may
die and be started again.
"""

import contextlib
import os
import re
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path

from blockdev import extents
from migrator.fill.store import PAGE_BYTES

MARK = b"\1"
_NAME = re.compile(r"missing-([1-9][0-9]{0,9})")
_RUN = re.compile(MARK + rb"+")
# Of marks: 256 MiB of memory.
_STEP = 64 << 10
# Beyond all addresses.
_END = 1 << 60
_PAGE = struct.Struct("=IQ")
_WANTED, _NEWS = "wanted", "news"
_HAS_COME, _SAY_AGAIN = b".", b"?"


def path_of(store: Path, pid: int) -> Path:
    """The marks of a process; `pid` is that in the container's own pid namespace."""
    return store / f"missing-{pid}"


def pids(store: Path) -> list[int]:
    """The processes that something is, or was, missing of; none if there is no store."""
    try:
        names = os.listdir(store)  # noqa: PTH208  # half the time of Path.iterdir
    except FileNotFoundError:
        return []
    return sorted(int(match[1]) for name in names if (match := _NAME.fullmatch(name)))


def left_bytes(store: Path) -> int:
    """What is missing of all processes."""
    total = 0
    for pid in pids(store):
        if (marks := Marks.open_if_there(path_of(store, pid))) is not None:
            with contextlib.closing(marks):
                total += marks.left_bytes()
    return total


def make_pipes(store: Path) -> None:
    """Repeatable."""
    for name in (_WANTED, _NEWS):
        with contextlib.suppress(FileExistsError):
            os.mkfifo(store / name, 0o600)


class Marks:
    """The marks of one process. Addresses are multiples of the page size."""

    def __init__(self, descriptor: int) -> None:
        """An open file of marks, which is closed with this."""
        self._file = descriptor

    @classmethod
    def open_if_there(cls, path: Path) -> "Marks | None":
        """None for a process that nothing is missing of."""
        try:
            return cls(os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW))
        except FileNotFoundError:
            return None

    def runs(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        """What is missing between two addresses, in order."""
        for at, marks in self._read(start // PAGE_BYTES, end // PAGE_BYTES):
            for run in _RUN.finditer(marks):
                yield (at + run.start()) * PAGE_BYTES, (at + run.end()) * PAGE_BYTES

    def first(self, start: int, end: int) -> int | None:
        """The first address between the two that is missing."""
        return next((run[0] for run in self.runs(start, end)), None)

    def are_all(self, start: int, end: int) -> bool:
        """Whether everything between two addresses is missing."""
        count = (end - start) // PAGE_BYTES
        return os.pread(self._file, count, start // PAGE_BYTES) == MARK * count

    def clear(self, start: int, end: int) -> None:
        """These pages are in the store now."""
        os.pwrite(self._file, bytes((end - start) // PAGE_BYTES), start // PAGE_BYTES)

    def left_bytes(self) -> int:
        """What is missing."""
        return PAGE_BYTES * sum(marks.count(MARK) for _, marks in self._read(0, _END))

    def close(self) -> None:
        os.close(self._file)

    def _read(self, start: int, end: int) -> Iterator[tuple[int, bytes]]:
        """Of the pages with these numbers: where there are marks, and which."""
        for first, last in extents.sought(self._file, end, start):
            for at in range(first, last, _STEP):
                yield at, os.pread(self._file, min(_STEP, last - at), at)


class Pipes:
    """Either end of both. What finds a pipe full is left out: the pages come in their turn, and news are there."""

    def __init__(self, store: Path) -> None:
        flags = os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC
        self.wanted = os.open(store / _WANTED, flags)
        try:
            self.news = os.open(store / _NEWS, flags)
        except OSError:
            os.close(self.wanted)
            raise

    def want(self, pid: int, address: int) -> None:
        """The worker's: somebody waits for a page."""
        _write(self.wanted, _PAGE.pack(pid, address))

    def are_wanted(self) -> list[tuple[int, int]]:
        """All that was said by `want` and not heard yet."""
        return list(_PAGE.iter_unpack(_read(self.wanted, 4096 * _PAGE.size)))

    def has_come(self) -> None:
        """Who brings pages: some are in the store now."""
        _write(self.news, _HAS_COME)

    def say_again(self) -> None:
        """A new one that brings pages: what its predecessor has heard is lost."""
        _write(self.news, _SAY_AGAIN)

    def hear(self) -> bool:
        """The worker's, when there are news: whether it is to `want` all once more."""
        return _SAY_AGAIN in _read(self.news, 1 << 16)

    def close(self) -> None:
        os.close(self.wanted)
        os.close(self.news)


def marked(ranges: Iterable[tuple[int, int]], longest: int) -> Iterator[tuple[int, bytes]]:
    """Ranges in order as marks: number of a page, and a byte for it and each that follows, `longest` at the most."""
    begin = at = 0
    parts: list[bytes] = []
    for start, end in ranges:
        first, last = start // PAGE_BYTES, end // PAGE_BYTES
        if first - at > _STEP or (last - begin > longest and first > begin):
            if parts:
                yield begin, b"".join(parts)
            parts = []
        if not parts:
            begin = at = first
        while last - begin > longest:  # one range alone
            yield begin, MARK * longest
            begin = at = first = begin + longest
        parts += (bytes(first - at), MARK * (last - first))
        at = last
    if parts:
        yield begin, b"".join(parts)


def _write(pipe: int, data: bytes) -> None:
    with contextlib.suppress(BlockingIOError):
        os.write(pipe, data)


def _read(pipe: int, most: int) -> bytes:
    try:
        return os.read(pipe, most)
    except BlockingIOError:
        return b""
