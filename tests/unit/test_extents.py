"""Ranges of bytes: merged, cut, and found in sparse files."""

import itertools
import os
import tempfile
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from blockdev import extents, fiemap
from blockdev.extents import Range

PAGE = 4096
ranges = st.lists(
    st.builds(lambda start, length: Range(start, start + length), st.integers(0, 200), st.integers(0, 40))
)


def _bytes(parts: list[Range]) -> set[int]:
    return {at for part in parts for at in range(part.start, part.end)}


@given(ranges)
def test_merged_ranges_are_the_same_bytes_in_order_and_apart(parts: list[Range]) -> None:
    merged = extents.merge(parts)
    assert _bytes(merged) == _bytes(parts)
    assert all(before.end < after.start for before, after in itertools.pairwise(merged))
    assert all(part.length > 0 for part in merged)
    assert extents.total(merged) == len(_bytes(parts))


@given(ranges, ranges)
def test_what_is_in_both_and_in_one_alone(left: list[Range], right: list[Range]) -> None:
    merged, other = extents.merge(left), extents.merge(right)
    both, rest = extents.intersect(merged, other), extents.subtract(merged, other)
    assert _bytes(both) == _bytes(left) & _bytes(right)
    assert _bytes(rest) == _bytes(left) - _bytes(right)
    assert extents.total(both) + extents.total(rest) == extents.total(merged)
    assert extents.intersect(other, merged) == both


@given(ranges, st.integers(1, 50))
def test_pieces_are_the_same_bytes_and_cross_no_boundary(parts: list[Range], longest: int) -> None:
    pieces = list(extents.pieces(parts, longest))
    assert [at for piece in pieces for at in range(piece.start, piece.end)] == [
        at for part in parts for at in range(part.start, part.end)
    ]
    assert all(0 < piece.length <= longest for piece in pieces)
    assert all(piece.start // longest == (piece.end - 1) // longest for piece in pieces)


@given(st.sets(st.integers(0, 63)), st.integers(1, 64 * PAGE), st.integers(0, 64 * PAGE))
def test_what_a_sparse_file_holds_is_found(pages: set[int], size: int, start: int) -> None:
    with tempfile.TemporaryFile() as file:
        descriptor = file.fileno()
        for page in pages:
            os.pwrite(descriptor, b"x" * PAGE, page * PAGE)
        os.truncate(descriptor, 64 * PAGE)
        found = list(fiemap.allocated(descriptor, size, start))
        assert found == extents.merge(found)
        assert all(start <= part.start and part.end <= size for part in found)
        written = {at // PAGE for at in range(start // PAGE * PAGE, size, PAGE) if at // PAGE in pages}
        # A file system may hold more than was written, never less.
        held = {at // PAGE for part in found for at in range(part.start // PAGE * PAGE, part.end, PAGE)}
        assert written <= held | ({start // PAGE} if start >= size else set())


def test_a_hole_holds_nothing(tmp_path: Path) -> None:
    with (tmp_path / "hole").open("xb") as file:
        os.truncate(file.fileno(), 1 << 30)
        assert list(fiemap.allocated(file.fileno(), 1 << 30)) == []
