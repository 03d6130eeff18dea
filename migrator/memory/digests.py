"""Contents of a file remembered as a digest per page, to find what has changed in it by any way of writing."""

import mmap
import os
import secrets
from array import array
from collections.abc import Iterable

import xxhash

from blockdev.extents import Range, pieces
from migrator.memory.pagemap import PAGE_BYTES

# Blocks that are as before need one digest and not one per page.
_BLOCK_BYTES = 65536
_PIECE_BYTES = 1 << 20
_UNKNOWN = 0
_BLOCKS = _PIECE_BYTES // _BLOCK_BYTES
_NOTHING_KNOWN = bytes(8 * (_BLOCKS + _PIECE_BYTES // PAGE_BYTES))


class Digests:
    """Some 8 bytes for each page that was looked at. Seeded anew each time, so that nobody can prepare contents that
    look alike."""

    def __init__(self) -> None:
        # By number of the piece: digests of its blocks, then of its pages. Files may be sparse and reach very far.
        self._pieces: dict[int, array[int]] = {}
        self._seed = secrets.randbits(64)
        self._buffer = bytearray(_PIECE_BYTES)

    def changed(self, descriptor: int, ranges: Iterable[Range], mapped: mmap.mmap | None = None) -> list[Range]:
        """The pages in these ranges (whole pages) of the file that are not as they were when last looked at, in order.

        They are looked at by this: what is in them now is what later looks are compared to, unless `seen` says better.
        In what is `mapped` of the file, from its beginning on, they are looked at without being copied: nobody is to
        make it shorter meanwhile.
        """
        found: list[Range] = []
        with memoryview(self._buffer) as buffer, memoryview(mapped or b"") as there:
            for piece in pieces(ranges, _PIECE_BYTES):
                if piece.end <= len(there):
                    view = there[piece.start : piece.end]
                else:
                    length = os.preadv(descriptor, [buffer[: piece.length]], piece.start)
                    # The last page of a file may be a part of one: the rest of it is zeros.
                    padded = -(-length // PAGE_BYTES) * PAGE_BYTES
                    buffer[length:padded] = bytes(padded - length)
                    view = buffer[:padded]
                known = self._pieces.setdefault(piece.start // _PIECE_BYTES, array("Q", _NOTHING_KNOWN))
                for block in pieces([Range(piece.start, piece.start + len(view))], _BLOCK_BYTES):
                    self._look(known, block, view[block.start - piece.start : block.end - piece.start], found)
                view.release()
        return found

    def seen(self, start: int, data: memoryview) -> None:
        """Whole pages as they were taken from the file, which may be after the look: what was changed in between and is
        changed back by the next look has to be found by that, too."""
        for piece in pieces([Range(start, start + len(data))], _PIECE_BYTES):
            known = self._pieces.setdefault(piece.start // _PIECE_BYTES, array("Q", _NOTHING_KNOWN))
            for block in pieces([piece], _BLOCK_BYTES):
                self._look(known, block, data[block.start - start : block.end - start], [])

    def forget(self, ranges: Iterable[Range]) -> None:
        """What is there next will have changed."""
        for part in ranges:
            first, last = part.start // _PIECE_BYTES, -(-part.end // _PIECE_BYTES)
            for number in [number for number in self._pieces if first <= number < last]:
                start = number * _PIECE_BYTES
                here = Range(max(0, part.start - start), min(_PIECE_BYTES, part.end - start))
                if here.length == _PIECE_BYTES:
                    del self._pieces[number]
                    continue
                known = self._pieces[number]
                for at in range(here.start // _BLOCK_BYTES, -(-here.end // _BLOCK_BYTES)):
                    known[at] = _UNKNOWN
                for at in range(here.start // PAGE_BYTES, -(-here.end // PAGE_BYTES)):
                    known[_BLOCKS + at] = _UNKNOWN

    def _look(self, known: "array[int]", block: Range, data: memoryview, found: list[Range]) -> None:
        number, whole = block.start % _PIECE_BYTES // _BLOCK_BYTES, block.length == _BLOCK_BYTES
        of_block = self._digest(data) if whole else _UNKNOWN
        if whole and known[number] == of_block:
            return
        known[number] = of_block
        page = _BLOCKS + block.start % _PIECE_BYTES // PAGE_BYTES
        for at in range(0, block.length, PAGE_BYTES):
            digest = self._digest(data[at : at + PAGE_BYTES])
            if known[page] != digest:
                known[page] = digest
                start = block.start + at
                if found and found[-1].end == start:
                    found[-1] = Range(found[-1].start, start + PAGE_BYTES)
                else:
                    found.append(Range(start, start + PAGE_BYTES))
            page += 1

    def _digest(self, data: memoryview) -> int:
        return xxhash.xxh3_64_intdigest(data, self._seed) or 1
