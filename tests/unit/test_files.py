"""Small files as pieces, and what of one is sent again."""

import os
from pathlib import Path

import pytest

from blockdev.blocks import ZERO_STEP_BYTES
from migrator import images
from migrator.errors import PeerError
from migrator.files import differing, digests, read_file, write_file
from migrator.stream import MAX_PIECE_BYTES

STEP = ZERO_STEP_BYTES
LONG = bytes(range(256)) * ((2 * MAX_PIECE_BYTES + 3 * STEP) // 256)


@pytest.mark.parametrize(
    ("before", "now", "sent"),
    [
        (LONG, LONG, 0),
        (LONG, LONG[:STEP], 0),
        (LONG, LONG[:100] + b"!" + LONG[101:], STEP),
        (LONG, LONG[:STEP] + bytes(STEP) + LONG[2 * STEP :], STEP),
        (LONG, LONG[:MAX_PIECE_BYTES] + bytes(len(LONG) - MAX_PIECE_BYTES), len(LONG) - MAX_PIECE_BYTES),
        (LONG, LONG + b"more", 4),
        (LONG[: STEP + 5], LONG, len(LONG) - STEP),
        (b"", LONG, len(LONG)),
        (LONG, b"", 0),
    ],
)
def test_a_file_that_was_sent_before(tmp_path: Path, before: bytes, now: bytes, sent: int) -> None:
    (tmp_path / "before").write_bytes(before)
    (tmp_path / "now").write_bytes(now)
    for piece in read_file(tmp_path / "before"):
        write_file(tmp_path, "there", piece)
    pieces = list(differing(tmp_path / "now", digests(tmp_path / "before")))
    assert sum(piece.length for piece in pieces) == sent
    for piece in pieces:
        write_file(tmp_path, "there", piece)
    assert (tmp_path / "there").read_bytes()[: len(now)] == now


def test_an_image_that_memory_cannot_hold(tmp_path: Path) -> None:
    (tmp_path / "mm-1.img").write_bytes(b"header")
    os.truncate(tmp_path / "mm-1.img", 1 << 42)
    with pytest.raises(PeerError, match="memory"):
        images.read(tmp_path / "mm-1.img")
