"""Digests of volumes: equal contents have equal ones whatever is a hole, and what differs is found."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blockdev.blocks import Piece
from migrator import verify
from migrator.errors import PeerError
from migrator.v1 import peer_pb2
from migrator.verify import BLOCK_BYTES

SIZE = 40 * BLOCK_BYTES + 4096


@contextmanager
def opened(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def digests(path: Path, chunk_bytes: int) -> dict[int, bytes]:
    with opened(path) as descriptor:
        return dict(verify.digests(descriptor, descriptor, path.stat().st_size, chunk_bytes))


def volume(path: Path, writes: dict[int, bytes], zeros: list[int]) -> Path:
    """A sparse file with these bytes at these offsets, and written zeros in some of its blocks."""
    with path.open("wb") as file:
        file.truncate(SIZE)
        for block in zeros:
            os.pwrite(file.fileno(), bytes(4096), block * BLOCK_BYTES)
        for offset, data in writes.items():
            os.pwrite(file.fileno(), data, offset)
    return path


@pytest.mark.parametrize("chunk_bytes", [BLOCK_BYTES, 4 * BLOCK_BYTES, verify.CHUNK_BYTES])
def test_holes_and_zeros_are_the_same(tmp_path: Path, chunk_bytes: int) -> None:
    writes = {5000: b"a", 7 * BLOCK_BYTES: os.urandom(3 * BLOCK_BYTES), SIZE - 10: b"the end"}
    one = digests(volume(tmp_path / "one", writes, []), chunk_bytes)
    assert one == digests(volume(tmp_path / "two", writes, [3, 7, 20, 39]), chunk_bytes)
    writes[5000] = b"b"
    other = digests(volume(tmp_path / "three", writes, []), chunk_bytes)
    assert {number for number in one if one[number] != other[number]} == {0}
    assert {*one} == {*other}


def test_blocks_of_a_chunk_are_not_interchangeable(tmp_path: Path) -> None:
    block = os.urandom(BLOCK_BYTES)
    one = digests(volume(tmp_path / "one", {0: block}, []), verify.CHUNK_BYTES)
    assert one != digests(volume(tmp_path / "two", {BLOCK_BYTES: block}, []), verify.CHUNK_BYTES)


@given(
    st.dictionaries(st.integers(0, 40), st.sampled_from([b"x", b"y"]), max_size=12),
    st.dictionaries(st.integers(0, 40), st.sampled_from([b"x", b"y"]), max_size=12),
    st.lists(st.integers(0, 40), max_size=4),
)
def test_differing_makes_the_base_equal(
    tmp_path_factory: pytest.TempPathFactory, mine: dict[int, bytes], theirs: dict[int, bytes], zeros: list[int]
) -> None:
    """Also that no block is sent that is equal."""
    folder = tmp_path_factory.mktemp("v")
    ours = volume(folder / "ours", {number * BLOCK_BYTES: data for number, data in mine.items()}, zeros)
    base = volume(folder / "base", {number * BLOCK_BYTES: data for number, data in theirs.items()}, [])
    known = digests(base, BLOCK_BYTES)
    data = ours.read_bytes()
    pieces = [
        Piece(at, len(data[at : at + 4 * BLOCK_BYTES]), data[at : at + 4 * BLOCK_BYTES])
        if any(data[at : at + 4 * BLOCK_BYTES])
        else Piece(at, len(data[at : at + 4 * BLOCK_BYTES]), None)
        for at in range(0, SIZE, 4 * BLOCK_BYTES)
    ]
    result = bytearray(base.read_bytes())
    blocks = 0
    for piece in verify.differing(pieces, known):
        result[piece.offset : piece.offset + piece.length] = piece.data or bytes(piece.length)
        blocks += -(-piece.length // BLOCK_BYTES)
    assert bytes(result) == data
    wrong = sum(mine.get(number) != theirs.get(number) for number in range(41))
    # A block of zeros among data is sent: its digest at the destination is none.
    assert blocks <= wrong + 41 - len(known)


def test_answers_carry_every_chunk(tmp_path: Path) -> None:
    found = {number: bytes([number % 251] * 16) for number in (0, 1, 2, 9, 10, 4000)}
    runs = [peer_pb2.DigestVolumeResponse.FromString(a.SerializeToString()) for a in verify.answers(found.items())]
    assert [run.first_chunk for run in runs] == [0, 9, 4000]
    assert verify.chunks(runs, 5000, 1) == found


@pytest.mark.parametrize(
    "run",
    [
        peer_pb2.DigestVolumeResponse(first_chunk=-1, digests=[bytes(16)]),
        peer_pb2.DigestVolumeResponse(first_chunk=9, digests=[bytes(16), bytes(16)]),
        peer_pb2.DigestVolumeResponse(first_chunk=0, digests=[b"short"]),
    ],
)
def test_digests_of_no_chunk_are_refused(run: peer_pb2.DigestVolumeResponse) -> None:
    with pytest.raises(PeerError):
        verify.chunks([run], 10 * BLOCK_BYTES, BLOCK_BYTES)
