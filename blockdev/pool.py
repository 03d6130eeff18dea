"""A folder whose files can be cloned: the state folder itself, or a sparse XFS file mounted in it."""

import os
from dataclasses import dataclass
from pathlib import Path

from blockdev import durable, filesystem, loop, reflink
from blockdev.errors import BlockError

FILE = "pool.img"
FOLDER = "pool"
# Kept free for what volumes have in flight: this part of the pool, and no more than so much.
RESERVE_PART, LARGEST_RESERVE_BYTES = 20, 1 << 30
MINIMUM_BYTES = 300 << 20  # mkfs.xfs makes none smaller


def ensure(state_dir: Path, size_bytes: int) -> Path:
    """The pool of a state folder, made or adopted as it is found."""
    image, folder = state_dir / FILE, state_dir / FOLDER
    if not image.exists() and reflink.supported(state_dir):
        return state_dir
    folder.mkdir(mode=0o700, exist_ok=True)
    if filesystem.is_mounted(folder):
        return folder
    if not image.exists():
        _make(image, size_bytes)
    devices = loop.find(image)
    device = devices[0] if devices else loop.attach(image)
    try:
        filesystem.mount(device.path, folder, "xfs")
    except OSError:
        device.detach()
        raise
    return folder


def close(state_dir: Path) -> None:
    """Unmount and detach the pool file, if there is one; repeatable."""
    image, folder = state_dir / FILE, state_dir / FOLDER
    if filesystem.is_mounted(folder):
        filesystem.unmount(folder)
    if image.exists():
        for device in loop.find(image):
            device.detach()


def _make(image: Path, size_bytes: int) -> None:
    if size_bytes < MINIMUM_BYTES:
        raise BlockError(f"a pool of {size_bytes} bytes is too small: at least {MINIMUM_BYTES}")
    unfinished = image.with_suffix(".new")
    unfinished.unlink(missing_ok=True)
    with unfinished.open("xb") as file:
        os.truncate(file.fileno(), size_bytes)
    filesystem.make(unfinished, "xfs")
    durable.sync(unfinished)
    unfinished.rename(image)
    durable.sync(image.parent)


@dataclass(frozen=True)
class Room:
    """What a pool has left, in bytes. `free_bytes` counts what the file system under a pool file can still give."""

    free_bytes: int
    reserve_bytes: int

    @property
    def available_bytes(self) -> int:
        """What may be taken at will: the reserve, and as much again, are for what is written to volumes."""
        return max(0, self.free_bytes - 2 * self.reserve_bytes)


def room(folder: Path) -> Room:
    """Of the pool that this folder is, or is in."""
    status = os.statvfs(folder)
    free_bytes, total_bytes = status.f_bavail * status.f_frsize, status.f_blocks * status.f_frsize
    for top in (folder, *folder.parents):
        # A pool file is sparse: without room under it, its file system gets I/O errors where it has room itself.
        if top.name == FOLDER and (top.parent / FILE).exists():
            below = os.statvfs(top.parent)
            free_bytes = min(free_bytes, below.f_bavail * below.f_frsize)
    return Room(free_bytes, min(LARGEST_RESERVE_BYTES, total_bytes // RESERVE_PART))
