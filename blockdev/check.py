"""Whether a file system in an image at rest is whole, and repairs. Both change the image: give them a clone."""

import errno
import os
import struct
from pathlib import Path

from blockdev import filesystem, loop, programs
from blockdev.errors import BlockError
from blockdev.programs import ProgramFailed, Running

# Not btrfs: its manual page advises against `btrfs check --repair`.
REPAIRABLE = ("ext4", "xfs")
# How the kernel says, at a mount, that a file system is not what it should be.
_BAD = (errno.EINVAL, errno.EIO, errno.EUCLEAN, errno.EBADMSG, errno.ENODATA)
# e2fsck(8): 1 is "errors corrected", by a replayed journal and the counters that no journal covers.
_CORRECTED = 1
_EXT_SUPERBLOCK_AT, _EXT_CLEAN, _EXT_NEEDS_RECOVERY = 1024, 1, 0x4
_EXT_ORPHAN_PRESENT = 0x10000  # s_feature_ro_compat, Linux 5.15


def check(
    image: Path, kind: str, at: Path, *, block_bytes: int = loop.BLOCK_BYTES, running: Running | None = None
) -> None:
    """Replay the journal of an ext4, XFS or btrfs if there is one to replay, and check everything.

    XFS and btrfs replay theirs by being mounted for a moment, at a folder that is there for it, on a device with blocks
    of this size. Raises ProgramFailed that quotes the checker, OSError if it cannot be mounted, BlockError.
    """
    doing = f"checking the {kind} on {image.name}"
    if kind == "ext4":
        if _is_dirty_ext(image):
            programs.run(["e2fsck", "-f", "-p", str(image)], doing, (0, _CORRECTED), running)
        programs.run(["e2fsck", "-f", "-n", str(image)], doing, running=running)
        return
    mount_once(image, kind, at, block_bytes=block_bytes)
    if kind == "xfs":
        programs.run(["xfs_repair", "-n", "-f", str(image)], doing, running=running)
    else:
        programs.run(["btrfs", "check", "--readonly", str(image)], doing, running=running)


def damage(image: Path, kind: str, at: Path, running: Running | None = None) -> str:
    """What `check` finds to be wrong with the file system; empty if it is whole. Raises BlockError, OSError."""
    try:
        check(image, kind, at, running=running)
    except ProgramFailed as error:
        return str(error).replace(str(image), image.name)
    except OSError as error:
        if error.errno not in _BAD:
            raise
        return f"the {kind} cannot be mounted: {error.strerror}"
    return ""


def repair(image: Path, kind: str, at: Path, running: Running | None = None) -> None:
    """Repair what e2fsck or xfs_repair can, at the cost of what they cannot connect to anything any more.

    An XFS whose log cannot be replayed is left alone: without it, what was written last is lost. Raises BlockError.
    """
    if kind not in REPAIRABLE:
        raise BlockError(f"{kind} cannot be repaired: go back to a snapshot, or copy out what can be read")
    doing = f"repairing the {kind} on {image.name}"
    if kind == "ext4":
        programs.run(["e2fsck", "-f", "-y", str(image)], doing, (0, _CORRECTED), running)
        return
    try:
        mount_once(image, kind, at)
    except OSError as error:
        if error.errno not in _BAD:
            raise
        # xfs_repair itself refuses a log that has something in it.
    programs.run(["xfs_repair", "-f", str(image)], doing, running=running)


def mount_once(image: Path, kind: str, at: Path, *, block_bytes: int = loop.BLOCK_BYTES) -> None:
    """Mount and unmount. Raises OSError, BlockError."""
    device = loop.attach(image, block_bytes=block_bytes)
    try:
        filesystem.mount(device.path, at, kind)
        filesystem.unmount(at)
    finally:
        device.detach()


def _is_dirty_ext(image: Path) -> bool:
    """Whether there is a journal to replay, or files to free that were deleted while they were open."""
    with image.open("rb") as file:
        block = os.pread(file.fileno(), 1024, _EXT_SUPERBLOCK_AT)
    (state,) = struct.unpack_from("<H", block, 0x3A)
    incompatible, read_only = struct.unpack_from("<II", block, 0x60)
    (last_orphan,) = struct.unpack_from("<I", block, 0xE8)
    needs_recovery, has_orphans = incompatible & _EXT_NEEDS_RECOVERY, last_orphan or read_only & _EXT_ORPHAN_PRESENT
    return not state & _EXT_CLEAN or bool(needs_recovery or has_orphans)
