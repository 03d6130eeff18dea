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
