"""The header of a qcow2 image, read before any program is let at it (QEMU docs/interop/qcow2.txt).

An image may name other files, which whoever opens it would read: a backing file, an external data file. From a stranger
that is a way to read this host's files, so these are refused.
"""

import struct
from dataclasses import dataclass

from blockdev.formats.disk import check_size
from blockdev.formats.errors import FormatError

MAGIC = b"QFI\xfb"
HEADER_BYTES = 104

_HEADER = struct.Struct(">4sIQIIQIIQQIIQ")
_KNOWN_INCOMPATIBLE = 0b11011  # dirty, corrupt, compression type, extended L2 entries
_CORRUPT, _DATA_FILE = 0b10, 0b100
_LARGEST_L1_BYTES = 32 << 20


@dataclass(frozen=True)
class Qcow2:
    """What a header that was accepted says."""

    version: int
    size_bytes: int
    cluster_bytes: int


def check_header(head: bytes, name: str) -> Qcow2:
    """Check the first 104 bytes. Raises FormatError."""
    if not head.startswith(MAGIC):
        raise FormatError(f"{name} is no qcow2 image: it begins with {head[:4]!r}")
    if len(head) < HEADER_BYTES:
        raise FormatError(f"{name} is cut off within its header")
    fields = _HEADER.unpack_from(head)
    _, version, backing_at, backing_bytes, cluster_bits, size_bytes, encryption, l1_entries = fields[:8]
    if version not in (2, 3):
        raise FormatError(f"{name} is qcow2 of version {version}: 2 and 3 are understood")
    if backing_at or backing_bytes:
        raise FormatError(
            f"{name} has a backing file, which would be read from this host: make it one file first, with"
            " `qemu-img convert -O qcow2`"
        )
    if encryption:
        raise FormatError(f"{name} is encrypted: decrypt it first")
    incompatible = struct.unpack_from(">Q", head, 72)[0] if version == 3 else 0
    if incompatible & _DATA_FILE:
        raise FormatError(
            f"{name} keeps its data in another file, which would be read from this host: make it one file first, with"
            " `qemu-img convert -O qcow2`"
        )
    if incompatible & _CORRUPT:
        raise FormatError(f"{name} is marked as corrupt: repair a copy with `qemu-img check -r all`")
    if incompatible & ~_KNOWN_INCOMPATIBLE:
        raise FormatError(f"{name} uses features of qcow2 that are not known here ({incompatible:#x})")
    if not 9 <= cluster_bits <= 21:
        raise FormatError(f"{name} has clusters of 2^{cluster_bits} bytes: that cannot be")
    if l1_entries * 8 > _LARGEST_L1_BYTES:
        raise FormatError(f"{name} has a table of {l1_entries} entries: that cannot be")
    check_size(size_bytes, name)
    return Qcow2(version, size_bytes, 1 << cluster_bits)
