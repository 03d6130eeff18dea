"""Contents of volumes as pieces: read past the page cache with zeros left out, written so that holes stay holes."""

import ctypes
import itertools
import mmap
import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from blockdev import extents, fiemap
from blockdev.errors import BlockError
from blockdev.extents import Range

PIECE_BYTES = 1 << 20
# In a batch.
BATCH_PIECES = 1024
ALIGNMENT = 4096
# Zeros are looked for in steps of this; a shorter run is sent as it is.
ZERO_STEP_BYTES = 65536
# Holes are looked for in ranges from this length on, which discards leave; in a shorter one it costs more than reading.
HOLE_SEARCH_BYTES = 1 << 20

# What is read in one go by one of the threads, and how much may be waiting. A device needs several reads at once to be
# fast with small ones, and few of the large ones.
_BATCH_PIECES = 16
_READERS = 8
_AHEAD, _AHEAD_BYTES = 16, 4 << 20

_ZEROS = bytes(ZERO_STEP_BYTES)
_PUNCH_HOLE, _KEEP_SIZE = 2, 1
_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_longlong, ctypes.c_longlong]


class Piece(NamedTuple):
    """Bytes at an offset; `data` None stands for zeros. A tuple because many thousands are made inside a freeze."""

    offset: int
    length: int
    data: bytes | memoryview | None


class Batch(NamedTuple):
    """Many pieces in one, for which a `Piece` each would cost more than their bytes.

    `layout` has the offset and the length of each, the length of zeros negative; `data` the bytes of those that have
    any, one behind the other, PIECE_BYTES at most.
    """

    layout: list[int]
    data: bytes | memoryview


def batches(pieces: Iterable[Piece]) -> Iterator[Batch]:
    """Each as a batch of one."""
    for offset, length, data in pieces:
        yield Batch([offset, -length], b"") if data is None else Batch([offset, length], data)


def zeros(ranges: Sequence[Range]) -> Iterator[Batch]:
    """These ranges as zeros."""
    for at in range(0, len(ranges), BATCH_PIECES):
        some = ranges[at : at + BATCH_PIECES]
        yield Batch([word for part in some for word in (part.start, part.start - part.end)], b"")


def open_direct(path: Path, *, writable: bool = False) -> int:
    """A descriptor that goes past the page cache; the caller closes it."""
    return os.open(path, (os.O_RDWR if writable else os.O_RDONLY) | os.O_DIRECT | os.O_CLOEXEC)


def read(
    descriptor: int, ranges: Iterable[Range], piece_bytes: int = PIECE_BYTES, *, image: int | None = None
) -> Iterator[Piece]:
    """What is in the ranges, in order, in pieces of at most `piece_bytes`, except zeros, of which one may be longer.

    Ranges are widened to whole 4096 bytes. With the image file under the device as `image`, holes in it are not read.
    A few threads read ahead: nothing is read before the first piece is asked for.
    """
    wide = extents.merge(Range(r.start // ALIGNMENT * ALIGNMENT, -(-r.end // ALIGNMENT) * ALIGNMENT) for r in ranges)
    batches = _batches(_plan(wide, piece_bytes, image), piece_bytes)
    buffers = [mmap.mmap(-1, piece_bytes) for _ in range(_READERS)]
    first = next(batches, [])
    second = next(batches, None)
    if second is None:
        yield from _split(_read_batch(descriptor, first, buffers))
        return
    with ThreadPoolExecutor(_READERS, "read-ahead") as readers:
        ahead: deque[tuple[Future[list[_Read]], int]] = deque()
        waiting = 0
        for batch in itertools.chain((first, second), batches):
            size = sum(part.length for part in batch if isinstance(part, Range))
            ahead.append((readers.submit(_read_batch, descriptor, batch, buffers), size))
            waiting += size
            while len(ahead) == _AHEAD or (ahead and waiting >= _AHEAD_BYTES):
                done, size = ahead.popleft()
                waiting -= size
                yield from _split(done.result())
        while ahead:
            yield from _split(ahead.popleft()[0].result())


def split_zeros(offset: int, data: bytes) -> Iterator[Piece]:
    """One block of bytes as pieces of data and of zeros, in steps of 64 KiB."""
    begin, zero = 0, _is_zero(data, 0)
    for at in range(ZERO_STEP_BYTES, len(data), ZERO_STEP_BYTES):
        if _is_zero(data, at) != zero:
            yield _piece(offset, data, begin, at, zero)
            begin, zero = at, not zero
    if data:
        yield _piece(offset, data, begin, len(data), zero)


def write(descriptor: int, piece: Piece, size_bytes: int) -> None:
    """Store a piece in a volume of that size. Raises BlockError for one that does not lie within it."""
    at, length, data = piece
    if at < 0 or length <= 0 or at + length > size_bytes:
        raise BlockError(f"a piece of {length} bytes at {at} is not within a volume of {size_bytes}")
    if data is None:
        _punch(descriptor, piece)
        return
    while (count := os.pwrite(descriptor, data, at)) < len(data):
        at, data = at + count, memoryview(data)[count:]


# A piece that is known to be zeros, or the bytes read at an offset.
_Read = Piece | tuple[int, bytes]


def _plan(ranges: Iterable[Range], piece_bytes: int, image: int | None) -> Iterator[Range | Piece]:
    """What to read, in pieces, and between it the holes that need not be read."""
    for part in ranges:
        if image is None or part.length < HOLE_SEARCH_BYTES:
            yield from extents.pieces([part], piece_bytes)
            continue
        at, end = part.start, min(part.end, os.fstat(image).st_size)
        for data in fiemap.allocated(image, end, at):
            start = data.start // ALIGNMENT * ALIGNMENT
            if at < start:
                yield Piece(at, start - at, None)
            stop = -(-data.end // ALIGNMENT) * ALIGNMENT
            yield from extents.pieces([Range(max(at, start), stop)], piece_bytes)
            at = stop
        if at < end:
            yield Piece(at, end - at, None)


def _batches(plan: Iterator[Range | Piece], longest_bytes: int) -> Iterator[list[Range | Piece]]:
    """As many as one thread should read in one go: one large piece, or several small ones."""
    batch: list[Range | Piece] = []
    size = 0
    for part in plan:
        length = part.length if isinstance(part, Range) else 0
        if batch and (size + length > longest_bytes or len(batch) == _BATCH_PIECES):
            yield batch
            batch, size = [], 0
        batch.append(part)
        size += length
    if batch:
        yield batch


def _read_batch(descriptor: int, batch: list[Range | Piece], buffers: list[mmap.mmap]) -> list[_Read]:
    """Copied out of the buffer, which costs a twentieth of reading: what is handed out stays as it is."""
    buffer = buffers.pop()
    try:
        with memoryview(buffer) as view:
            return [part if isinstance(part, Piece) else (part.start, _fill(descriptor, part, view)) for part in batch]
    finally:
        buffers.append(buffer)


def _fill(descriptor: int, part: Range, view: memoryview) -> bytes:
    """The bytes of a range; fewer at the end of an image whose size is no multiple of 4096."""
    done = 0
    while done < part.length and done % ALIGNMENT == 0:
        count = os.preadv(descriptor, [view[done : part.length]], part.start + done)
        if count == 0:
            break
        done += count
    return bytes(view[:done])


def _split(read_parts: list[_Read]) -> Iterator[Piece]:
    for part in read_parts:
        if isinstance(part, Piece):
            yield part
        else:
            yield from split_zeros(*part)


def _punch(descriptor: int, piece: Piece) -> None:
    if _libc.fallocate(descriptor, _PUNCH_HOLE | _KEEP_SIZE, piece.offset, piece.length) < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"fallocate: {os.strerror(number)}", f"hole of {piece.length} bytes at {piece.offset}")


def _is_zero(data: bytes, at: int) -> bool:
    left = len(data) - at
    return data.startswith(_ZEROS if left >= ZERO_STEP_BYTES else _ZEROS[:left], at)


def _piece(offset: int, data: bytes, begin: int, end: int, zero: bool) -> Piece:
    return Piece(offset + begin, end - begin, None if zero else memoryview(data)[begin:end])
