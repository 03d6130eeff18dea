"""Small files of a migration as pieces: CRIU's images and the container's log."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

from blockdev.blocks import Piece, split_zeros
from migrator import wire
from migrator.errors import PeerError
from migrator.stream import MAX_PIECE_BYTES

IMAGE_NAME = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9._-]{0,119}")
MAX_FILE_BYTES = 1 << 40


def read_file(path: Path, start: int = 0) -> Iterator[Piece]:
    """The file from `start` to its end as it is now, in pieces of which those of zeros carry no bytes.

    An empty file is one empty piece: it has to be there at the other end, too.
    """
    with path.open("rb", buffering=0) as file:
        file.seek(start)
        at = start
        if os.fstat(file.fileno()).st_size == 0:
            yield Piece(0, 0, None)
        while data := file.read(MAX_PIECE_BYTES):
            yield from split_zeros(at, data)
            at += len(data)


def write_file(folder: Path, name: str, piece: Piece) -> None:
    """Store one piece of a file of that folder. Raises PeerError for a name or an offset that no image has."""
    if not IMAGE_NAME.fullmatch(name):
        raise PeerError(f"{wire.shown(name)} is no name of an image")
    if piece.offset < 0 or piece.length < 0 or piece.offset + piece.length > MAX_FILE_BYTES:
        raise PeerError(f"{name}: a piece that ends at {piece.offset + piece.length}")
    descriptor = os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        end = piece.offset + piece.length
        if piece.data is None:
            if os.fstat(descriptor).st_size < end:
                os.ftruncate(descriptor, end)
        else:
            wire.check_room(descriptor, piece.length)
            at, rest = piece.offset, memoryview(piece.data)
            while rest:
                count = os.pwrite(descriptor, rest, at)
                at, rest = at + count, rest[count:]
    finally:
        os.close(descriptor)
