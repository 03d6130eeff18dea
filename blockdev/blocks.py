"""Contents of volumes as pieces: read past the page cache with zeros left out, written so that holes stay holes."""

import ctypes
import mmap
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from blockdev import extents
from blockdev.errors import BlockError
from blockdev.extents import Range

PIECE_BYTES = 1 << 20
ALIGNMENT = 4096
# Zeros are looked for in steps of this; a shorter run is sent as it is.
ZERO_STEP_BYTES = 65536

_ZEROS = bytes(ZERO_STEP_BYTES)
_PUNCH_HOLE, _KEEP_SIZE = 2, 1
_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_longlong, ctypes.c_longlong]


@dataclass(frozen=True)
class Piece:
    """Bytes at an offset; `data` None stands for zeros."""

    offset: int
    length: int
    data: bytes | memoryview | None


def open_direct(path: Path, *, writable: bool = False) -> int:
    """A descriptor that goes past the page cache; the caller closes it."""
    return os.open(path, (os.O_RDWR if writable else os.O_RDONLY) | os.O_DIRECT | os.O_CLOEXEC)


def read(descriptor: int, ranges: Iterable[Range], piece_bytes: int = PIECE_BYTES) -> Iterator[Piece]:
    """What is in the ranges, in order, in pieces of at most `piece_bytes`. Ranges are widened to whole 4096 bytes."""
    wide = extents.merge(Range(r.start // ALIGNMENT * ALIGNMENT, -(-r.end // ALIGNMENT) * ALIGNMENT) for r in ranges)
    with mmap.mmap(-1, piece_bytes) as buffer, memoryview(buffer) as view:
        for part in extents.pieces(wide, piece_bytes):
            count = os.preadv(descriptor, [view[: part.length]], part.start)
            if count <= 0:
                return  # past the end: the last block of an image whose size is no multiple of 4096
            yield from split_zeros(part.start, bytes(view[:count]))


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
    if piece.offset < 0 or piece.length <= 0 or piece.offset + piece.length > size_bytes:
        raise BlockError(f"a piece of {piece.length} bytes at {piece.offset} is not within a volume of {size_bytes}")
    if piece.data is None:
        _punch(descriptor, piece)
        return
    at, rest = piece.offset, memoryview(piece.data)
    while rest:
        count = os.pwrite(descriptor, rest, at)
        at, rest = at + count, rest[count:]


def _punch(descriptor: int, piece: Piece) -> None:
    if _libc.fallocate(descriptor, _PUNCH_HOLE | _KEEP_SIZE, piece.offset, piece.length) < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"fallocate: {os.strerror(number)}", f"hole of {piece.length} bytes at {piece.offset}")


def _is_zero(data: bytes, at: int) -> bool:
    left = len(data) - at
    return data.startswith(_ZEROS if left >= ZERO_STEP_BYTES else _ZEROS[:left], at)


def _piece(offset: int, data: bytes, begin: int, end: int, zero: bool) -> Piece:
    return Piece(offset + begin, end - begin, None if zero else memoryview(data)[begin:end])
