"""Small files of a migration as pieces: CRIU's images and the container's log."""

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import xxhash

from blockdev.blocks import ZERO_STEP_BYTES, Piece, split_zeros
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


def digests(path: Path) -> list[bytes]:
    """Of each block of 64 KiB, XXH3-128."""
    return [xxhash.xxh3_128_digest(block) for block in _blocks(path)]


def differing(path: Path, known: Sequence[bytes]) -> Iterator[Piece]:
    """What is to be written to a file with these `digests` so that it begins as the one at `path` is. Zeros come as
    bytes: what is there already would stay."""
    for number, block in enumerate(_blocks(path)):
        if number >= len(known) or known[number] != xxhash.xxh3_128_digest(block):
            yield Piece(number * ZERO_STEP_BYTES, len(block), block)


def _blocks(path: Path) -> Iterator[bytes]:
    with path.open("rb", buffering=MAX_PIECE_BYTES) as file:
        while block := file.read(ZERO_STEP_BYTES):
            yield block


def write_file(folder: Path, name: str, piece: Piece) -> None:
    """Store one piece of a file of that folder. Raises PeerError for a name or an offset that no image has."""
    if not IMAGE_NAME.fullmatch(name):
        raise PeerError(f"{wire.shown(name)} is no name of an image")
    if piece.offset < 0 or piece.length < 0 or piece.offset + piece.length > MAX_FILE_BYTES:
        raise PeerError(f"{name}: a piece that ends at {piece.offset + piece.length}")
    descriptor = os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        end = piece.offset + piece.length
        wire.check_room(descriptor, 0 if piece.data is None else piece.length)
        if piece.data is None:
            if os.fstat(descriptor).st_size < end:
                os.ftruncate(descriptor, end)
        else:
            at, rest = piece.offset, memoryview(piece.data)
            while rest:
                count = os.pwrite(descriptor, rest, at)
                at, rest = at + count, rest[count:]
    finally:
        os.close(descriptor)
