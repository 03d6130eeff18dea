"""One object of shared memory, looked at as a whole while nobody uses it."""

import mmap
import os
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from blockdev.extents import Range
from migrator.memory.own import address_of
from migrator.memory.pagemap import PAGE_BYTES
from migrator.memory.shared import SharedObject

MIB, ROOM = 1 << 20, 1 << 30
# With a hole that nobody is to fill by looking.
SIZE, HOLE = 6 * MIB, Range(MIB, 2 * MIB)


@pytest.fixture
def memfd() -> Iterator[int]:
    """The last page is a part of one."""
    descriptor = os.memfd_create("object")
    _fill(descriptor, SIZE + 100)
    yield descriptor
    os.close(descriptor)


@pytest.fixture
def anonymous() -> Iterator[int]:
    """By the way that the kernel has for CRIU: by itself it has no descriptor."""
    with mmap.mmap(-1, SIZE) as memory:
        address = address_of(memory)
        descriptor = os.open(f"/proc/self/map_files/{address:x}-{address + SIZE:x}", os.O_RDWR)
        _fill(descriptor, SIZE)
        yield descriptor
        os.close(descriptor)


def _fill(descriptor: int, size: int) -> None:
    os.pwrite(descriptor, os.urandom(HOLE.start), 0)
    os.pwrite(descriptor, os.urandom(size - HOLE.end), HOLE.end)


@pytest.fixture
def opened() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def _open(opened: ExitStack, descriptor: int) -> SharedObject:
    made = SharedObject(os.dup(descriptor), str(Path(f"/proc/self/fd/{descriptor}").readlink()))
    opened.enter_context(closing(made))
    assert made.look([], at_all=False).written
    return made


def _change(descriptor: int, at: int) -> Range:
    byte = os.pread(descriptor, 1, at)
    os.pwrite(descriptor, bytes([byte[0] ^ 1]), at)
    start = at // PAGE_BYTES * PAGE_BYTES
    return Range(start, start + PAGE_BYTES)


@pytest.mark.parametrize("kind", ["memfd", pytest.param("anonymous", marks=pytest.mark.root)])
def test_what_has_changed_is_found_wherever_it_is(kind: str, opened: ExitStack, request: pytest.FixtureRequest) -> None:
    descriptor: int = request.getfixturevalue(kind)
    looked_at = _open(opened, descriptor)
    assert looked_at.get_ready(ROOM) == (SIZE if kind == "anonymous" else 0)
    blocks = os.fstat(descriptor).st_blocks
    assert looked_at.look([], at_all=True).written == []
    end = os.fstat(descriptor).st_size
    changed = [_change(descriptor, at) for at in (0, HOLE.start - 1, HOLE.end, 3 * MIB, end - 1)]
    assert looked_at.look([], at_all=True).written == changed
    assert looked_at.look([], at_all=True) == ([], [])
    assert os.fstat(descriptor).st_blocks == blocks


def test_one_that_has_become_shorter_or_longer(memfd: int, opened: ExitStack) -> None:
    """Its owner may do that at any time: it is not mapped, which would end this process."""
    looked_at = _open(opened, memfd)
    assert looked_at.get_ready(ROOM) == 0
    os.ftruncate(memfd, 5 * MIB)
    change = looked_at.look([], at_all=True)
    assert change == ([], [Range(5 * MIB, 6 * MIB + PAGE_BYTES)])
    os.pwrite(memfd, b"x" * PAGE_BYTES, 8 * MIB)
    assert looked_at.look([], at_all=False).written == [Range(8 * MIB, 8 * MIB + PAGE_BYTES)]
    changed = [_change(memfd, at) for at in (5, 8 * MIB)]
    assert looked_at.look([], at_all=True).written == changed


@pytest.mark.root
def test_no_more_is_mapped_than_there_is_room_for(anonymous: int, opened: ExitStack) -> None:
    looked_at = _open(opened, anonymous)
    assert looked_at.get_ready(SIZE - 1) == 0
    assert looked_at.get_ready(SIZE) == SIZE
    assert looked_at.get_ready(0) == SIZE


def test_a_file_that_is_named_like_memory_is_not_mapped(memfd: int, opened: ExitStack, tmp_path: Path) -> None:
    """A container can make one, and cut it off."""
    folder = tmp_path / "dev"
    folder.mkdir()
    path = folder / "zero"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT)
    opened.callback(os.close, descriptor)
    _fill(descriptor, SIZE)
    made = opened.enter_context(closing(SharedObject(os.dup(descriptor), "/dev/zero (deleted)")))
    made.look([], at_all=False)
    assert made.get_ready(ROOM) == 0
    made = opened.enter_context(closing(SharedObject(os.dup(memfd), "/memfd:/dev/zero (deleted)")))
    made.look([], at_all=False)
    assert made.get_ready(ROOM) == 0
