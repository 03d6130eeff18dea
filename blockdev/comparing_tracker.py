"""Tracks writes by comparing blocks with digests of what was read of them before.

It needs nothing from the kernel, and each collect costs a read of everything allocated: also the last one, for which
the container waits.

A digest is of what the reader was given, by `observe`, and not of what this tracker sees for itself: a block that
changes before it is read, and changes back before the next collect, would look as if nothing had been.

Memory: 16 bytes per block of 64 KiB that was read, so 256 MiB for 1 TiB of data; a device of more than 1 TiB has larger
blocks instead of more of them. Two different blocks have the same digest (XXH3, 128 bits) in one of 2^128 cases.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

from blockdev import extents, fiemap
from blockdev.block_device import BLOCK_BYTES, Device
from blockdev.blocks import Piece
from blockdev.digests import DIGEST_BYTES, UNKNOWN, ZEROS, Digests, read_region
from blockdev.extents import Range

MAX_BLOCKS = 1 << 24

_READERS = 2
# Regions that are read ahead of the one that is compared.
_AHEAD = 4


class ComparingTracker:
    """See `blockdev.tracker.WriteTracker`. With the image file under the device, holes in it are not read."""

    reads_all = True

    def __init__(self, device: Path, image: Path | None = None) -> None:
        self._device = Device(device)
        self._image_path = image
        # Of what the reader has. None before the start.
        self._digests: Digests | None = None
        self._observed = False

    def start(self) -> None:
        """Costs nothing: what is read is told by `observe`, and the rest of the replica is zeros."""
        self._begin(ZEROS)

    def collect(self, check: Callable[[], None] = lambda: None) -> list[Range]:
        """Reads everything that is allocated. A change of the size is answered with the whole device, and so is each
        collect until something is observed."""
        size_bytes = self._device.size_bytes()
        if self._digests is None or self._digests.size_bytes != size_bytes:
            self._begin(UNKNOWN)
        if self._digests is None or not self._observed:
            return [Range(0, size_bytes)]
        return extents.merge(self._compare(self._digests, check))

    def observe(self, pieces: Iterable[Piece]) -> Iterator[Piece]:
        """Notes the digests of the pieces while they pass."""
        self._observed = True
        return self._noted(pieces)

    def close(self) -> None:
        """Forget the digests."""
        self._digests = None
        self._device.close()

    def _begin(self, unread: bytes) -> None:
        size_bytes, block_bytes = self._device.size_bytes(), BLOCK_BYTES
        while size_bytes > MAX_BLOCKS * block_bytes:
            block_bytes *= 2
        self._digests, self._observed = Digests(size_bytes, block_bytes, unread), False

    def _noted(self, pieces: Iterable[Piece]) -> Iterator[Piece]:
        for piece in pieces:
            if self._digests is not None:
                self._digests.note(piece)
            yield piece

    def _compare(self, known: Digests, check: Callable[[], None]) -> Iterator[Range]:
        with ExitStack() as stack:

            def opened(path: Path, flags: int) -> int:
                descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | flags)
                stack.callback(os.close, descriptor)
                return descriptor

            device = opened(self._device.path, os.O_DIRECT)
            image = None if self._image_path is None else opened(self._image_path, 0)

            def allocated(within: Range) -> Iterable[Range]:
                return [within] if image is None else fiemap.allocated(image, within.end, within.start)

            def look(number: int) -> bytes:
                within = known.region(number)
                return read_region(device, allocated(within), within, known.block_bytes)

            numbers = known.numbers()
            for part in allocated(Range(0, known.size_bytes)):
                numbers.update(known.numbers_of(part))
            ordered = sorted(numbers)
            threads = stack.enter_context(ThreadPoolExecutor(_READERS, "compare"))
            for at in range(0, len(ordered), _AHEAD):
                check()
                some = ordered[at : at + _AHEAD]
                for number, now in zip(some, threads.map(look, some), strict=True):
                    yield from _differences(known, number, now)


def _differences(known: Digests, number: int, now: bytes) -> Iterator[Range]:
    before, within = known.of_region(number), known.region(number)
    if now == before:
        return
    for at in range(0, len(now), DIGEST_BYTES):
        if before[at : at + DIGEST_BYTES] != now[at : at + DIGEST_BYTES]:
            begin = within.start + at // DIGEST_BYTES * known.block_bytes
            yield Range(begin, min(begin + known.block_bytes, within.end))
