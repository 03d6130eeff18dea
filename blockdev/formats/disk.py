"""A disk as its reader sees it, whatever file format it is kept in."""

import fcntl
import os
import stat
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

from blockdev import extents, fiemap
from blockdev.extents import Range
from blockdev.formats.errors import FormatError

# The largest disk that is believed; ext4 and XFS on ploop never had more than 16 TiB.
LARGEST_BYTES = 64 << 40
PIECE_BYTES = 1 << 20
BLOCK_BYTES = 64 << 10

_FICLONERANGE = 0x4020940D  # _IOW(0x94, 13, struct file_clone_range) of linux/fs.h
_ZEROS = bytes(PIECE_BYTES)


class Disk(Protocol):
    """The bytes of a whole disk."""

    @property
    def size_bytes(self) -> int: ...

    def read(self, offset: int, length: int) -> bytes:
        """Exactly these bytes, zeros where nothing was ever written. Raises FormatError outside of the disk."""

    def ranges(self, start: int, end: int) -> Iterator[Range]:
        """The parts of start..end, in order, that may hold anything but zeros."""


class RawDisk:
    """A file that holds the disk byte by byte. The descriptor stays the caller's."""

    def __init__(self, descriptor: int, name: str, size_bytes: int | None = None) -> None:
        self.descriptor = descriptor
        self._name = name
        self._size_bytes = os.fstat(descriptor).st_size if size_bytes is None else size_bytes
        check_size(self._size_bytes, name)

    @property
    def size_bytes(self) -> int:
        return self._size_bytes

    def read(self, offset: int, length: int) -> bytes:
        return read_exactly(self.descriptor, offset, length, self._name)

    def ranges(self, start: int, end: int) -> Iterator[Range]:
        return fiemap.allocated(self.descriptor, min(end, self._size_bytes), start)


def check_size(size_bytes: int, name: str) -> None:
    """Raises FormatError for a disk that cannot be."""
    if not 512 <= size_bytes <= LARGEST_BYTES:
        raise FormatError(f"{name} is a disk of {size_bytes} bytes: that cannot be")


def open_file(name: str, folder: int | None = None) -> int:
    """A descriptor of a regular file, not reached through a link in its last part. Raises FormatError."""
    try:
        descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
    except OSError as error:
        raise FormatError(f"{name} cannot be opened: {error.strerror}") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise FormatError(f"{name} is not a regular file")
    return descriptor


def read_exactly(descriptor: int, offset: int, length: int, name: str) -> bytes:
    """All of it. Raises FormatError if the file ends before."""
    data = os.pread(descriptor, length, offset)
    while len(data) < length:
        more = os.pread(descriptor, length - len(data), offset + len(data))
        if not more:
            raise FormatError(f"{name} is cut off: it ends at byte {offset + len(data)}, inside what it should hold")
        data += more
    return data


def copy(disk: Disk, part: Range, target: Path, check: Callable[[], None] = lambda: None) -> None:
    """Copy a part of a disk to the start of a sparse file: zeros become holes, and blocks are shared where they can be.

    The target is there, all zeros, and as long as it should be. `check` is called between pieces and may raise.
    """
    with target.open("r+b") as file:
        if isinstance(disk, RawDisk) and _reflinked(disk.descriptor, part, file.fileno()):
            return
        for piece in extents.pieces(disk.ranges(part.start, part.end), PIECE_BYTES):
            check()
            data = disk.read(piece.start, piece.length)
            if data == _ZEROS[: len(data)]:
                continue
            for at in range(0, len(data), BLOCK_BYTES):
                block = data[at : at + BLOCK_BYTES]
                if block != _ZEROS[: len(block)]:
                    _write(file.fileno(), block, piece.start - part.start + at)


def _write(descriptor: int, data: bytes, offset: int) -> None:
    while data:
        written = os.pwrite(descriptor, data, offset)
        data, offset = data[written:], offset + written


def _reflinked(source: int, part: Range, target: int) -> bool:
    """Share the blocks (ioctl_ficlonerange(2)). False if these two files or this range cannot."""
    try:
        fcntl.ioctl(target, _FICLONERANGE, struct.pack("=qQQQ", source, part.start, part.length, 0))
    except OSError:
        # Another file system, one without reflinks, or a part that is not aligned to its blocks: all are ordinary.
        return False
    return True
