"""Making volumes larger and smaller: larger under a running container, smaller only while nobody uses them.

At rest the work is done on a clone which then takes the volume's place, so that a crash in the middle costs nothing.
"""

import os
from contextlib import suppress
from pathlib import Path

from blockdev import durable, filesystem, programs, reflink
from blockdev.errors import BlockError
from blockdev.volume import MOUNT, UNFINISHED, MountedVolume, Volume

ALIGN_BYTES = 4096
SHRINKABLE = ("ext4", "btrfs")
_CAP_SYS_RESOURCE = 24


def may_grow_mounted(kind: str) -> bool:
    """Whether this process may: the kernel lets only CAP_SYS_RESOURCE grow a mounted ext4 (ext4_resize_begin)."""
    if kind != "ext4":
        return True
    status = Path("/proc/self/status").read_text()
    (effective,) = (line.split()[1] for line in status.splitlines() if line.startswith("CapEff:"))
    return bool(int(effective, 16) >> _CAP_SYS_RESOURCE & 1)


def grow_mounted(volume: Volume, mounted: MountedVolume, size_bytes: int) -> None:
    """Grow file, device and file system of a volume in use; repeatable, also after it was broken off.

    Raises BlockError, OSError. What has grown stays so: a file system that is smaller than its device does no harm.
    """
    if size_bytes > volume.size_bytes:
        os.truncate(volume.path, size_bytes)
    mounted.device.refresh_size()
    if volume.kind == "ext4":
        programs.run(["resize2fs", str(mounted.device.path)], f"growing {volume.path.name}")
    else:
        filesystem.grow(mounted.at, volume.kind)


def resize_at_rest(volume: Volume, size_bytes: int) -> None:
    """Give a volume that is not attached another size. Raises BlockError, and then it is as it was."""
    clone = Volume(volume.path.with_name(volume.path.name + UNFINISHED), volume.kind)
    with suppress(FileNotFoundError):
        clone.path.unlink()
    reflink.clone(volume.path, clone.path)
    try:
        if size_bytes > volume.size_bytes:
            os.truncate(clone.path, size_bytes)
            _fit(clone, size_bytes)
        else:
            _fit(clone, size_bytes)
            os.truncate(clone.path, size_bytes)
        durable.sync(clone.path)
        clone.path.rename(volume.path)
    except BaseException:
        clone.path.unlink(missing_ok=True)
        raise
    # Else a power cut brings the old file back, without what the container has written since.
    durable.sync(volume.path.parent)


def _fit(volume: Volume, size_bytes: int) -> None:
    """Let the file system take this much of its image."""
    doing = f"resizing {volume.path.name.removesuffix(UNFINISHED)}"
    if volume.kind == "ext4":
        programs.run(["e2fsck", "-f", "-p", str(volume.path)], doing, (0, 1))
        programs.run(["resize2fs", str(volume.path), f"{size_bytes // 1024}K"], doing)
        return
    if volume.kind == "xfs" and size_bytes < volume.size_bytes:
        raise BlockError(f"{doing}: XFS cannot be made smaller")
    at = volume.path.with_name(volume.path.name + MOUNT)
    at.mkdir()
    try:
        mounted = volume.mount(at)
        try:
            if volume.kind == "btrfs":
                programs.run(["btrfs", "filesystem", "resize", str(size_bytes), str(at)], doing)
            else:
                filesystem.grow(at, volume.kind)
        finally:
            mounted.unmount()
    finally:
        at.rmdir()
