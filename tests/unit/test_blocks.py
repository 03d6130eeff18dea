"""Contents of volumes as pieces: zeros found, read from sparse files, written with holes, bounds kept."""

import itertools
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blockdev import blocks, fiemap
from blockdev.blocks import ALIGNMENT, HOLE_SEARCH_BYTES, ZERO_STEP_BYTES, Piece
from blockdev.errors import BlockError
from blockdev.extents import Range

SIZE = 4 << 20
PAGES = SIZE // ALIGNMENT

# Runs of data of whole pages in a file of SIZE bytes.
data_runs = st.lists(st.tuples(st.integers(0, PAGES - 1), st.integers(1, 300)), max_size=6)
range_lists = st.lists(
    st.tuples(st.integers(0, SIZE - 1), st.integers(1, SIZE)).map(lambda t: Range(t[0], min(SIZE, t[0] + t[1]))),
    max_size=8,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    yield tmp_path_factory.mktemp("blocks")


def _joined(pieces: list[Piece]) -> bytes:
    return b"".join(bytes(piece.length) if piece.data is None else bytes(piece.data) for piece in pieces)


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 3 * ZERO_STEP_BYTES)), max_size=5), st.integers(0, 1 << 40))
@settings(max_examples=50)
def test_splitting_off_zeros_loses_nothing(runs: list[tuple[bool, int]], offset: int) -> None:
    data = b"".join((b"x" if filled else b"\0") * length for filled, length in runs)
    pieces = list(blocks.split_zeros(offset, data))
    assert _joined(pieces) == data
    at = offset
    for piece in pieces:
        assert piece.offset == at and piece.length > 0
        at += piece.length
    zeros = [piece.data is None for piece in pieces]
    assert all(before != after for before, after in itertools.pairwise(zeros))
    for start in range(0, len(data) - ZERO_STEP_BYTES + 1, ZERO_STEP_BYTES):
        if not any(data[start : start + ZERO_STEP_BYTES]):
            assert any(p.data is None and p.offset <= offset + start < p.offset + p.length for p in pieces)


@given(data_runs, range_lists, st.booleans(), st.sampled_from([1 << 16, 1 << 18, 1 << 20]))
@settings(max_examples=40, deadline=None)
def test_what_is_read_and_written_elsewhere_is_the_same(
    runs: list[tuple[int, int]], ranges: list[Range], with_image: bool, piece_bytes: int
) -> None:
    with tempfile.TemporaryDirectory() as work:
        source, target = Path(work) / "source", Path(work) / "target"
        content = bytearray(SIZE)
        with source.open("xb") as file:
            os.truncate(file.fileno(), SIZE)
            for number, (page, count) in enumerate(runs):
                start, end = page * ALIGNMENT, min(SIZE, (page + count) * ALIGNMENT)
                content[start:end] = bytes([number + 1]) * (end - start)
                os.pwrite(file.fileno(), content[start:end], start)
        # Where nothing is read, the target keeps what it had.
        target.write_bytes(b"\xff" * SIZE)
        expected = bytearray(b"\xff" * SIZE)
        direct, plain, out = blocks.open_direct(source), os.open(source, os.O_RDONLY), os.open(target, os.O_RDWR)
        try:
            at = 0
            for piece in blocks.read(direct, ranges, piece_bytes, image=plain if with_image else None):
                assert piece.offset >= at
                assert piece.data is None or piece.length == len(piece.data) <= piece_bytes
                at = piece.offset + piece.length
                blocks.write(out, piece, SIZE)
        finally:
            for descriptor in (direct, plain, out):
                os.close(descriptor)
        for part in ranges:
            start, end = part.start // ALIGNMENT * ALIGNMENT, -(-part.end // ALIGNMENT) * ALIGNMENT
            expected[start:end] = content[start:end]
        assert target.read_bytes() == expected


def test_pieces_stay_as_they_were_when_more_is_read(tmp_path: Path) -> None:
    content = os.urandom(8 << 20)
    (tmp_path / "image").write_bytes(content)
    descriptor = blocks.open_direct(tmp_path / "image")
    try:
        assert _joined(list(blocks.read(descriptor, [Range(0, len(content))]))) == content
    finally:
        os.close(descriptor)


def test_reading_may_be_given_up_at_any_piece(tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(os.urandom(16 << 20))
    descriptor = blocks.open_direct(tmp_path / "image")
    try:
        pieces = blocks.read(descriptor, [Range(0, 16 << 20)])
        assert next(pieces).offset == 0
        pieces.close()  # type: ignore[attr-defined]
    finally:
        os.close(descriptor)


def test_an_error_of_the_device_reaches_the_reader(tmp_path: Path) -> None:
    descriptor = os.open(tmp_path, os.O_RDONLY)
    try:
        with pytest.raises(IsADirectoryError):
            list(blocks.read(descriptor, [Range(0, 8 << 20)]))
    finally:
        os.close(descriptor)


def test_the_end_of_an_image_of_an_odd_size_is_read(tmp_path: Path) -> None:
    content = os.urandom(3 * ALIGNMENT + 100)
    (tmp_path / "image").write_bytes(content)
    descriptor = blocks.open_direct(tmp_path / "image")
    try:
        assert _joined(list(blocks.read(descriptor, [Range(ALIGNMENT, 1 << 20)]))) == content[ALIGNMENT:]
    finally:
        os.close(descriptor)


def test_a_long_hole_is_one_piece_of_zeros(tmp_path: Path) -> None:
    with (tmp_path / "image").open("xb") as file:
        os.truncate(file.fileno(), 1 << 40)
        pieces = list(blocks.read(file.fileno(), [Range(HOLE_SEARCH_BYTES, 1 << 40)], image=os.dup(file.fileno())))
    assert pieces == [Piece(HOLE_SEARCH_BYTES, (1 << 40) - HOLE_SEARCH_BYTES, None)]


def test_zeros_become_holes(tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(b"x" * SIZE)
    descriptor = os.open(image, os.O_RDWR)
    try:
        blocks.write(descriptor, Piece(0, SIZE, None), SIZE)
        assert list(fiemap.allocated(descriptor, SIZE)) == []
    finally:
        os.close(descriptor)
    assert image.stat().st_size == SIZE


@pytest.mark.parametrize(("offset", "length"), [(-1, 1), (0, 0), (0, -5), (SIZE, 1), (SIZE - 1, 2), (1 << 63, 1)])
@pytest.mark.parametrize("zeros", [True, False])
def test_what_lies_outside_the_volume_is_refused(tmp_path: Path, offset: int, length: int, zeros: bool) -> None:
    image = tmp_path / "image"
    image.write_bytes(b"x" * ALIGNMENT)
    descriptor = os.open(image, os.O_RDWR)
    try:
        with pytest.raises(BlockError, match="not within a volume"):
            blocks.write(descriptor, Piece(offset, length, None if zeros else b"y" * max(length, 0)), SIZE)
    finally:
        os.close(descriptor)
    assert image.read_bytes() == b"x" * ALIGNMENT
