"""What is on a disk: partition tables and file systems, true and damaged; and the headers of qcow2 images."""

import os
import shutil
import struct
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blockdev.extents import Range
from blockdev.formats import partitions, qcow2, qemu, rootfs, superblock
from blockdev.formats.disk import RawDisk, open_file
from blockdev.formats.errors import FormatError
from tests import disk_kit
from tests.disk_kit import EFI, LINUX, LINUX_ROOT, SECTOR

MIB = 1 << 20
SECTORS = 64 * MIB // SECTOR


class MemoryDisk:
    """A disk of pieces by sector number; everything else is zeros."""

    def __init__(self, pieces: Mapping[int, bytes], size_bytes: int = 64 * MIB) -> None:
        self.size_bytes = size_bytes
        self._pieces = pieces

    def read(self, offset: int, length: int) -> bytes:
        if offset < 0 or offset + length > self.size_bytes:
            raise FormatError("outside")
        found = bytearray(length)
        for sector, data in self._pieces.items():
            at = sector * SECTOR - offset
            start, end = max(at, 0), min(at + len(data), length)
            if start < end:
                found[start:end] = data[start - at : end - at]
        return bytes(found)

    def ranges(self, start: int, end: int) -> Iterator[Range]:
        yield Range(start, end)


def ext4(size_bytes: int, *, block_bytes: int = 4096, label: str = "", incompatible: int = 0) -> bytes:
    block = bytearray(1024)
    struct.pack_into("<I", block, 4, size_bytes // block_bytes)
    struct.pack_into("<I", block, 0x18, {1024: 0, 2048: 1, 4096: 2}[block_bytes])
    struct.pack_into("<I", block, 0x60, incompatible)
    block[0x38:0x3A] = b"\x53\xef"
    block[0x78 : 0x78 + len(label)] = label.encode()
    return bytes(1024) + bytes(block)


def xfs(size_bytes: int, sector_bytes: int = 4096) -> bytes:
    block = bytearray(512)
    block[:4] = b"XFSB"
    struct.pack_into(">IQ", block, 4, 4096, size_bytes // 4096)
    struct.pack_into(">H", block, 102, sector_bytes)
    return bytes(block)


def test_the_whole_disk() -> None:
    located = rootfs.locate(MemoryDisk({0: ext4(60 * MIB, label="root")}))
    assert (located.partition, located.part) == (0, Range(0, 64 * MIB))
    assert located.found == superblock.Found("ext4", 60 * MIB, 4096, "root")


def test_the_only_file_system_of_a_gpt() -> None:
    table = disk_kit.gpt(SECTORS, [(2048, 4095, EFI), (4096, SECTORS - 2048, LINUX)])
    located = rootfs.locate(MemoryDisk(table | {4096: xfs(16 * MIB)}))
    assert (located.partition, located.part.start, located.found.kind) == (2, 4096 * SECTOR, "xfs")


def test_a_gpt_by_its_copy() -> None:
    table = disk_kit.gpt(SECTORS, [(4096, 8191, LINUX)])
    for sector, junk in ((1, b"EFI PARTjunk"), (2, b"junk"), (1, bytes(SECTOR))):
        located = rootfs.locate(MemoryDisk(table | {sector: junk, 4096: ext4(2 * MIB)}))
        assert located.part == Range(4096 * SECTOR, 8192 * SECTOR)
    with pytest.raises(FormatError, match="checksum"):
        rootfs.locate(MemoryDisk(table | {2: b"junk", SECTORS - 33: b"junk"}))


def test_one_of_several_is_chosen_by_type_or_by_number() -> None:
    there = {4096: ext4(MIB, label="boot"), 8192: ext4(2 * MIB)}
    marked = disk_kit.gpt(SECTORS, [(4096, 8191, LINUX), (8192, 16383, LINUX_ROOT)])
    assert rootfs.locate(MemoryDisk(marked | there)).partition == 2
    alike = disk_kit.gpt(SECTORS, [(4096, 8191, LINUX), (8192, 16383, LINUX)])
    with pytest.raises(FormatError, match=r"choose one of 1 .ext4 'boot' of 1 MiB., 2"):
        rootfs.locate(MemoryDisk(alike | there))
    assert rootfs.locate(MemoryDisk(alike | there), 2).partition == 2
    with pytest.raises(FormatError, match="no partition 5; it has 1, 2"):
        rootfs.locate(MemoryDisk(alike | there), 5)
    with pytest.raises(FormatError, match="the whole disk has nothing"):
        rootfs.locate(MemoryDisk(alike | there), rootfs.WHOLE_DISK)


def test_partitions_of_an_mbr() -> None:
    sectors = {
        0: disk_kit.mbr([(0x83, 2048, 2048), (0x05, 8192, 40000)]),
        8192: disk_kit.mbr([(0x83, 64, 1000), (0x05, 10000, 5000)]),
        18192: disk_kit.mbr([(0x83, 64, 2000)]),
    }
    found = partitions.read_table(MemoryDisk(sectors).read, 64 * MIB)
    assert [(entry.number, entry.part.start // SECTOR, entry.part.length // SECTOR) for entry in found] == [
        (1, 2048, 2048),
        (5, 8256, 1000),
        (6, 18256, 2000),
    ]
    assert rootfs.locate(MemoryDisk(sectors | {18256: ext4(MIB // 2)})).partition == 6


@pytest.mark.parametrize(
    ("sectors", "reason"),
    [
        ({0: disk_kit.mbr([(0x83, 2048, SECTORS)])}, "cut off"),
        ({0: disk_kit.mbr([(0x83, 0, 100)])}, "cut off"),
        ({0: disk_kit.mbr([(0x05, 8192, 100)]), 8192: disk_kit.mbr([(0x83, 1, 1), (0x05, 0, 100)])}, "circle"),
        ({0: disk_kit.mbr([(0x05, SECTORS + 9, 100)])}, "beyond the end"),
        ({0: disk_kit.mbr([(0xEE, 1, 100)])}, "no header"),
        (disk_kit.gpt(SECTORS, [(2048, 1 << 40, LINUX)]), "cut off"),
        (disk_kit.gpt(SECTORS, [(4096, 2048, LINUX)]), "ends before"),
        ({0: ext4(65 * MIB)}, "cut off"),
        ({0: ext4(MIB, incompatible=8)}, "journal device"),
        ({0: xfs(MIB, sector_bytes=100)}, "damaged"),
        ({0: b"LUKS\xba\xbe"}, "LUKS"),
        ({}, "nothing that is known"),
    ],
)
def test_disks_that_are_refused(sectors: Mapping[int, bytes], reason: str) -> None:
    with pytest.raises(FormatError, match=reason):
        rootfs.locate(MemoryDisk(sectors))


def test_which_fit_our_devices() -> None:
    found = {
        "ext4 of 1024": superblock.probe(MemoryDisk({0: ext4(MIB, block_bytes=1024)}).read, MIB),
        "xfs of 512": superblock.probe(MemoryDisk({0: xfs(MIB, 512)}).read, MIB),
        "xfs of 4096": superblock.probe(MemoryDisk({0: xfs(MIB)}).read, MIB),
    }
    assert {name for name, one in found.items() if one is not None and one.fits_our_devices} == {"xfs of 4096"}


@settings(max_examples=400, deadline=None)
@given(st.dictionaries(st.integers(0, 130), st.binary(min_size=1, max_size=SECTOR), max_size=5), st.booleans())
def test_any_junk_is_located_or_refused(junk: dict[int, bytes], has_table: bool) -> None:
    base = disk_kit.gpt(SECTORS, [(4096, 8191, LINUX)]) if has_table else {0: disk_kit.mbr([(0x83, 64, 64)])}
    try:
        located = rootfs.locate(MemoryDisk(base | junk))
    except FormatError:
        return
    assert 0 <= located.part.start < located.part.end <= 64 * MIB


@pytest.mark.parametrize("make", [["mkfs.ext4", "-q"], ["mkfs.xfs", "-q"], ["mkfs.btrfs", "-q"]])
def test_real_superblocks(tmp_path: Path, make: list[str]) -> None:
    if shutil.which(make[0]) is None and not (Path("/sbin") / make[0]).exists():
        pytest.skip(f"{make[0]} is not installed")
    image = tmp_path / "image"
    image.touch()
    os.truncate(image, 330 * MIB)
    label = ["-L", "a root"]
    subprocess.run([*make, *label, str(image)], check=True, capture_output=True, env={"PATH": os.defpath + ":/sbin"})
    descriptor = open_file(str(image))
    try:
        found = rootfs.locate(RawDisk(descriptor, "image")).found
    finally:
        os.close(descriptor)
    assert (found.kind, found.label) == (make[0].removeprefix("mkfs."), "a root")
    assert 0.95 * 330 * MIB < found.size_bytes <= 330 * MIB


def qcow2_header(**changes: int) -> bytes:
    fields = {
        "version": 3,
        "backing_at": 0,
        "backing_bytes": 0,
        "cluster_bits": 16,
        "size": 64 * MIB,
        "crypt": 0,
        "l1": 1,
        "incompatible": 0,
    } | changes
    head = struct.pack(
        ">4sIQIIQIIQQIIQ",
        *(b"QFI\xfb", fields["version"], fields["backing_at"], fields["backing_bytes"], fields["cluster_bits"]),
        *(fields["size"], fields["crypt"], fields["l1"], 0x30000, 0x10000, 1, 0, 0),
    )
    return (head + struct.pack(">Q", fields["incompatible"])).ljust(104, b"\0")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"version": 4}, "version 4"),
        ({"backing_at": 0x200, "backing_bytes": 11}, "backing file"),
        ({"backing_at": 0x200}, "backing file"),
        ({"incompatible": 4}, "another file"),
        ({"incompatible": 2}, "corrupt"),
        ({"incompatible": 1 << 40}, "not known"),
        ({"crypt": 1}, "encrypted"),
        ({"cluster_bits": 40}, "clusters"),
        ({"l1": 0xFFFFFFFF}, "table"),
        ({"size": 1 << 62}, "cannot be"),
    ],
)
def test_qcow2_headers_that_are_refused(changes: dict[str, int], reason: str) -> None:
    assert qcow2.check_header(qcow2_header(), "x").size_bytes == 64 * MIB
    with pytest.raises(FormatError, match=reason):
        qcow2.check_header(qcow2_header(**changes), "x")


@given(st.binary(max_size=104), st.integers(0, 104))
def test_any_qcow2_header_is_accepted_or_refused(junk: bytes, at: int) -> None:
    head = qcow2_header()
    with suppress(FormatError):
        assert qcow2.check_header(head[:at] + junk + head[at + len(junk) :], "x").size_bytes > 0


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    if shutil.which("qemu-img") is None:
        pytest.skip("qemu-img is not installed")
    raw = tmp_path / "disk.raw"
    raw.write_bytes(bytes(MIB) + os.urandom(MIB) + bytes(30 * MIB))
    return raw


def test_qcow2_there_and_back(disk: Path, tmp_path: Path) -> None:
    qemu.from_raw(disk, tmp_path / "a.qcow2", "qcow2")
    assert (tmp_path / "a.qcow2").stat().st_blocks * 512 < 2 * MIB
    assert qemu.check_qcow2(tmp_path / "a.qcow2").size_bytes == 32 * MIB
    assert MIB <= qemu.measure_raw(tmp_path / "a.qcow2") < 2 * MIB
    qemu.to_raw(tmp_path / "a.qcow2", tmp_path / "b.raw")
    assert (tmp_path / "b.raw").read_bytes() == disk.read_bytes()


def test_qcow2_that_refers_to_other_files_is_refused(disk: Path, tmp_path: Path) -> None:
    image = tmp_path / "a.qcow2"

    def make(*words: str) -> None:
        image.unlink(missing_ok=True)
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", *words], check=True, cwd=tmp_path)

    make("-b", "/etc/passwd", "-F", "raw", str(image), "1M")
    with pytest.raises(FormatError, match="backing file"):
        qemu.check_qcow2(image)
    make("-o", f"data_file={disk},data_file_raw=on", str(image), "32M")
    with pytest.raises(FormatError, match="another file"):
        qemu.check_qcow2(image)
    # The header is changed after it was checked: qemu-img opens no backing file even so.
    make("-b", str(disk), "-F", "raw", str(image), "32M")
    qemu.to_raw(image, tmp_path / "b.raw")
    assert (tmp_path / "b.raw").read_bytes() == bytes(32 * MIB)


@pytest.mark.parametrize("at", [0x10000, 0x20000, 0x30000, 0x40000])
def test_damaged_qcow2_is_refused(disk: Path, tmp_path: Path, at: int) -> None:
    image = tmp_path / "a.qcow2"
    qemu.from_raw(disk, image, "qcow2")
    with image.open("r+b") as file:
        file.seek(at)
        file.write(b"\xa5" * 4096)
    with pytest.raises(FormatError):
        qemu.check_qcow2(image)


def test_truncated_qcow2_is_refused(disk: Path, tmp_path: Path) -> None:
    image = tmp_path / "a.qcow2"
    qemu.from_raw(disk, image, "qcow2")
    os.truncate(image, image.stat().st_size - 512 * 1024)
    with pytest.raises(FormatError):
        qemu.check_qcow2(image)
        qemu.to_raw(image, tmp_path / "b.raw")
