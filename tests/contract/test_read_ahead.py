"""What a restore will write to of a volume is in memory, of no other file anything, and nothing outside is touched."""

import ctypes
import mmap
import os
import struct
from pathlib import Path

import pytest
from pycriu.images import fdinfo_pb2, fown_pb2, mm_pb2, pagemap_pb2, regfile_pb2, vma_pb2

from agent import read_ahead
from migrator.images import joined
from migrator.memory.own import address_of
from tests.contract.memory_kit import eventually

PAGES = 1024
PRIVATE, SHARED = 0x2, 0x1
APART = 1 << 30
PARENT, LAZY = 1, 2


def test_what_will_be_written_is_read(tmp_path: Path) -> None:
    volume, other = tmp_path / "root", tmp_path / "other"
    files = [
        _file(place / name)
        for place, name in ((volume, "data"), (volume, "untouched"), (volume, "open"), (volume, "shared"), (other, "x"))
    ]
    (volume / "link").symlink_to("/data")
    images = _images(
        tmp_path,
        [(1, "link"), (2, "untouched"), (3, "open"), (4, "shared"), (5, "missing"), (6, "../other/x"), (7, "mnt/x")],
        [
            (1, 0, 64, PRIVATE, [(8, 8, PARENT), (32, 4, LAZY)]),
            (2, 0, 64, PRIVATE, []),
            (4, 0, 64, SHARED, [(0, 64, PARENT)]),
            (6, 0, 8, PRIVATE, [(0, 8, PARENT)]),
            (7, 512, PAGES, PRIVATE, [(0, PAGES, PARENT)]),
        ],
    )
    assert [_cached(file) for file in files] == [0] * 5
    read_ahead.begin(images, {"/": str(volume), "/mnt": str(other)})
    data, untouched, opened, shared, mounted = files
    # From where it is mapped on: what "../other/x" would lead to is not read.
    eventually("it is read", lambda: _cached(data) >= 12 and _cached(mounted) >= PAGES // 2)
    assert (_cached(data), _cached(mounted)) == (12, PAGES // 2)
    assert (_cached(untouched), _cached(opened), _cached(shared)) == (0, 0, 0)


@pytest.mark.parametrize("content", [b"", b"no image", struct.pack("<III", 0, 0, 1 << 30)])
def test_images_that_are_none_do_no_harm(tmp_path: Path, content: bytes) -> None:
    images = _images(tmp_path, [], [])
    (images / "files.img").write_bytes(content)
    read_ahead.begin(images, {"/": str(tmp_path)})


def test_mappings_over_each_other_do_not_multiply_what_is_read(tmp_path: Path) -> None:
    twice_as_long = 2 * APART // mmap.PAGESIZE
    mapped = [(1, first, twice_as_long, PRIVATE, [(0, 64, PARENT)]) for first in range(100)]
    (file,) = read_ahead.wanted(_images(tmp_path, [(1, "data")], mapped))
    assert len(file.parts) == 2


def _file(path: Path) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(os.urandom(PAGES * mmap.PAGESIZE))
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
    return path


def _images(
    folder: Path, files: list[tuple[int, str]], mapped: list[tuple[int, int, int, int, list[tuple[int, int, int]]]]
) -> Path:
    """Files by number; mappings of one by its number, first page, pages and flags, with the pages of its own in it."""
    images = folder / "images"
    images.mkdir()
    nobody = fown_pb2.fown_entry(uid=0, euid=0, signum=0, pid_type=0, pid=0)
    entries = []
    for number, name in files:
        regular = regfile_pb2.reg_file_entry(id=number, flags=0, pos=0, fown=nobody, name=name)
        entries.append(fdinfo_pb2.file_entry(type=fdinfo_pb2.REG, id=number, reg=regular).SerializeToString())
    (images / "files.img").write_bytes(bytes(8) + joined(entries))
    space = mm_pb2.mm_entry()
    for name in space.DESCRIPTOR.fields:
        if name.is_required:
            setattr(space, name.name, 0)
    head = pagemap_pb2.pagemap_head(pages_id=1).SerializeToString()
    held = []
    for place, (number, first, count, flags, pages) in enumerate(mapped):
        start = place * APART
        space.vmas.append(
            vma_pb2.vma_entry(
                start=start,
                end=start + count * mmap.PAGESIZE,
                pgoff=first * mmap.PAGESIZE,
                shmid=number,
                prot=0,
                flags=flags,
                status=0,
                fd=-1,
            )
        )
        for page, length, kind in pages:
            at = start + page * mmap.PAGESIZE
            entry = pagemap_pb2.pagemap_entry(vaddr=at, compat_nr_pages=length, nr_pages=length, flags=kind)
            held.append(entry.SerializeToString())
    (images / "pagemap-1.img").write_bytes(bytes(8) + joined([head, *held]))
    (images / "mm-1.img").write_bytes(bytes(8) + joined([space.SerializeToString()]))
    return images


def _cached(path: Path) -> int:
    """Pages, by mincore(2)."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as mapping:
        resident = (ctypes.c_ubyte * (len(mapping) // mmap.PAGESIZE))()
        asked = ctypes.c_void_p(address_of(mapping)), ctypes.c_size_t(len(mapping)), resident
        assert ctypes.CDLL(None).mincore(*asked) == 0
    return sum(byte & 1 for byte in resident)
