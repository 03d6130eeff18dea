"""File systems on volumes: make, mount, freeze, grow. Programs of e2fsprogs, xfsprogs and btrfs-progs do the making."""

import errno
import fcntl
import os
import subprocess
import time
from pathlib import Path

from blockdev import bounded, kernel
from blockdev.errors import BlockError

KINDS = ("ext4", "xfs", "btrfs")
COMMAND_TIMEOUT_S = 300.0
UNMOUNT_TIMEOUT_S = 10.0
# FIFREEZE writes out all that is dirty.
FREEZE_TIMEOUT_S = 60.0
THAW_TIMEOUT_S = 10.0

# _IOWR('X', 119, int) and _IOWR('X', 120, int) of linux/fs.h
_FIFREEZE, _FITHAW = 0xC0045877, 0xC0045878
_MS_RDONLY = 1

_MAKE = {
    # A large sparse image takes a moment and few bytes. The discard punches holes, so mkfs knows that the inode tables
    # are zeros, and the kernel does not write them in the background later: that would be dirty blocks to send.
    "ext4": ["mkfs.ext4", "-q", "-F", "-b", "4096", "-m", "0", "-E", "lazy_itable_init,lazy_journal_init,discard"],
    # XFS and btrfs cannot be mounted with sectors smaller than the device's.
    "xfs": ["mkfs.xfs", "-q", "-f", "-K", "-s", "size=4096"],
    "btrfs": ["mkfs.btrfs", "-q", "-f", "-K", "-m", "single", "-s", "4096"],
}
_GROW = {
    "xfs": ["xfs_growfs"],
    "btrfs": ["btrfs", "filesystem", "resize", "max"],
}
# A clone has the file system identity of its image; both may be mounted at once: btrfs allows it from Linux 6.7 on.
_OPTIONS = {"ext4": "", "xfs": "nouuid", "btrfs": ""}


def make(target: Path, kind: str, *, label: str = "") -> None:
    """Make an empty file system on an image file or a device."""
    command = [*_MAKE[_known(kind)], *(["-L", label] if label else []), str(target)]
    _run(command, f"making {kind} on {target}")


def mount(device: Path, at: Path, kind: str, *, read_only: bool = False) -> None:
    """Mount with device files allowed: a container's own are made in its root. Raises OSError, BlockError."""
    try:
        kernel.mount(device, at, _known(kind), _MS_RDONLY if read_only else 0, _OPTIONS[kind])
    except OSError as error:
        if kind == "btrfs" and error.errno == errno.EEXIST:
            raise BlockError(
                f"{device}: a btrfs with the same UUID is mounted already (its image, or another clone): Linux 6.7 or"
                " newer allows that, or use xfs or ext4"
            ) from error
        raise


def mounted_source(at: Path) -> str:
    """What is mounted last at this place, by /proc/self/mountinfo (proc_pid_mountinfo(5)); empty if nothing is."""
    source = ""
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        before, _, after = line.partition(" - ")
        if before.split(" ")[4] == str(at):
            source = after.split(" ")[1]
    return source


def is_mounted(at: Path) -> bool:
    """Whether this is a mount point, also that of a file system that has shut down, of which stat(2) says nothing."""
    try:
        at.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return mounted_source(at) != ""
    return os.path.ismount(at)


def unmount(at: Path, timeout_s: float = UNMOUNT_TIMEOUT_S) -> None:
    """Unmount; waits while it is busy. Raises BlockError if it still is at the end."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            kernel.umount(at)
            return
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise
            if time.monotonic() > deadline:
                raise BlockError(f"{at} is still in use after {timeout_s:g} s: see fuser -vm {at}") from error
        time.sleep(0.005)


def freeze(at: Path, timeout_s: float = FREEZE_TIMEOUT_S) -> bool:
    """Write out everything and stop writes (FIFREEZE). False if it is frozen already.

    It hangs while a task is in the middle of a write, and nothing can end that. Raises `bounded.Overdue` then; should
    it still be frozen later it is thawed at once. Raises OSError.
    """
    return bounded.call(at, "FIFREEZE", lambda: _freeze(at), timeout_s, undo=lambda: _thaw(at))


def thaw(at: Path, timeout_s: float = THAW_TIMEOUT_S) -> bool:
    """Let writes go on (FITHAW). False if it was not frozen, or has shut down. Raises `bounded.Overdue`, OSError."""
    return bounded.call(at, "FITHAW", lambda: _thaw(at), timeout_s, undo=lambda: None)


def sync(at: Path) -> None:
    """Write out what is dirty, while it is in use."""
    descriptor = os.open(at, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        kernel.syncfs(descriptor, str(at))
    finally:
        os.close(descriptor)


def grow_image(image: Path) -> None:
    """Let an ext4 in an image file that is at rest take all of the file: done mounted it needs CAP_SYS_RESOURCE."""
    _run(["resize2fs", "-f", str(image)], f"growing {image}")


def grow(at: Path, kind: str) -> None:
    """Let a mounted XFS or btrfs take all of its device."""
    _run([*_GROW[kind], str(at)], f"growing {kind} at {at}")


def _freeze(at: Path) -> bool:
    return _freezer(at, _FIFREEZE, "FIFREEZE", errno.EBUSY)


def _thaw(at: Path) -> bool:
    try:
        return _freezer(at, _FITHAW, "FITHAW", errno.EINVAL)
    except OSError as error:
        # An XFS that has met an I/O error cannot even be opened any more, only unmounted.
        if error.errno == errno.EIO:
            return False
        raise


def _freezer(at: Path, call: int, name: str, nothing_to_do: int) -> bool:
    descriptor = os.open(at, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.ioctl(descriptor, call, 0)
    except OSError as error:
        if error.errno == nothing_to_do:
            return False
        raise OSError(error.errno, f"{name}: {error.strerror}", str(at)) from error
    finally:
        os.close(descriptor)
    return True


def _known(kind: str) -> str:
    if kind not in KINDS:
        raise BlockError(f"file system {kind!r} is not one of {', '.join(KINDS)}")
    return kind


def _run(command: list[str], doing: str) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BlockError(f"{doing}: {error}") from error
    if done.returncode != 0:
        raise BlockError(f"{doing}: {command[0]} exited with code {done.returncode}: {done.stderr.strip()}")
