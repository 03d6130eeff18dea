"""Disks built byte by byte for the tests: ploop deltas and folders, partition tables, hostile variants."""

import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

SECTOR = 512
TOP = "{5fbaabe3-6958-40ff-92a7-860e329aab41}"
NONE = "{00000000-0000-0000-0000-000000000000}"


def guid(number: int) -> str:
    return f"{{{number:08x}-1111-2222-3333-444444444444}}"


@dataclass(frozen=True)
class DeltaSpec:
    """A delta as it will be written; every field can be made wrong."""

    clusters: Mapping[int, bytes]
    disk_clusters: int
    cluster_sectors: int = 8
    version: int = 2
    magic: bytes = b""
    kind: int = 2
    in_use: int = 0
    flags: int = 0
    count: int | None = None
    sectors: int | None = None
    entries: Mapping[int, int] | None = None
    cut_bytes: int = 0

    def but(self, **changes: object) -> "DeltaSpec":
        return replace(self, **changes)  # type: ignore[arg-type]


def delta(spec: DeltaSpec) -> bytes:
    """The file. Clusters lie in it in the reverse order of the disk, so that order is never right by accident."""
    cluster_bytes = spec.cluster_sectors * SECTOR
    count = spec.disk_clusters
    first = -(-(64 + 4 * count) // cluster_bytes)
    table = [0] * count
    body = b""
    for position, index in enumerate(sorted(spec.clusters, reverse=True)):
        unit = first + position
        table[index] = unit * spec.cluster_sectors if spec.version == 1 else unit
        body += spec.clusters[index].ljust(cluster_bytes, b"\0")
    for index, value in (spec.entries or {}).items():
        table[index] = value
    sectors = spec.sectors if spec.sectors is not None else count * spec.cluster_sectors
    magic = spec.magic or (b"WithoutFreeSpace" if spec.version == 1 else b"WithouFreSpacExt")
    header = struct.pack(
        "<16s5IQIIIQ",
        magic,
        spec.kind,
        16,
        63,
        spec.cluster_sectors,
        count if spec.count is None else spec.count,
        sectors,
        spec.in_use,
        first * spec.cluster_sectors,
        spec.flags,
        0,
    )
    head = (header + struct.pack(f"<{count}I", *table)).ljust(first * cluster_bytes, b"\0")
    whole = head + body
    return whole[: len(whole) - spec.cut_bytes]


def split(data: bytes, cluster_bytes: int) -> dict[int, bytes]:
    """The clusters of a disk that are not all zeros."""
    pieces = {at // cluster_bytes: data[at : at + cluster_bytes] for at in range(0, len(data), cluster_bytes)}
    return {index: piece for index, piece in pieces.items() if piece.strip(b"\0")}


def descriptor(
    size_bytes: int,
    images: Sequence[tuple[str, str, str]],
    shots: Sequence[tuple[str, str]],
    *,
    top: str = TOP,
    cluster_sectors: int = 8,
    prologue: str = "",
) -> bytes:
    """DiskDescriptor.xml of images (guid, type, file) and shots (guid, parent)."""
    image_text = "".join(
        f"<Image><GUID>{one}</GUID><Type>{kind}</Type><File>{file}</File></Image>" for one, kind, file in images
    )
    shot_text = "".join(f"<Shot><GUID>{one}</GUID><ParentGUID>{parent}</ParentGUID></Shot>" for one, parent in shots)
    sectors = size_bytes // SECTOR
    return (
        f'<?xml version="1.0" encoding="UTF-8"?>\n{prologue}<Virtuozzo_disk_image><Disk_Parameters>'
        f"<Disk_size>{sectors}</Disk_size><Cylinders>1</Cylinders><Heads>1</Heads><Sectors>63</Sectors>"
        f"<Padding>0</Padding></Disk_Parameters><StorageData><Storage><Start>0</Start><End>{sectors}</End>"
        f"<Blocksize>{cluster_sectors}</Blocksize>{image_text}</Storage></StorageData>"
        f"<Snapshots><TopGUID>{top}</TopGUID>{shot_text}</Snapshots></Virtuozzo_disk_image>"
    ).encode()


def chain_folder(
    folder: Path, states: Sequence[bytes], *, cluster_sectors: int = 8, versions: Sequence[int] = (2, 2, 2)
) -> list[str]:
    """A ploop folder of a delta for each state, each over the one before. The GUIDs of the states; the last is TOP."""
    folder.mkdir()
    cluster_bytes = cluster_sectors * SECTOR
    guids = [guid(number) for number in range(1, len(states))] + [TOP]
    before = bytes(len(states[0]))
    images, shots, parent = [], [], NONE
    for number, (state, name) in enumerate(zip(states, guids, strict=True)):
        size = len(state)
        before = before.ljust(size, b"\0")
        changed = {
            at // cluster_bytes: state[at : at + cluster_bytes]
            for at in range(0, size, cluster_bytes)
            if state[at : at + cluster_bytes] != before[at : at + cluster_bytes]
        }
        spec = DeltaSpec(changed, size // cluster_bytes, cluster_sectors, versions[number])
        file = f"root.hds.{name}" if number else "root.hds"
        (folder / file).write_bytes(delta(spec))
        images.append((name, "Compressed", file))
        shots.append((name, parent))
        before, parent = state, name
    (folder / "DiskDescriptor.xml").write_bytes(
        descriptor(len(states[-1]), images, shots, cluster_sectors=cluster_sectors)
    )
    return guids


def gpt(total_sectors: int, parts: Sequence[tuple[int, int, str]]) -> dict[int, bytes]:
    """A GPT and its copy at the end, as sectors by number; parts are first sector, last sector and type."""
    entries = b"".join(
        _guid_bytes(kind) + bytes([index + 1] * 16) + struct.pack("<QQQ", first, last, 0) + bytes(72)
        for index, (first, last, kind) in enumerate(parts)
    ).ljust(128 * 128, b"\0")
    end = total_sectors - 1

    def header(own: int, other: int, table: int) -> bytes:
        def pack(checksum: int) -> bytes:
            return struct.pack(
                "<8s4I4Q16sQ3I",
                *(b"EFI PART", 0x10000, 92, checksum, 0, own, other, 34, end - 33, b"\7" * 16, table, 128, 128),
                zlib.crc32(entries),
            )

        return pack(zlib.crc32(pack(0))).ljust(SECTOR, b"\0")

    return {
        0: mbr([(0xEE, 1, end)]),
        1: header(1, end, 2),
        2: entries,
        end - 32: entries,
        end: header(end, 1, end - 32),
    }


def mbr(parts: Sequence[tuple[int, int, int]]) -> bytes:
    """A boot sector with up to four partitions: type, first sector, sectors."""
    table = b"".join(struct.pack("<B3sB3sII", 0, b"", kind, b"", first, count) for kind, first, count in parts)
    return bytes(446) + table.ljust(64, b"\0") + b"\x55\xaa"


def _guid_bytes(text: str) -> bytes:
    first, second, third, fourth, fifth = text.split("-")
    return struct.pack("<IHH", int(first, 16), int(second, 16), int(third, 16)) + bytes.fromhex(fourth + fifth)


LINUX = "0fc63daf-8483-4772-8e79-3d69d8477de4"
LINUX_ROOT = "4f68bce3-e8cd-4db1-96e7-fbcaf984b709"
EFI = "c12a7328-f81f-11d2-ba4b-00a0c93ec93b"
