"""Whether a file system in an image that nobody uses is whole. Its journal is replayed, nothing else is repaired."""

import os
import struct
from pathlib import Path

from blockdev import filesystem, loop, programs

# e2fsck(8): 1 is "errors corrected", by a replayed journal and the counters that no journal covers.
_CORRECTED = 1
_EXT_SUPERBLOCK_AT, _EXT_CLEAN, _EXT_NEEDS_RECOVERY = 1024, 1, 0x4


def check(image: Path, kind: str, at: Path, *, block_bytes: int = loop.BLOCK_BYTES) -> None:
    """Replay the journal of an ext4, XFS or btrfs if there is one to replay, and check everything.

    XFS and btrfs replay theirs by being mounted for a moment, at a folder that is there for it, on a device with blocks
    of this size. Raises BlockError that quotes the checker, OSError if it cannot be mounted.
    """
    doing = f"checking the {kind} on {image.name}"
    if kind == "ext4":
        if _is_dirty_ext(image):
            programs.run(["e2fsck", "-f", "-p", str(image)], doing, (0, _CORRECTED))
        programs.run(["e2fsck", "-f", "-n", str(image)], doing)
        return
    mount_once(image, kind, at, block_bytes=block_bytes)
    if kind == "xfs":
        programs.run(["xfs_repair", "-n", "-f", str(image)], doing)
    else:
        programs.run(["btrfs", "check", "--readonly", str(image)], doing)


def mount_once(image: Path, kind: str, at: Path, *, block_bytes: int = loop.BLOCK_BYTES) -> None:
    """Mount and unmount. Raises OSError, BlockError."""
    device = loop.attach(image, block_bytes=block_bytes)
    try:
        filesystem.mount(device.path, at, kind)
        filesystem.unmount(at)
    finally:
        device.detach()


def _is_dirty_ext(image: Path) -> bool:
    with image.open("rb") as file:
        block = os.pread(file.fileno(), 1024, _EXT_SUPERBLOCK_AT)
    (state,) = struct.unpack_from("<H", block, 0x3A)
    (incompatible,) = struct.unpack_from("<I", block, 0x60)
    return not state & _EXT_CLEAN or bool(incompatible & _EXT_NEEDS_RECOVERY)
