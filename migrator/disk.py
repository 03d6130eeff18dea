"""The disk's share of a migration at the source: everything allocated once, then rounds over what was written."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field

from blockdev import blocks, extents, fiemap, filesystem
from blockdev.blocks import Piece
from blockdev.extents import Range
from blockdev.tracker import WriteTracker
from migrator import verify
from migrator.ports import LeavingContainer, LeavingVolume
from migrator.stream import Sender
from migrator.v1 import peer_pb2
from migrator.verify import BLOCK_BYTES, Chunks

FEATURE = "volume-batches-v1"

Requests = Iterator[peer_pb2.SendRequest]


@dataclass(frozen=True)
class _Copy:
    """A volume that is being copied: an O_DIRECT descriptor, one of the image file, which knows the holes, and, while
    the container runs, its tracker."""

    target: str
    volume: LeavingVolume
    descriptor: int
    image: int
    tracker: WriteTracker | None
    # Collected and not yet sent.
    left: list[Range] = field(default_factory=list)

    def read(self, ranges: Iterable[Range], *, with_holes: bool = False) -> Iterator[Piece]:
        """What is in the ranges now; the tracker sees what the destination gets. Holes are read too if that is said."""
        pieces = blocks.read(self.descriptor, ranges, image=None if with_holes else self.image)
        return self.tracker.observe(pieces) if self.tracker else pieces

    def dirty(self, check: Callable[[], None]) -> list[Range]:
        """Written since it was asked last. Cleared first and read afterwards, so a write in between is sent again."""
        return self.tracker.collect(check) if self.tracker else []


class DiskCopy:
    """Copies the volumes of one container; `close` on the given stack.

    `batched` if the destination takes many small pieces in one request (`FEATURE`). `check` is called now and then
    while something takes long, and may raise.
    """

    def __init__(
        self,
        container: LeavingContainer,
        stack: ExitStack,
        *,
        batched: bool = True,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self._copies = []
        self._batched = batched
        self._check = check
        for index, volume in enumerate(container.volumes):
            tracker = stack.enter_context(container.track_writes(volume)) if volume.device else None
            descriptor = blocks.open_direct(volume.device or volume.image)
            stack.callback(os.close, descriptor)
            image = os.open(volume.image, os.O_RDONLY | os.O_CLOEXEC)
            stack.callback(os.close, image)
            self._copies.append(_Copy(f"volume/{index}", volume, descriptor, image, tracker))

    def first_pass(self, sender: Sender, bases: Mapping[str, Chunks]) -> Requests:
        """Everything allocated. `bases` are the blocks that targets hold at the destination already."""
        self.sync()
        for copy in self._copies:
            ranges = allocated(copy.volume)
            if base := bases.get(copy.target):
                size = copy.volume.size_bytes
                known = (Range(number * BLOCK_BYTES, (number + 1) * BLOCK_BYTES) for number in base)
                # A hole may begin within a block, and what is left of that could not be compared.
                pieces = copy.read(verify.widened([*ranges, *known], size), with_holes=True)
                yield from self._sent(sender, copy, verify.differing(pieces, base))
            else:
                yield from self._sent(sender, copy, copy.read(ranges))

    def collect(self) -> int:
        """Look at what was written since the last time. Returns the bytes that `requests` would send now."""
        for copy in self._copies:
            copy.left[:] = extents.merge([*copy.left, *copy.dirty(self._check)])
        return sum(extents.total(copy.left) for copy in self._copies)

    def requests(self, sender: Sender) -> Requests:
        """All that was collected and not yet sent."""
        for copy in self._copies:
            ranges = list(copy.left)
            copy.left.clear()
            yield from self._sent(sender, copy, copy.read(ranges))

    def _sent(self, sender: Sender, copy: _Copy, pieces: Iterable[Piece]) -> Requests:
        if self._batched:
            return sender.batches(copy.target, blocks.batches(pieces))
        return sender.requests(copy.target, pieces)

    @property
    def is_quick(self) -> bool:
        """Whether looking at what was written costs next to nothing."""
        return not any(copy.tracker and copy.tracker.reads_all for copy in self._copies)

    def sync(self) -> None:
        """Flush the file systems' dirty pages, so that freezing them has little to write."""
        for copy in self._copies:
            if copy.volume.at is not None:
                filesystem.sync(copy.volume.at)

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of each volume, by target."""
        return {copy.target: copy.volume.size_bytes for copy in self._copies}

    def digests(self) -> Iterator[tuple[str, dict[int, bytes]]]:
        """Target and digests of each volume, read anew as it is now."""
        for copy in self._copies:
            found = {}
            for number, digest in verify.digests(
                copy.descriptor, copy.image, copy.volume.size_bytes, verify.CHUNK_BYTES
            ):
                self._check()
                found[number] = digest
            yield copy.target, found


def allocated(volume: LeavingVolume) -> list[Range]:
    """The parts of the image file that hold data."""
    descriptor = os.open(volume.image, os.O_RDONLY)
    try:
        return list(fiemap.allocated(descriptor, volume.size_bytes))
    finally:
        os.close(descriptor)
