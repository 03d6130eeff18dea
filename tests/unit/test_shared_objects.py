"""One object of shared memory, looked at as a whole while nobody uses it."""

import os
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from blockdev.extents import Range
from migrator.memory import shared
from migrator.memory.pagemap import PAGE_BYTES
from migrator.memory.shared import SharedObject

MIB = 1 << 20
# With a last page that is a part of one, and a hole that nobody is to fill by looking.
SIZE, HOLE = 6 * MIB + 100, Range(MIB, 2 * MIB)


@pytest.fixture
def memfd() -> Iterator[int]:
    descriptor = os.memfd_create("object")
    os.pwrite(descriptor, os.urandom(HOLE.start), 0)
    os.pwrite(descriptor, os.urandom(SIZE - HOLE.end), HOLE.end)
    yield descriptor
    os.close(descriptor)


@pytest.fixture(params=["mapped", "read"])
def looked_at(request: pytest.FixtureRequest, memfd: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[SharedObject]:
    if request.param == "read":
        monkeypatch.setattr(shared, "_MOST_MAPPED_BYTES", 0)
    with closing(SharedObject(os.dup(memfd), "/memfd:object")) as made:
        assert made.look([], at_all=False).written
        assert ("/memfd:object" in Path("/proc/self/maps").read_text()) == (request.param == "mapped")
        yield made


def _change(descriptor: int, at: int) -> Range:
    byte = os.pread(descriptor, 1, at)
    os.pwrite(descriptor, bytes([byte[0] ^ 1]), at)
    start = at // PAGE_BYTES * PAGE_BYTES
    return Range(start, start + PAGE_BYTES)


def test_what_has_changed_is_found_wherever_it_is(memfd: int, looked_at: SharedObject) -> None:
    blocks = os.fstat(memfd).st_blocks
    assert looked_at.look([], at_all=True).written == []
    changed = [_change(memfd, at) for at in (0, HOLE.start - 1, HOLE.end, 3 * MIB, SIZE - 1)]
    assert looked_at.look([], at_all=True).written == changed
    assert looked_at.look([], at_all=True) == ([], [])
    assert os.fstat(memfd).st_blocks == blocks


def test_one_that_has_become_shorter_or_longer(memfd: int, looked_at: SharedObject) -> None:
    os.ftruncate(memfd, 5 * MIB)
    change = looked_at.look([], at_all=True)
    assert change == ([], [Range(5 * MIB, 6 * MIB + PAGE_BYTES)])
    os.pwrite(memfd, b"x" * PAGE_BYTES, 8 * MIB)
    assert looked_at.look([], at_all=False).written == [Range(8 * MIB, 8 * MIB + PAGE_BYTES)]
    changed = [_change(memfd, at) for at in (5, 8 * MIB)]
    assert looked_at.look([], at_all=True).written == changed
