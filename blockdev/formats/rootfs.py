"""Where on a disk the root file system is: the whole disk, or one of its partitions."""

from dataclasses import dataclass

from blockdev.extents import Range
from blockdev.formats import partitions, superblock
from blockdev.formats.disk import Disk
from blockdev.formats.errors import FormatError
from blockdev.formats.superblock import Found

WHOLE_DISK = 0


@dataclass(frozen=True)
class Located:
    """A file system on a disk; partition 0 is the whole disk."""

    partition: int
    part: Range
    found: Found


def locate(disk: Disk, partition: int | None = None) -> Located:
    """The root file system, or the one of this partition. Raises FormatError, which lists what is there.

    Without a wish: the only file system, or the only one in a partition of a type for root file systems.
    """
    table = partitions.read_table(disk.read, disk.size_bytes)
    if partition not in (None, WHOLE_DISK) and partition not in [entry.number for entry in table]:
        there = ", ".join(str(entry.number) for entry in table) or "none"
        raise FormatError(f"the disk has no partition {partition}; it has {there}")
    places = [(entry.number, entry.part) for entry in table if partition in (None, entry.number)]
    if partition == WHOLE_DISK or not table:
        places = [(WHOLE_DISK, Range(0, disk.size_bytes))]
    located = [Located(number, part, found) for number, part in places if (found := _probe(disk, part)) is not None]
    roots = [entry.number for entry in table if entry.is_root]
    if len(located) > 1 and len(marked := [one for one in located if one.partition in roots]) == 1:
        located = marked
    if not located:
        raise FormatError(f"there is no ext4, XFS or btrfs on the disk: {_list(disk, places)}")
    if len(located) > 1:
        choices = ", ".join(f"{one.partition} ({_describe(one)})" for one in located)
        raise FormatError(f"several partitions have file systems, choose one of {choices}")
    (one,) = located
    if one.found.size_bytes > one.part.length:
        raise FormatError(
            f"the {one.found.kind} on it has {one.found.size_bytes} bytes, only {one.part.length} are there: cut off"
        )
    return one


def _probe(disk: Disk, part: Range) -> Found | None:
    return superblock.probe(lambda offset, length: disk.read(part.start + offset, length), part.length)


def _list(disk: Disk, places: list[tuple[int, Range]]) -> str:
    words = []
    for number, part in places:
        other = superblock.describe_other(lambda o, n, part=part: disk.read(part.start + o, n), part.length)  # type: ignore[misc]
        where = f"partition {number}" if number else "the whole disk"
        words.append(f"{where} has {other or 'nothing that is known'}")
    return "; ".join(words) or "it has no partitions"


def _describe(one: Located) -> str:
    label = f" {one.found.label!r}" if one.found.label else ""
    return f"{one.found.kind}{label} of {one.found.size_bytes >> 20} MiB"
