"""Loop devices: an image file as a block device, with direct I/O and logical blocks of 4096 bytes.

Set up by one LOOP_CONFIGURE (Linux 5.8, include/uapi/linux/loop.h), so that no one sees a half-configured device.
"""

import errno
import fcntl
import os
import stat
import struct
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from blockdev.errors import BlockError

BLOCK_BYTES = 4096
ATTACH_TRIES = 50
RELEASE_TIMEOUT_S = 10.0

_LOOP_CLR_FD, _LOOP_GET_STATUS64, _LOOP_SET_CAPACITY = 0x4C01, 0x4C05, 0x4C07
_LOOP_CONFIGURE, _LOOP_CTL_GET_FREE = 0x4C0A, 0x4C82
_READ_ONLY, _DIRECT_IO = 1, 16
_MAJOR = 7
# struct loop_info64: device, inode, rdevice, offset, size limit (u64 each), then number, two types, key size, flags.
_INFO = struct.Struct("=5Q5I64s64s32s2Q")
_CONFIG = struct.Struct(f"=II{_INFO.size}s8Q")


@dataclass(frozen=True)
class LoopDevice:
    """An attached loop device."""

    path: Path
    number: int

    @property
    def direct_io(self) -> bool:
        """Whether the kernel really goes past the page cache of the image's file system."""
        return Path(f"/sys/block/loop{self.number}/loop/dio").read_text().strip() == "1"

    @property
    def block_bytes(self) -> int:
        """Of its logical blocks."""
        return int(Path(f"/sys/block/loop{self.number}/queue/logical_block_size").read_text())

    def is_mounted(self) -> bool:
        """Whether a mount, in whichever mount namespace, or another exclusive user has it."""
        try:
            os.close(os.open(self.path, os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC))
        except OSError as error:
            if error.errno == errno.EBUSY:
                return True
            raise
        return False

    def refresh_size(self) -> None:
        """Take over the image file's size after it has changed."""
        with _opened(self.path) as device:
            fcntl.ioctl(device, _LOOP_SET_CAPACITY, 0)

    def detach(self) -> None:
        """Release the device and wait until that is done: a user that still has it open keeps it until it closes."""
        deadline = time.monotonic() + RELEASE_TIMEOUT_S
        folder = Path(f"/sys/block/loop{self.number}")
        # Another number means that it is attached anew, by someone who waited for one to be free (Linux 5.15).
        attachment = (folder / "diskseq").read_text()
        with _opened(self.path) as device:
            try:
                fcntl.ioctl(device, _LOOP_CLR_FD, 0)
            except OSError as error:
                if error.errno != errno.ENXIO:
                    raise OSError(error.errno, f"LOOP_CLR_FD: {error.strerror}", str(self.path)) from error
        while (folder / "loop").exists() and (folder / "diskseq").read_text() == attachment:
            if time.monotonic() > deadline:
                raise BlockError(f"{self.path} is still in use {RELEASE_TIMEOUT_S:g} s after it was detached")
            time.sleep(0.001)


def attach(image: Path, *, read_only: bool = False, block_bytes: int = BLOCK_BYTES) -> LoopDevice:
    """Attach an image file to a free loop device. Raises BlockError if no device can be had, OSError.

    Smaller blocks are for a file system that was made for them, to look into it: they may cost direct I/O.
    """
    mode = os.O_RDONLY if read_only else os.O_RDWR
    backing = os.open(image, mode | os.O_DIRECT | os.O_CLOEXEC)
    try:
        for _ in range(ATTACH_TRIES):
            with _opened(Path("/dev/loop-control")) as control:
                number = fcntl.ioctl(control, _LOOP_CTL_GET_FREE)
            path = _node(number)
            if _configure(path, mode, backing, image, block_bytes, read_only=read_only):
                return LoopDevice(path, number)
    finally:
        os.close(backing)
    raise BlockError(f"no free loop device for {image} after {ATTACH_TRIES} tries: see losetup -l")


def find(image: Path) -> list[LoopDevice]:
    """All devices that this very file is attached to."""
    return [device for _, device in find_all([image])]


def find_all(images: Iterable[Path]) -> list[tuple[Path, LoopDevice]]:
    """All devices that these very files are attached to, by device and inode: the names that sysfs has for a file are
    those of some mount namespace, not of ours."""
    wanted = {}
    for image in images:
        status = image.stat()
        wanted[_kernel_device(status.st_dev), status.st_ino] = image
    found = []
    for folder in Path("/sys/block").glob("loop*/loop"):
        number = int(folder.parent.name.removeprefix("loop"))
        try:
            with _opened(_node(number)) as device:
                info = _INFO.unpack(fcntl.ioctl(device, _LOOP_GET_STATUS64, bytes(_INFO.size)))
        except OSError as error:
            if error.errno in (errno.ENXIO, errno.ENOENT):
                continue  # detached meanwhile
            raise
        if (image_of := wanted.get((info[0], info[1]))) is not None:
            found.append((image_of, LoopDevice(_node(number), number)))
    return found


def _configure(path: Path, mode: int, backing: int, image: Path, block_bytes: int, *, read_only: bool) -> bool:
    """Whether the device was still free and is ours now."""
    flags = _DIRECT_IO | (_READ_ONLY if read_only else 0)
    name = os.fsencode(image)[-63:]
    info = _INFO.pack(0, 0, 0, 0, 0, 0, 0, 0, 0, flags, name, b"", b"", 0, 0)
    device = os.open(path, mode | os.O_CLOEXEC)
    try:
        fcntl.ioctl(device, _LOOP_CONFIGURE, _CONFIG.pack(backing, block_bytes, info, *[0] * 8))
    except OSError as error:
        if error.errno == errno.EBUSY:
            return False
        raise OSError(error.errno, f"LOOP_CONFIGURE: {error.strerror}", str(image)) from error
    finally:
        os.close(device)
    return True


def _node(number: int) -> Path:
    """The device's node, made if nobody else makes it (there is no udev in a container)."""
    path = Path(f"/dev/loop{number}")
    if not path.exists():
        try:
            os.mknod(path, 0o660 | stat.S_IFBLK, os.makedev(_MAJOR, number))
        except FileExistsError:
            return path
    return path


def _kernel_device(device: int) -> int:
    """A device number as the kernel's loop driver reports it (new_encode_dev)."""
    major, minor = os.major(device), os.minor(device)
    return (minor & 0xFF) | (major << 8) | ((minor & ~0xFF) << 12)


class _opened:
    """A descriptor for the time of a block, good for every request that CAP_SYS_ADMIN may make.

    Not for writing: udev looks into a device again whenever somebody closes it who could have written to it, and who
    looks for one device asks all of the host.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> int:
        self._descriptor = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
        return self._descriptor

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)
