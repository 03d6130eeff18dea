"""The disk's share of a migration at the source: everything allocated once, then rounds over what was written."""

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from blockdev import blocks, extents, filesystem
from blockdev.extents import Range
from blockdev.tracker import WriteTracker
from migrator import rounds, verify
from migrator.ports import LeavingContainer, LeavingVolume
from migrator.rounds import Round
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

    def run_rounds(
        self, send: Callable[[Requests], None], sender: Sender, bases: Mapping[str, Chunks], waiting: Callable[[], int]
    ) -> list[Round]:
        """The first pass over everything allocated, and rounds while they shrink. What is left is for `last`.

        `bases` are the blocks that targets hold at the destination already; `waiting` tells how many bytes the
        container has written that are still to come to its volumes.
        """
        self.sync()
        ranges = [allocated(copy.volume) for copy in self._copies]
        requests = self._first_pass(sender, ranges, bases)
        done: list[Round] = []
        while True:
            began = time.monotonic()
            send(requests)
            done.append(Round(sum(map(extents.total, ranges)), time.monotonic() - began))
            self.sync()
            self._left = [copy.dirty() for copy in self._copies]
            if not rounds.another(done, sum(map(extents.total, self._left)) + waiting()):
                return done
            ranges = self._left
            requests = self._requests(sender, ranges)

    def last(self, sender: Sender) -> Requests:
        """What `run_rounds` has left and what was written since; to be called with the file systems frozen."""
        ranges = [extents.merge([*left, *copy.dirty()]) for left, copy in zip(self._left, self._copies, strict=True)]
        return self._requests(sender, ranges)

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

    def _first_pass(self, sender: Sender, ranges: Sequence[Sequence[Range]], bases: Mapping[str, Chunks]) -> Requests:
        for copy, allocated_ranges in zip(self._copies, ranges, strict=True):
            base = bases.get(copy.target)
            if not base:
                yield from sender.requests(
                    copy.target, blocks.read(copy.descriptor, allocated_ranges, image=copy.image)
                )
                continue
            size = copy.volume.size_bytes
            known = (Range(number * BLOCK_BYTES, (number + 1) * BLOCK_BYTES) for number in base)
            wanted = verify.widened([*allocated_ranges, *known], size)
            pieces = blocks.read(copy.descriptor, wanted, image=copy.image)
            yield from sender.requests(copy.target, verify.differing(pieces, base))

    def _requests(self, sender: Sender, ranges: Sequence[Sequence[Range]]) -> Requests:
        for copy, wanted in zip(self._copies, ranges, strict=True):
            yield from sender.requests(copy.target, blocks.read(copy.descriptor, wanted, image=copy.image))


def allocated(volume: LeavingVolume) -> list[Range]:
    """The parts of the image file that hold data."""
    descriptor = os.open(volume.image, os.O_RDONLY)
    try:
        return list(extents.allocated(descriptor, volume.size_bytes))
    finally:
        os.close(descriptor)
