"""Snapshots that move with their container: each is sent as what it does not share with another one.

They are immutable, so they go before the first round, while the container runs. The first is sent whole; each of the
others begins at the destination as a clone of its parent, and so does each volume of the one that the container is at.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from blockdev import blocks, extents, fiemap
from blockdev.extents import Range
from migrator.stream import Sender
from migrator.v1 import container_pb2, peer_pb2

FEATURE = "snapshots-v1"


@dataclass(frozen=True)
class LeavingSnapshot:
    """A snapshot at the source. `parent` is its place in the list of all of them, which has parents before children."""

    name: str
    parent: int | None
    create_time_ms: int
    is_current: bool
    volumes: Sequence[container_pb2.Volume]
    images: Sequence[Path]


class SnapshotCopy:
    """What is sent of the snapshots of one container."""

    def __init__(self, snapshots: Sequence[LeavingSnapshot]) -> None:
        self._snapshots = snapshots
        self._plan: list[tuple[str, Path, list[Range]]] | None = None

    @property
    def described(self) -> list[peer_pb2.PeerSnapshot]:
        """For PrepareRequest."""
        return [
            peer_pb2.PeerSnapshot(
                name=snapshot.name,
                parent=0 if snapshot.parent is None else snapshot.parent + 1,
                base=_base(snapshot, number) + 1,
                create_time_ms=snapshot.create_time_ms,
                is_current=snapshot.is_current,
                volumes=snapshot.volumes,
            )
            for number, snapshot in enumerate(self._snapshots)
        ]

    @property
    def total_bytes(self) -> int:
        """What has to be sent, and takes room at the destination."""
        return sum(extents.total(ranges) for _, _, ranges in self._planned())

    def requests(self, sender: Sender) -> Iterator[peer_pb2.SendRequest]:
        """All of it, bases before what is made of them."""
        for target, image, ranges in self._planned():
            with ExitStack() as stack:
                descriptor = blocks.open_direct(image)
                stack.callback(os.close, descriptor)
                yield from sender.requests(target, blocks.read(descriptor, ranges, image=descriptor))

    def _planned(self) -> list[tuple[str, Path, list[Range]]]:
        if self._plan is None:
            self._plan = [
                (f"snapshot/{number}/{index}", image, self._ranges(_base(snapshot, number), index, image))
                for number, snapshot in enumerate(self._snapshots)
                for index, image in enumerate(snapshot.images)
            ]
        return self._plan

    def _ranges(self, base: int, index: int, image: Path) -> list[Range]:
        with ExitStack() as stack:
            ours, size_bytes = os.open(image, os.O_RDONLY | os.O_CLOEXEC), image.stat().st_size
            stack.callback(os.close, ours)
            if base < 0:
                return list(fiemap.allocated(ours, size_bytes))
            theirs = os.open(self._snapshots[base].images[index], os.O_RDONLY | os.O_CLOEXEC)
            stack.callback(os.close, theirs)
            return fiemap.differing(ours, theirs, size_bytes)


def _base(snapshot: LeavingSnapshot, number: int) -> int:
    """The parent, or of those that have none the first: they may come of one image. -1 for nothing."""
    if snapshot.parent is not None:
        return snapshot.parent
    return 0 if number else -1
