"""A block device as the kernel's /sys has it."""

import os
from pathlib import Path

from blockdev.errors import BlockError

# Write trackers tell blocks of this size apart, or on very large devices of a multiple of it.
BLOCK_BYTES = 65536

_SECTOR_BYTES = 512


class Device:
    """A whole block device whose writes are requests to its driver, as those of loop devices, virtual and real disks.

    Raises BlockError for another one, such as a partition or a device-mapper target.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.number = path.stat().st_rdev
        folder = Path(f"/sys/dev/block/{os.major(self.number)}:{os.minor(self.number)}")
        if not path.is_block_device():
            raise BlockError(f"{path} is not a block device: its writes cannot be tracked")
        if not (folder / "mq").is_dir():
            raise BlockError(f"{path} is a partition or a device without requests: its writes cannot be tracked")
        self._size = os.open(folder / "size", os.O_RDONLY | os.O_CLOEXEC)

    def size_bytes(self) -> int:
        """As it is now."""
        return int(os.pread(self._size, 32, 0)) * _SECTOR_BYTES

    def close(self) -> None:
        """Close what was opened to know the size."""
        os.close(self._size)


class Statistics:
    """What the kernel counts of a whole device's writes (Documentation/block/stat.rst); switched on if need be."""

    def __init__(self, number: int) -> None:
        folder = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}")
        switch = folder / "queue/iostats"
        if switch.read_text().strip() == "0":
            switch.write_text("1")
        self._file = os.open(folder / "stat", os.O_RDONLY | os.O_CLOEXEC)

    def read(self) -> tuple[int, int]:
        """Sectors that were written or discarded, and how many requests are under way."""
        fields = os.pread(self._file, 512, 0).split()
        return int(fields[6]) + int(fields[13]), int(fields[8])

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)
