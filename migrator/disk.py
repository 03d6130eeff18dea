"""The disk's share of a migration at the source: everything allocated once, then rounds over what was written."""

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field

from blockdev import blocks, extents, filesystem
from blockdev.blocks import Piece
from blockdev.extents import Range
from blockdev.tracker import WriteTracker
from migrator import verify
from migrator.ports import LeavingContainer, LeavingVolume
from migrator.stream import Sender
from migrator.v1 import peer_pb2
from migrator.verify import BLOCK_BYTES, Chunks

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

    def read(self, ranges: Iterable[Range]) -> Iterator[Piece]:
        """What is in the ranges now; the tracker sees what the destination gets."""
        pieces = blocks.read(self.descriptor, ranges, image=self.image)
        return self.tracker.observe(pieces) if self.tracker else pieces

    def dirty(self) -> list[Range]:
        """Written since it was asked last. Cleared first and read afterwards, so a write in between is sent again."""
        return self.tracker.collect() if self.tracker else []


class DiskCopy:
    """Copies the volumes of one container; `close` on the given stack."""

    def __init__(self, container: LeavingContainer, stack: ExitStack) -> None:
        self._copies = []
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
                pieces = copy.read(verify.widened([*ranges, *known], size))
                yield from sender.requests(copy.target, verify.differing(pieces, base))
            else:
                yield from sender.requests(copy.target, copy.read(ranges))

    def collect(self) -> int:
        """Look at what was written since the last time. Returns the bytes that `requests` would send now."""
        for copy in self._copies:
            copy.left[:] = extents.merge([*copy.left, *copy.dirty()])
        return sum(extents.total(copy.left) for copy in self._copies)

    def requests(self, sender: Sender) -> Requests:
        """All that was collected and not yet sent."""
        for copy in self._copies:
            ranges = list(copy.left)
            copy.left.clear()
            yield from sender.requests(copy.target, copy.read(ranges))

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
            found = verify.digests(copy.descriptor, copy.image, copy.volume.size_bytes, verify.CHUNK_BYTES)
            yield copy.target, dict(found)


def allocated(volume: LeavingVolume) -> list[Range]:
    """The parts of the image file that hold data."""
    descriptor = os.open(volume.image, os.O_RDONLY)
    try:
        return list(extents.allocated(descriptor, volume.size_bytes))
    finally:
        os.close(descriptor)
