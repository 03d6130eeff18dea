"""Contents of another process' memory, and of shared objects, in large reads; zeros and pages that went told apart."""

import ctypes
import errno
import os
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import NamedTuple

from blockdev.blocks import Piece
from blockdev.extents import Range, pieces
from migrator.memory import mappings, processes
from migrator.memory.errors import ProcessGone
from migrator.memory.pagemap import PAGE_BYTES
from migrator.memory.processes import ProcessKey

PIECE_BYTES = 1 << 20
# What process_vm_readv(2) takes in one call (IOV_MAX).
_MOST_RANGES = 1024
_ZERO_PAGE = bytes(PAGE_BYTES)


class Gone(NamedTuple):
    """Addresses (or offsets) at which nothing is any more. The next collect says so too, or that it is back."""

    start: int
    end: int


class _Vector(ctypes.Structure):
    _fields_ = [("base", ctypes.c_void_p), ("length", ctypes.c_size_t)]


_libc = ctypes.CDLL(None, use_errno=True)
_libc.process_vm_readv.restype = ctypes.c_ssize_t
_libc.process_vm_readv.argtypes = [
    ctypes.c_int, ctypes.c_void_p, ctypes.c_ulong, ctypes.c_void_p, ctypes.c_ulong, ctypes.c_ulong,
]  # fmt: skip


def read_process(process: ProcessKey, ranges: Iterable[Range]) -> Iterator[Piece | Gone]:
    """What is in these ranges (whole pages) now, in order, in pieces of at most 1 MiB that stay within a range.

    Also where the process itself may not read. The process may run: what it writes meanwhile is told by the next
    collect. Raises ProcessGone, also at the end if what was read last may be another process'.
    """
    if not processes.is_alive(process):
        raise ProcessGone(f"process {process.pid} has ended")
    buffer = ctypes.create_string_buffer(PIECE_BYTES)
    remote = (_Vector * _MOST_RANGES)()
    with memoryview(buffer).cast("B") as view:
        for batch in _batches(pieces(ranges, PIECE_BYTES)):
            left = batch
            while left:
                done = _read_some(process.pid, left, buffer, remote)
                at = 0
                for number, part in enumerate(left):
                    got = min(part.length, done - at) // PAGE_BYTES * PAGE_BYTES
                    if got:
                        yield from split_zero_pages(part.start, bytes(view[at : at + got]))
                    at += got
                    if got < part.length:
                        after = yield from _hard(process.pid, Range(part.start + got, part.end))
                        left = [after] * (after.length > 0) + left[number + 1 :]
                        break
                else:
                    left = []
    if not processes.is_alive(process):
        raise ProcessGone(f"process {process.pid} has ended")


def read_object(
    descriptor: int, ranges: Iterable[Range], seen: Callable[[int, memoryview], None]
) -> Iterator[Piece | Gone]:
    """The same for a file by offsets; what is beyond its end is gone, and a last page is filled up with zeros.

    `seen` is told of all that was read: where, and whole pages of it.
    """
    buffer = bytearray(PIECE_BYTES)
    with memoryview(buffer) as view:
        for part in pieces(ranges, PIECE_BYTES):
            done = os.preadv(descriptor, [view[: part.length]], part.start)
            padded = -(-done // PAGE_BYTES) * PAGE_BYTES
            view[done:padded] = bytes(padded - done)
            if padded:
                seen(part.start, view[:padded])
                yield from split_zero_pages(part.start, bytes(view[:padded]))
            if padded < part.length:
                yield Gone(part.start + padded, part.end)


def split_zero_pages(offset: int, data: bytes) -> Iterator[Piece]:
    """Whole pages as pieces of data and pieces of zeros, in order. The data is not copied."""
    length = len(data)
    if length == PAGE_BYTES:
        yield Piece(offset, length, None if data == _ZERO_PAGE else data)
        return
    begin, zero = 0, data.startswith(_ZERO_PAGE)
    for at in range(PAGE_BYTES, length, PAGE_BYTES):
        if data.startswith(_ZERO_PAGE, at) != zero:
            yield Piece(offset + begin, at - begin, None if zero else memoryview(data)[begin:at])
            begin, zero = at, not zero
    if length:
        yield Piece(offset + begin, length - begin, None if zero else memoryview(data)[begin:])


def _batches(parts: Iterator[Range]) -> Iterator[list[Range]]:
    batch: list[Range] = []
    size = 0
    for part in parts:
        if batch and (size + part.length > PIECE_BYTES or len(batch) == _MOST_RANGES):
            yield batch
            batch, size = [], 0
        batch.append(part)
        size += part.length
    if batch:
        yield batch


def _read_some(pid: int, parts: list[Range], into: ctypes.Array[ctypes.c_char], remote: ctypes.Array[_Vector]) -> int:
    """Bytes read of the parts in a row, up to the first page that cannot be read this way."""
    total = 0
    for number, part in enumerate(parts):
        vector = remote[number]
        vector.base, vector.length = part.start, part.end - part.start
        total += part.end - part.start
    local = _Vector(ctypes.addressof(into), total)
    done = int(_libc.process_vm_readv(pid, ctypes.addressof(local), 1, ctypes.addressof(remote), len(parts), 0))
    if done >= 0:
        return done
    code = ctypes.get_errno()
    if code == errno.ESRCH:
        raise ProcessGone(f"process {pid} has ended")
    if code != errno.EFAULT:
        raise OSError(code, f"process_vm_readv: {os.strerror(code)}", f"process {pid}")
    return 0


def _hard(pid: int, part: Range) -> Generator[Piece | Gone, None, Range]:
    """A page that the process itself may not read, or that is gone: returns what is left of the range after it."""
    length = 0
    try:
        descriptor = os.open(f"/proc/{pid}/mem", os.O_RDONLY | os.O_CLOEXEC)
    except (FileNotFoundError, ProcessLookupError) as error:
        raise ProcessGone(f"process {pid} has ended") from error
    try:
        data = os.pread(descriptor, part.length, part.start)
        length = len(data) // PAGE_BYTES * PAGE_BYTES
    except OSError as error:
        if error.errno not in (errno.EIO, errno.EFAULT):
            raise
    finally:
        os.close(descriptor)
    if length:
        yield from split_zero_pages(part.start, data[:length])
        return Range(part.start + length, part.end)
    end = min(part.end, _end_of_nothing(pid, part.start))
    yield Gone(part.start, end)
    return Range(end, part.end)


def _end_of_nothing(pid: int, at: int) -> int:
    """Up to where no page can be read: the next mapping, or the next page where there is one."""
    for area in mappings.read(pid):
        if area.end > at:
            return max(area.start, at + PAGE_BYTES)
    return 1 << 64
