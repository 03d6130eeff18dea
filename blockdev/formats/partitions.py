"""Partition tables: GPT (UEFI specification, chapter 5) and MBR with its chain of logical partitions."""

import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass

from blockdev.extents import Range
from blockdev.formats.errors import FormatError

SECTOR_BYTES = 512
MOST_PARTITIONS = 128
LARGEST_TABLE_BYTES = 128 << 10

Read = Callable[[int, int], bytes]

_EXTENDED = (0x05, 0x0F, 0x85)
_PROTECTIVE = 0xEE
_HEADER = struct.Struct("<8s4I4Q16sQ3I")
_SIGNATURE = b"EFI PART"
# The types for a root file system of the Discoverable Partitions Specification: x86-64, x86, arm64, arm.
_ROOTS = (
    "4f68bce3-e8cd-4db1-96e7-fbcaf984b709",
    "44479540-f297-41b2-9af7-d131d5f0458a",
    "b921b045-1df0-41c3-af44-4c6f280d3fae",
    "69dad710-2ce4-4e3c-b16c-21a1d49abed3",
)


@dataclass(frozen=True)
class Partition:
    """One partition; numbers are those that Linux gives."""

    number: int
    part: Range
    is_root: bool = False


def read_table(read: Read, size_bytes: int) -> list[Partition]:
    """The partitions of a disk by their numbers; none if there is no table. Raises FormatError for a damaged one."""
    if size_bytes < 3 * SECTOR_BYTES:
        return []
    sector = read(0, SECTOR_BYTES)
    has_mbr = sector[510:512] == b"\x55\xaa"
    entries = _entries(sector) if has_mbr else []
    if any(kind == _PROTECTIVE for kind, _, _ in entries) or _is_gpt(read):
        return _checked(_gpt(read, size_bytes), size_bytes)
    # A boot sector of a file system has the same signature: what stands there is no table then.
    if not has_mbr or any(sector[446 + 16 * index] not in (0, 0x80) for index in range(4)):
        return []
    return _checked(_mbr(read, size_bytes, entries), size_bytes)


def _entries(sector: bytes) -> list[tuple[int, int, int]]:
    """Type, first sector and number of sectors, of all four."""
    found = []
    for index in range(4):
        entry = sector[446 + 16 * index : 462 + 16 * index]
        start, count = struct.unpack_from("<II", entry, 8)
        found.append((entry[4], start, count))
    return found


def _mbr(read: Read, size_bytes: int, entries: list[tuple[int, int, int]]) -> list[Partition]:
    found: list[Partition] = []
    logical = 5
    for number, (kind, start, count) in enumerate(entries, 1):
        if kind == 0 or count == 0:
            continue
        if kind not in _EXTENDED:
            found.append(Partition(number, _range(start, count)))
            continue
        seen: set[int] = set()
        at = start
        while at not in seen and len(seen) < MOST_PARTITIONS:
            seen.add(at)
            if (at + 1) * SECTOR_BYTES > size_bytes:
                raise FormatError(f"a logical partition's table is at sector {at}, beyond the end of the disk")
            sector = read(at * SECTOR_BYTES, SECTOR_BYTES)
            if sector[510:512] != b"\x55\xaa":
                break
            inner, following = _entries(sector)[:2]
            if inner[0] and inner[2]:
                found.append(Partition(logical, _range(at + inner[1], inner[2])))
                logical += 1
            if following[0] not in _EXTENDED or not following[2]:
                break
            at = start + following[1]
        else:
            raise FormatError("the logical partitions go round in a circle")
    return found


def _is_gpt(read: Read) -> bool:
    return read(SECTOR_BYTES, 8) == _SIGNATURE


def _gpt(read: Read, size_bytes: int) -> list[Partition]:
    """By the first header, or by the one at the disk's end if that is damaged."""
    last = size_bytes // SECTOR_BYTES - 1
    try:
        return _gpt_at(read, size_bytes, 1)
    except FormatError as first:
        try:
            return _gpt_at(read, size_bytes, last)
        except FormatError:
            raise first from None


def _gpt_at(read: Read, size_bytes: int, sector: int) -> list[Partition]:
    block = read(sector * SECTOR_BYTES, SECTOR_BYTES)
    fields = _HEADER.unpack_from(block)
    signature, _revision, header_bytes, checksum, _reserved, own = fields[:6]
    table, count, entry_bytes, table_checksum = fields[10:]
    if signature != _SIGNATURE or own != sector:
        raise FormatError("the disk should have a GPT, and has no header of one")
    if not _HEADER.size <= header_bytes <= SECTOR_BYTES:
        raise FormatError(f"the GPT's header has {header_bytes} bytes: that cannot be")
    if zlib.crc32(block[:16] + bytes(4) + block[20:header_bytes]) != checksum:
        raise FormatError("the GPT's header is damaged: its checksum is wrong")
    length = count * entry_bytes
    if entry_bytes not in (128, 256, 512) or not 0 < length <= LARGEST_TABLE_BYTES:
        raise FormatError(f"the GPT has {count} entries of {entry_bytes} bytes: that cannot be")
    if table * SECTOR_BYTES + length > size_bytes:
        raise FormatError("the GPT's table is beyond the end of the disk")
    entries = read(table * SECTOR_BYTES, length)
    if zlib.crc32(entries) != table_checksum:
        raise FormatError("the GPT's table is damaged: its checksum is wrong")
    found = []
    for index in range(count):
        entry = entries[index * entry_bytes : (index + 1) * entry_bytes]
        if any(entry[:16]):
            start, end = struct.unpack_from("<QQ", entry, 32)
            if end < start:
                raise FormatError(f"partition {index + 1} ends before it begins")
            found.append(Partition(index + 1, _range(start, end - start + 1), _guid(entry[:16]) in _ROOTS))
    return found


def _guid(raw: bytes) -> str:
    first, second, third = struct.unpack_from("<IHH", raw)
    return f"{first:08x}-{second:04x}-{third:04x}-{raw[8:10].hex()}-{raw[10:16].hex()}"


def _range(start: int, count: int) -> Range:
    return Range(start * SECTOR_BYTES, (start + count) * SECTOR_BYTES)


def _checked(found: list[Partition], size_bytes: int) -> list[Partition]:
    if len(found) > MOST_PARTITIONS:
        raise FormatError(f"the disk has {len(found)} partitions: that cannot be")
    for partition in found:
        if partition.part.end > size_bytes or partition.part.start < SECTOR_BYTES:
            raise FormatError(
                f"partition {partition.number} is at bytes {partition.part.start} to {partition.part.end}, the disk has"
                f" {size_bytes}: it is cut off or damaged"
            )
    return sorted(found, key=lambda partition: partition.number)
