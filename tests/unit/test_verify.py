"""Digests of volumes: equal contents have equal ones whatever is a hole, and what differs is found."""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blockdev import blocks
from blockdev.blocks import Piece
from migrator import verify
from migrator.disk import DiskCopy
from migrator.errors import Cancelled, PeerError
from migrator.ports import LeavingVolume
from migrator.stream import Digests, Meter, Receiver, Sender
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
    count = 0
    for piece in verify.differing(pieces, known):
        result[piece.offset : piece.offset + piece.length] = piece.data or bytes(piece.length)
        count += -(-piece.length // BLOCK_BYTES)
    assert bytes(result) == data
    wrong = sum(mine.get(number) != theirs.get(number) for number in range(41))
    # A block of zeros among data is sent: its digest at the destination is none.
    assert count <= wrong + 41 - len(known)


@dataclass
class AtRest:
    """As much of a stopped container as its disk needs."""

    volumes: list[LeavingVolume]


def based(ours: Path, base: Path) -> int:
    """Bring the base up to date by a first pass. Returns the bytes that were sent."""
    size = ours.stat().st_size
    meter, receiver = Meter(), Receiver(Digests())
    sender = Sender("m-1", 1, Digests(), meter)
    known = digests(base, BLOCK_BYTES)
    with ExitStack() as stack:
        target = os.open(base, os.O_RDWR)
        stack.callback(os.close, target)
        copy = DiskCopy(AtRest([LeavingVolume(ours, size, None, None)]), stack)  # type: ignore[arg-type]
        for request in copy.first_pass(sender, {"volume/0": known}):
            for piece in receiver.pieces(request):
                blocks.write(target, piece, size)
    return sum(meter.content_bytes.values())


def sparse(path: Path, runs: dict[int, int], size_bytes: int) -> Path:
    """A file with data of its own at some of its pages (number and length in pages), and holes else."""
    with path.open("wb") as file:
        file.truncate(size_bytes)
        for page, count in runs.items():
            os.pwrite(file.fileno(), bytes([1 + page % 251]) * min(count * 4096, size_bytes - page * 4096), page * 4096)
    return path


def test_what_was_discarded_in_the_middle_of_a_block_is_gone_at_the_destination(tmp_path: Path) -> None:
    """Before the hole is a block of which the base has nothing, behind its begin one of which the base has all."""
    ours = sparse(tmp_path / "ours", {0: 15, 32: 400}, 4 << 20)
    base = sparse(tmp_path / "base", {16: 16}, 4 << 20)
    based(ours, base)
    assert base.read_bytes() == ours.read_bytes()


def test_nothing_is_sent_of_what_is_the_same_whatever_its_holes(tmp_path: Path) -> None:
    runs = dict.fromkeys(range(0, 1000, 5), 1)
    assert based(sparse(tmp_path / "ours", runs, 4 << 20), sparse(tmp_path / "base", runs, 4 << 20)) == 0


pages = st.dictionaries(st.integers(0, 640), st.integers(1, 300), max_size=8)


@settings(max_examples=50, deadline=None)
@given(pages, pages)
def test_a_first_pass_makes_any_base_equal(
    tmp_path_factory: pytest.TempPathFactory, mine: dict[int, int], theirs: dict[int, int]
) -> None:
    folder = tmp_path_factory.mktemp("v")
    ours, base = sparse(folder / "ours", mine, SIZE), sparse(folder / "base", theirs, SIZE)
    based(ours, base)
    assert base.read_bytes() == ours.read_bytes()


@given(pages, pages, st.lists(st.integers(1, 640), max_size=10))
@settings(max_examples=50, deadline=None)
def test_pieces_may_begin_and_end_within_blocks(
    tmp_path_factory: pytest.TempPathFactory, mine: dict[int, int], theirs: dict[int, int], cuts: list[int]
) -> None:
    folder = tmp_path_factory.mktemp("v")
    ours, base = sparse(folder / "ours", mine, SIZE), sparse(folder / "base", theirs, SIZE)
    data, result = ours.read_bytes(), bytearray(base.read_bytes())
    places = sorted({0, SIZE, *(page * 4096 for page in cuts)})
    parts = [Piece(start, end - start, data[start:end]) for start, end in pairwise(places)]
    pieces = [part if any(part.data or b"") else part._replace(data=None) for part in parts]
    for piece in verify.differing(pieces, digests(base, BLOCK_BYTES)):
        result[piece.offset : piece.offset + piece.length] = piece.data or bytes(piece.length)
    assert bytes(result) == data


def test_who_is_cancelled_does_not_read_on(tmp_path: Path) -> None:
    size, step = 10 * verify.CHUNK_BYTES, verify.CHUNK_BYTES // 4096
    image = sparse(tmp_path / "large", dict.fromkeys(range(0, 10 * step, step), 1), size)
    looks = iter(range(10 + 3))

    def check() -> None:
        if next(looks, None) is None:
            raise Cancelled("no more of it")

    with ExitStack() as stack:
        copy = DiskCopy(AtRest([LeavingVolume(image, size, None, None)]), stack, check=check)  # type: ignore[arg-type]
        ((_, found),) = copy.digests()
        assert len(found) == 10
        with pytest.raises(Cancelled):
            list(copy.digests())


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
