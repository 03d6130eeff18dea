"""Which file system begins at a place, by its superblock: ext2/3/4, XFS and btrfs; others are named if they are known.

Offsets by Linux's Documentation/filesystems/ext4, fs/xfs/libxfs/xfs_format.h and include/uapi/linux/btrfs_tree.h.
"""

import struct
from collections.abc import Callable
from dataclasses import dataclass

from blockdev.formats.errors import FormatError

# What a loop device of ours has; a file system cannot be mounted on larger blocks than its own.
DEVICE_BLOCK_BYTES = 4096

Read = Callable[[int, int], bytes]

_EXT_AT, _BTRFS_AT = 1024, 65536
_EXT_JOURNAL_DEVICE, _EXT_64BIT = 0x8, 0x80
_OTHERS = (
    (0, b"LUKS\xba\xbe", "LUKS encryption"),
    (3, b"NTFS    ", "NTFS"),
    (54, b"FAT", "FAT"),
    (82, b"FAT32", "FAT"),
    (512 + 24, b"LVM2 001", "LVM"),
    (32769, b"CD001", "ISO 9660"),
    (0, b"hsqs", "squashfs"),
    (4096 - 10, b"SWAPSPACE2", "swap"),
    (0x10400, b"\x10\x20\xf5\xf2", "f2fs"),
)


@dataclass(frozen=True)
class Found:
    """A file system; `kind` is what it is mounted as. `sector_bytes` is the largest device block that it bears."""

    kind: str
    size_bytes: int
    sector_bytes: int
    label: str

    @property
    def fits_our_devices(self) -> bool:
        """Whether it can be mounted on a volume as it is."""
        return self.sector_bytes >= DEVICE_BLOCK_BYTES


def probe(read: Read, length: int) -> Found | None:
    """The file system that begins at 0 of `read(offset, length)`, None if there is none of the three kinds.

    Raises FormatError for one whose superblock cannot be right.
    """
    for at, size, parse in ((_EXT_AT, 1024, _ext), (0, 512, _xfs), (_BTRFS_AT, 4096, _btrfs)):
        if at + size <= length:
            found = parse(read(at, size))
            if found is not None:
                return found
    return None


def describe_other(read: Read, length: int) -> str:
    """A name for what is there instead, empty if it is not known."""
    for at, magic, name in _OTHERS:
        if at + len(magic) <= length and read(at, len(magic)) == magic:
            return name
    return ""


def _ext(block: bytes) -> Found | None:
    if block[0x38:0x3A] != b"\x53\xef":
        return None
    (blocks_low,) = struct.unpack_from("<I", block, 0x4)
    (log_block,) = struct.unpack_from("<I", block, 0x18)
    (incompatible,) = struct.unpack_from("<I", block, 0x60)
    (blocks_high,) = struct.unpack_from("<I", block, 0x150)
    if log_block > 6 or incompatible & _EXT_JOURNAL_DEVICE:
        raise FormatError("its ext4 superblock is damaged, or that of a journal device")
    block_bytes = 1024 << log_block
    blocks = blocks_low | (blocks_high << 32 if incompatible & _EXT_64BIT else 0)
    return Found("ext4", blocks * block_bytes, block_bytes, _label(block[0x78:0x88]))


def _xfs(block: bytes) -> Found | None:
    if not block.startswith(b"XFSB"):
        return None
    block_bytes, blocks = struct.unpack_from(">IQ", block, 4)
    (sector_bytes,) = struct.unpack_from(">H", block, 102)
    if block_bytes not in _powers(512, 65536) or sector_bytes not in _powers(512, 32768):
        raise FormatError("its XFS superblock is damaged")
    return Found("xfs", blocks * block_bytes, sector_bytes, _label(block[108:120]))


def _btrfs(block: bytes) -> Found | None:
    if block[0x40:0x48] != b"_BHRfS_M":
        return None
    (total_bytes,) = struct.unpack_from("<Q", block, 0x70)
    (devices,) = struct.unpack_from("<Q", block, 0x88)
    (sector_bytes,) = struct.unpack_from("<I", block, 0x90)
    if sector_bytes not in _powers(512, 65536):
        raise FormatError("its btrfs superblock is damaged")
    if devices != 1:
        raise FormatError(f"it is a btrfs of {devices} devices: only one is understood")
    return Found("btrfs", total_bytes, sector_bytes, _label(block[0x12B:0x22B]))


def _powers(first: int, last: int) -> tuple[int, ...]:
    return tuple(1 << power for power in range(first.bit_length() - 1, last.bit_length()))


def _label(raw: bytes) -> str:
    text = raw.partition(b"\0")[0].decode(errors="replace")
    return "".join(c for c in text if c.isprintable())
