"""Contents of another process' memory, and of shared objects, in large reads; zeros and pages that went told apart."""

import ctypes
import errno
import os
from collections.abc import Callable, Iterable, Iterator

from blockdev import blocks
from blockdev.blocks import Batch
from blockdev.extents import Range, pieces
from migrator.memory import mappings, processes
from migrator.memory.errors import ProcessGone
from migrator.memory.pagemap import PAGE_BYTES
from migrator.memory.processes import ProcessKey

BATCH_BYTES = 1 << 20
# What process_vm_readv(2) takes in one call (IOV_MAX).
_MOST_RANGES = 1024
_ZERO_PAGE = bytes(PAGE_BYTES)


class _Vector(ctypes.Structure):
    _fields_ = [("base", ctypes.c_void_p), ("length", ctypes.c_size_t)]


_libc = ctypes.CDLL(None, use_errno=True)
_libc.process_vm_readv.restype = ctypes.c_ssize_t
_libc.process_vm_readv.argtypes = [
    ctypes.c_int, ctypes.c_void_p, ctypes.c_ulong, ctypes.c_void_p, ctypes.c_ulong, ctypes.c_ulong,
]  # fmt: skip


def read_process(process: ProcessKey, ranges: Iterable[Range], *, strict: bool = False) -> Iterator[Batch]:
    """What is in these ranges (whole pages) now, in order. Where nothing is any more, zeros: the next collect says so
    too, or that it is back. Where there is none, `strict`: an OSError for a page that is mapped and cannot be read.

    Also where the process itself may not read. The process may run: what it writes meanwhile is told by the next
    collect. Raises ProcessGone, also at the end if what was read last may be another process'.
    """
    if not processes.is_alive(process):
        raise ProcessGone(f"process {process.pid} has ended")
    buffer = ctypes.create_string_buffer(BATCH_BYTES)
    remote = (_Vector * _MOST_RANGES)()
    with memoryview(buffer).cast("B") as view:
        for batch in _batches(pieces(ranges, BATCH_BYTES)):
            left = batch
            while left:
                done = _read_some(process.pid, left, buffer, remote) // PAGE_BYTES * PAGE_BYTES
                taken, left = _cut(left, done)
                if done:
                    yield without_zeros(taken, bytes(view[:done]))
                if left:
                    yield from _hard(process.pid, left[0], strict)
                    del left[0]
    if not processes.is_alive(process):
        raise ProcessGone(f"process {process.pid} has ended")


def read_object(descriptor: int, ranges: Iterable[Range], seen: Callable[[int, memoryview], None]) -> Iterator[Batch]:
    """The same for a file by offsets; what is beyond its end is gone, and a last page is filled up with zeros.

    `seen` is told of all that was read: where, and whole pages of it.
    """
    buffer = bytearray(BATCH_BYTES)
    with memoryview(buffer) as view:
        for batch in _batches(pieces(ranges, BATCH_BYTES)):
            at = 0
            found: list[Range] = []
            for part in batch:
                done = os.preadv(descriptor, [view[at : at + part.length]], part.start)
                padded = -(-done // PAGE_BYTES) * PAGE_BYTES
                view[at + done : at + padded] = bytes(padded - done)
                if padded:
                    seen(part.start, view[at : at + padded])
                    found.append(Range(part.start, part.start + padded))
                if padded < part.length:
                    yield from blocks.zeros([Range(part.start + padded, part.end)])
                at += padded
            if found:
                yield without_zeros(found, bytes(view[:at]))


def without_zeros(ranges: list[Range], data: bytes) -> Batch:
    """The contents of ranges, one behind the other, with whole pages of zeros left out."""
    if not any(data.startswith(_ZERO_PAGE, at) for at in range(0, len(data), PAGE_BYTES)):
        return Batch([word for part in ranges for word in (part.start, part.end - part.start)], data)
    layout: list[int] = []
    kept: list[memoryview] = []
    at = 0
    for part in ranges:
        left = part.length
        while left:
            is_zero, length = data.startswith(_ZERO_PAGE, at), PAGE_BYTES
            while length < left and data.startswith(_ZERO_PAGE, at + length) == is_zero:
                length += PAGE_BYTES
            layout += (part.end - left, -length if is_zero else length)
            if not is_zero:
                kept.append(memoryview(data)[at : at + length])
            left, at = left - length, at + length
    return Batch(layout, b"".join(kept))


def _batches(parts: Iterator[Range]) -> Iterator[list[Range]]:
    batch: list[Range] = []
    size = 0
    for part in parts:
        if batch and (size + part.length > BATCH_BYTES or len(batch) == _MOST_RANGES):
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


def _cut(parts: list[Range], length: int) -> tuple[list[Range], list[Range]]:
    """So many bytes of the ranges, and the rest."""
    for number, part in enumerate(parts):
        if length < part.length:
            middle = part.start + length
            return [*parts[:number], *[Range(part.start, middle)] * (length > 0)], [
                Range(middle, part.end),
                *parts[number + 1 :],
            ]
        length -= part.length
    return parts, []


def _hard(pid: int, part: Range, strict: bool) -> Iterator[Batch]:
    """A range whose first page the process itself may not read, or that is gone."""
    try:
        descriptor = os.open(f"/proc/{pid}/mem", os.O_RDONLY | os.O_CLOEXEC)
    except (FileNotFoundError, ProcessLookupError) as error:
        raise ProcessGone(f"process {pid} has ended") from error
    try:
        start = part.start
        while start < part.end:
            data = _read_hard(descriptor, start, part.end)
            if data:
                end = start + len(data)
                yield without_zeros([Range(start, end)], data)
            elif strict and any(area.start <= start < area.end for area in mappings.read(pid)):
                raise OSError(errno.EIO, os.strerror(errno.EIO), f"page {start:x} of process {pid}")
            else:
                end = min(part.end, _end_of_nothing(pid, start))
                yield from blocks.zeros([Range(start, end)])
            start = end
    finally:
        os.close(descriptor)


def _read_hard(descriptor: int, start: int, end: int) -> bytes:
    """Whole pages, none where nothing is."""
    try:
        data = os.pread(descriptor, end - start, start)
    except OSError as error:
        if error.errno not in (errno.EIO, errno.EFAULT):
            raise
        return b""
    return data[: len(data) // PAGE_BYTES * PAGE_BYTES]


def _end_of_nothing(pid: int, at: int) -> int:
    """Up to where no page can be read: the next mapping, or the next page where there is one."""
    for area in mappings.read(pid):
        if area.end > at:
            return max(area.start, at + PAGE_BYTES)
    return 1 << 64
