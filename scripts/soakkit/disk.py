"""A disk with a tracker on it, and a replica of it."""

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from blockdev import blocks, fiemap, filesystem, loop
from blockdev.bpf_tracker import BpfTracker
from blockdev.comparing_tracker import ComparingTracker
from blockdev.extents import Range
from blockdev.tracker import WriteTracker

# By device and image.
TRACKERS: dict[str, Callable[[Path, Path], WriteTracker]] = {
    "ebpf": lambda device, _: BpfTracker(device),
    "comparing": ComparingTracker,
}
_PART_BYTES = 1 << 24


@dataclass(frozen=True)
class Disk:
    """An attached image, its tracker, and a replica that is brought up to date by what the tracker reports."""

    device: loop.LoopDevice
    tracker: WriteTracker
    source: int
    image: int
    replica: int

    @property
    def size_bytes(self) -> int:
        """Of the image."""
        return os.fstat(self.image).st_size

    def copy(self, ranges: list[Range]) -> list[Range]:
        """Bring these ranges of the replica up to date."""
        size = self.size_bytes
        if os.fstat(self.replica).st_size != size:
            os.truncate(self.replica, size)
        for piece in self.tracker.observe(blocks.read(self.source, ranges, image=self.image)):
            blocks.write(self.replica, piece, size)
        return ranges

    def first(self) -> None:
        """Start the tracker, and copy everything."""
        self.tracker.start()
        self.copy(list(fiemap.allocated(self.image, self.size_bytes)))

    def round(self) -> list[Range]:
        """Collect and copy."""
        return self.copy(self.tracker.collect())

    def grow(self, by_bytes: int) -> None:
        """The device, not what is on it."""
        os.truncate(self.image, self.size_bytes + by_bytes)
        self.device.refresh_size()

    def equal(self) -> bool:
        """By digest. Of the image: the device's own page cache may have what a file system threw away."""
        return _digest(self.image) == _digest(self.replica)


@contextmanager
def open_disk(folder: Path, name: str, size_bytes: int, tracker: str, kind: str = "") -> Iterator[Disk]:
    """A new disk, with an empty file system of that kind, and an empty replica. The tracker has not been started."""
    image, replica = folder / f"{name}.img", folder / f"{name}.replica"
    with ExitStack() as stack:

        def opened(path: Path, flags: int) -> int:
            descriptor = os.open(path, flags)
            stack.callback(os.close, descriptor)
            return descriptor

        for path in (image, replica):
            with path.open("xb") as file:
                stack.callback(path.unlink)
                os.truncate(file.fileno(), size_bytes)
        if kind:
            filesystem.make(image, kind)
        device = loop.attach(image)
        stack.callback(device.detach)
        yield Disk(
            device,
            stack.enter_context(closing(TRACKERS[tracker](device.path, image))),
            opened(device.path, os.O_RDWR | os.O_DIRECT),
            opened(image, os.O_RDWR),
            opened(replica, os.O_RDWR),
        )


def _digest(descriptor: int) -> str:
    digest, at = hashlib.blake2b(), 0
    while part := os.pread(descriptor, _PART_BYTES, at):
        digest.update(part)
        at += len(part)
    return digest.hexdigest()
