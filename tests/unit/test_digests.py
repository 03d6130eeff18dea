"""Digests noted from pieces, however these are cut."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from blockdev.blocks import Piece
from blockdev.digests import DIGEST_BYTES, REGION_BLOCKS, UNKNOWN, ZEROS, Digests, digest
from blockdev.extents import Range

BLOCK = 64
SIZE = 5 * BLOCK + 16


def _all(digests: Digests) -> list[bytes]:
    found = digests.of_region(0)
    return [found[at : at + DIGEST_BYTES] for at in range(0, len(found), DIGEST_BYTES)]


def _of(content: bytes) -> list[bytes]:
    return [digest(bytearray(content[at : at + BLOCK])) for at in range(0, len(content), BLOCK)]


passes = st.lists(
    st.lists(st.tuples(st.integers(0, SIZE - 1), st.integers(1, SIZE), st.sampled_from([None, 0, 1, 2])), max_size=8),
    max_size=4,
)


@given(passes)
def test_they_are_those_of_the_replica_or_unknown(rounds: list[list[tuple[int, int, int | None]]]) -> None:
    replica, digests = bytearray(SIZE), Digests(SIZE, BLOCK, ZEROS)
    for pieces in rounds:
        for start, length, fill in sorted(pieces, key=lambda piece: piece[0]):
            end = min(start + length, SIZE)
            data = None if fill is None else bytes([fill]) * (end - start)
            replica[start:end] = bytes(end - start) if data is None else data
            digests.note(Piece(start, end - start, data))
    for noted, real in zip(_all(digests), _of(bytes(replica)), strict=True):
        assert noted in (real, UNKNOWN)


@given(st.lists(st.integers(1, SIZE - 1)), st.binary(min_size=SIZE, max_size=SIZE))
def test_a_copy_in_order_is_known_however_it_is_cut(cuts: list[int], content: bytes) -> None:
    digests = Digests(SIZE, BLOCK, ZEROS)
    places = sorted({0, SIZE, *cuts})
    for start, end in itertools.pairwise(places):
        digests.note(Piece(start, end - start, content[start:end]))
    assert _all(digests) == _of(content)
    digests.note(Piece(0, SIZE, None))
    assert set(_all(digests)) == {ZEROS}


def test_what_is_not_noted_is_what_was_said() -> None:
    size = (REGION_BLOCKS + 1) * BLOCK
    zeros, unknown = Digests(size, BLOCK, ZEROS), Digests(size, BLOCK, UNKNOWN)
    assert zeros.numbers() == set()
    assert unknown.numbers() == {0, 1}
    zeros.note(Piece(REGION_BLOCKS * BLOCK, 1, b"x"))
    assert zeros.numbers() == {1}
    assert zeros.region(1) == Range(REGION_BLOCKS * BLOCK, size)
    assert unknown.of_region(1) == UNKNOWN
    # Of a part of a block of which the rest is not known, nothing is known.
    unknown.note(Piece(0, 1, b"x"))
    assert unknown.of_region(0)[:DIGEST_BYTES] == UNKNOWN
