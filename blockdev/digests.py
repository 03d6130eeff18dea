"""Digests of a device's blocks, kept by regions of 1024 blocks, and taken from what is read."""

import mmap
import os
from collections.abc import Iterable
from functools import cache

import xxhash

from blockdev import extents
from blockdev.blocks import Piece
from blockdev.extents import Range

DIGEST_BYTES = 16
REGION_BLOCKS = 1024
# A hole and a block of zeros are the same to everyone who reads the device. Both stand for themselves, in place of a
# digest.
ZEROS = bytes(DIGEST_BYTES)
UNKNOWN = b"\xff" * DIGEST_BYTES

# Large, because between two reads a thread has to wait for its turn to run Python.
_BUFFER_BYTES = 8 << 20


class Digests:
    """Of the blocks of a device of that size: of each what was noted last, or else `unread`."""

    def __init__(self, size_bytes: int, block_bytes: int, unread: bytes) -> None:
        self.size_bytes, self.block_bytes = size_bytes, block_bytes
        self._unread = unread
        self._regions: dict[int, bytearray] = {}
        # Pieces may be of parts of blocks, one after the other: the block that the last one was of, as it was read,
        # and up to where.
        self._open: dict[int, tuple[bytearray, int]] = {}

    def region(self, number: int) -> Range:
        """The bytes that a region is of."""
        start = number * REGION_BLOCKS * self.block_bytes
        return Range(start, min(start + REGION_BLOCKS * self.block_bytes, self.size_bytes))

    def numbers(self) -> set[int]:
        """Of the regions in which not everything is known to be zeros."""
        if self._unread != ZEROS:
            return set(self.numbers_of(Range(0, self.size_bytes)))
        return set(self._regions)

    def numbers_of(self, part: Range) -> range:
        """Of the regions that a range lies in."""
        length = REGION_BLOCKS * self.block_bytes
        return range(part.start // length, -(-part.end // length))

    def of_region(self, number: int) -> bytes:
        """One after the other."""
        return bytes(self._regions.get(number, b"")) or self._unread * self._blocks(number)

    def note(self, piece: Piece) -> None:
        """Of this piece the reader has now what is in it."""
        for part in extents.pieces([Range(piece.offset, piece.offset + piece.length)], self.block_bytes):
            number = part.start // self.block_bytes
            data = None if piece.data is None else memoryview(piece.data)[part.start - piece.offset :][: part.length]
            if part.length == self._length(number):
                self._set(number, ZEROS if data is None else digest(data))
            else:
                self._note_part(number, part, data)

    def _note_part(self, number: int, part: Range, data: memoryview | None) -> None:
        at = part.start % self.block_bytes
        block, known = self._open.pop(number, (bytearray(), 0))
        if not block:
            block = bytearray(self._length(number))
            # What was not read of a block of zeros is zeros.
            known = len(block) if self._get(number) == ZEROS else 0
        block[at : at + part.length] = bytes(part.length) if data is None else data
        if at <= known:
            known = max(known, at + part.length)
        self._set(number, digest(block) if known == len(block) else UNKNOWN)
        self._open[number] = (block, known)

    def _get(self, block: int) -> bytes:
        number, at = divmod(block, REGION_BLOCKS)
        if number not in self._regions:
            return self._unread
        return bytes(self._regions[number][at * DIGEST_BYTES : (at + 1) * DIGEST_BYTES])

    def _set(self, block: int, value: bytes) -> None:
        self._open.clear()
        number, at = divmod(block, REGION_BLOCKS)
        if number not in self._regions:
            if value == self._unread:
                return
            self._regions[number] = bytearray(self._unread * self._blocks(number))
        self._regions[number][at * DIGEST_BYTES : (at + 1) * DIGEST_BYTES] = value

    def _blocks(self, number: int) -> int:
        return -(-self.region(number).length // self.block_bytes)

    def _length(self, block: int) -> int:
        return min(self.block_bytes, self.size_bytes - block * self.block_bytes)


def read_region(device: int, allocated: Iterable[Range], within: Range, block_bytes: int) -> bytes:
    """The digests of the blocks of a region, of which only what is allocated is read. `device` is of O_DIRECT."""
    digests = bytearray(-(-within.length // block_bytes) * DIGEST_BYTES)
    wide = extents.merge(
        Range(part.start // block_bytes * block_bytes, min(-(-part.end // block_bytes) * block_bytes, within.end))
        for part in allocated
    )
    with mmap.mmap(-1, max(_BUFFER_BYTES, block_bytes)) as buffer, memoryview(buffer) as view:
        for part in extents.pieces(wide, len(buffer)):
            _fill(device, view[: part.length], part.start)
            for at in range(0, part.length, block_bytes):
                place = (part.start + at - within.start) // block_bytes * DIGEST_BYTES
                digests[place : place + DIGEST_BYTES] = digest(view[at : min(at + block_bytes, part.length)])
    return bytes(digests)


def digest(data: memoryview | bytearray) -> bytes:
    """16 bytes; ZEROS for zeros."""
    found = xxhash.xxh3_128_digest(data)
    return ZEROS if found == _of_zeros(len(data)) else found


@cache
def _of_zeros(length: int) -> bytes:
    return xxhash.xxh3_128_digest(bytes(length))


def _fill(device: int, view: memoryview, offset: int) -> None:
    done = 0
    while done < len(view):
        count = os.preadv(device, [view[done:]], offset + done)
        if count == 0:
            raise OSError(f"preadv: the device ends at {offset + done}, before {offset + len(view)}")
        done += count
