"""One delta of a ploop image: a header, a table of clusters, and the clusters.

The format is that of Parallels disks (QEMU docs/interop/parallels.txt; ploop1_image.h of OpenVZ's ploop). Version 1
counts the places of clusters in sectors, version 2 in clusters; 0 is a cluster that this delta does not have.
"""

import struct
import sys
from array import array
from collections.abc import Iterator
from dataclasses import dataclass

from blockdev.formats.disk import check_size, read_exactly
from blockdev.formats.errors import FormatError

SECTOR_BYTES = 512
HEADER = struct.Struct("<16s5IQIIIQ")
MAGIC_V1, MAGIC_V2 = b"WithoutFreeSpace", b"WithouFreSpacExt"
TYPE_COMPRESSED = 2
IN_USE = 0x746F6E59
CLOSED = (0, 0x312E3276)
FLAG_CONVERTING = 2
CLUSTER_SECTORS = tuple(1 << power for power in range(3, 18))
# 16 TiB in clusters of 1 MiB: a table of 64 MiB.
MOST_ENTRIES = 1 << 24
# Of a file, whatever part of them is used: a byte of memory for each while it is checked.
MOST_CLUSTERS = 1 << 27


@dataclass(frozen=True)
class Delta:
    """Where a delta keeps its clusters; `entries` are cluster numbers within the file, 0 for none."""

    name: str
    descriptor: int
    version: int
    cluster_bytes: int
    size_bytes: int
    entries: "array[int]"

    def offset(self, cluster: int) -> int | None:
        """Where this cluster of the disk is in the file; None if the delta does not have it."""
        entry = self.entries[cluster] if cluster < len(self.entries) else 0
        return entry * self.cluster_bytes if entry else None

    def allocated(self) -> Iterator[int]:
        """The clusters of the disk that the delta has."""
        return (cluster for cluster, entry in enumerate(self.entries) if entry)


def is_delta(head: bytes) -> bool:
    """Whether a file that begins so is a ploop delta."""
    return head.startswith((MAGIC_V1, MAGIC_V2))


def read_delta(descriptor: int, file_bytes: int, name: str) -> Delta:
    """Read and check header and table. Raises FormatError."""
    fields = HEADER.unpack(read_exactly(descriptor, 0, HEADER.size, name))
    magic, kind, _heads, _cylinders, cluster_sectors, count, sectors, in_use, data_sector, flags, _extension = fields
    if magic not in (MAGIC_V1, MAGIC_V2):
        raise FormatError(f"{name} is no ploop image: it begins with {magic!r}")
    version = 1 if magic == MAGIC_V1 else 2
    if version == 1:
        sectors &= 0xFFFFFFFF
    if kind != TYPE_COMPRESSED:
        raise FormatError(f"{name} is a ploop image of type {kind}: only type 2 is known")
    if cluster_sectors not in CLUSTER_SECTORS:
        raise FormatError(f"{name} has clusters of {cluster_sectors} sectors: that cannot be")
    cluster_bytes = cluster_sectors * SECTOR_BYTES
    check_size(sectors * SECTOR_BYTES, name)
    needed = -(-sectors // cluster_sectors)
    if not needed <= count <= MOST_ENTRIES:
        raise FormatError(f"{name} has a table of {count} clusters for a disk of {needed}")
    _check_closed(name, in_use, flags)
    table_end = HEADER.size + count * 4
    data_bytes = data_sector * SECTOR_BYTES or -(-table_end // cluster_bytes) * cluster_bytes
    if data_bytes < table_end or data_bytes % cluster_bytes:
        raise FormatError(f"{name} says that its data begins at byte {data_bytes}, in its table or within a cluster")
    entries = array("I", read_exactly(descriptor, HEADER.size, count * 4, name))
    if sys.byteorder == "big":
        entries.byteswap()
    if version == 1:
        _to_clusters(name, entries, cluster_sectors)
    _check_entries(name, entries, data_bytes // cluster_bytes, file_bytes // cluster_bytes)
    return Delta(name, descriptor, version, cluster_bytes, sectors * SECTOR_BYTES, entries)


def _check_closed(name: str, in_use: int, flags: int) -> None:
    if in_use == IN_USE:
        raise FormatError(
            f"{name} was not closed: stop the container that uses it, or if none does any more, repair a copy with"
            f" `qemu-img check -f parallels -r all {name}`"
        )
    if in_use not in CLOSED:
        raise FormatError(f"{name} has an unknown mark of use: {in_use:#x}")
    if flags & FLAG_CONVERTING:
        raise FormatError(f"{name} is between two versions of its format: let `ploop check` finish the conversion")


def _to_clusters(name: str, entries: "array[int]", cluster_sectors: int) -> None:
    for cluster, entry in enumerate(entries):
        if entry:
            number, rest = divmod(entry, cluster_sectors)
            if rest:
                raise FormatError(f"{name}: cluster {cluster} is at sector {entry}, which is no cluster's begin")
            entries[cluster] = number


def _check_entries(name: str, entries: "array[int]", first: int, end: int) -> None:
    if end > MOST_CLUSTERS:
        raise FormatError(f"{name} is long enough for {end} clusters, and its table has {len(entries)}: that cannot be")
    seen = bytearray(end)
    for cluster, entry in enumerate(entries):
        if entry:
            if not first <= entry < end:
                raise FormatError(
                    f"{name}: cluster {cluster} is at cluster {entry} of the file, which has data in {first} to {end}:"
                    " it is cut off or damaged"
                )
            if seen[entry]:
                raise FormatError(f"{name}: cluster {entry} of the file is used twice")
            seen[entry] = 1
