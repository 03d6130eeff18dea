"""What a volume holds, as digests of its chunks that do not depend on which of its zeros are holes."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor

import xxhash

from blockdev import blocks, extents, fiemap
from blockdev.blocks import Piece
from blockdev.extents import Range
from migrator.errors import PeerError
from migrator.v1 import peer_pb2

BLOCK_BYTES = blocks.ZERO_STEP_BYTES
CHUNK_BYTES = 64 << 20
DIGEST_BYTES = 16

# Chunks in one answer.
_RUN = 1024

Chunks = Mapping[int, bytes]
"""Number of a chunk to its digest; a chunk of zeros is not there."""
Ask = Callable[[str, int], Iterable[peer_pb2.DigestVolumeResponse]]
"""Has the other end read the volume of a target, in chunks of so many bytes."""


def digests(descriptor: int, image: int, size_bytes: int, chunk_bytes: int) -> Iterator[tuple[int, bytes]]:
    """Each chunk that is not all zeros, in order: XXH3-128 over its blocks of 64 KiB that are not, with their numbers.

    `image` is the image file, which knows its holes; `descriptor` is read.
    """
    digest, chunk = xxhash.xxh3_128(), -1
    for piece in blocks.read(descriptor, widened(fiemap.allocated(image, size_bytes), size_bytes)):
        if piece.data is None:
            continue
        for at in range(0, piece.length, BLOCK_BYTES):
            offset = piece.offset + at
            if offset // chunk_bytes != chunk:
                if chunk >= 0:
                    yield chunk, digest.digest()
                digest, chunk = xxhash.xxh3_128(), offset // chunk_bytes
            digest.update(b"%d;" % (offset % chunk_bytes // BLOCK_BYTES))
            digest.update(piece.data[at : at + BLOCK_BYTES])
    if chunk >= 0:
        yield chunk, digest.digest()


def block_digest(data: bytes | memoryview) -> bytes:
    """Of one block, as `digests` has it with chunks of one block."""
    digest = xxhash.xxh3_128(b"0;")
    digest.update(data)
    return digest.digest()


def widened(ranges: Iterable[Range], size_bytes: int) -> list[Range]:
    """The ranges as whole blocks."""
    return extents.merge(
        Range(r.start // BLOCK_BYTES * BLOCK_BYTES, min(size_bytes, -(-r.end // BLOCK_BYTES) * BLOCK_BYTES))
        for r in ranges
    )


def answers(found: Iterable[tuple[int, bytes]]) -> Iterator[peer_pb2.DigestVolumeResponse]:
    """Digests for the wire: runs of chunks that follow each other."""
    run = peer_pb2.DigestVolumeResponse()
    for chunk, digest in found:
        if run.digests and (chunk != run.first_chunk + len(run.digests) or len(run.digests) == _RUN):
            yield run
            run = peer_pb2.DigestVolumeResponse()
        if not run.digests:
            run.first_chunk = chunk
        run.digests.append(digest)
    if run.digests:
        yield run


def chunks(runs: Iterable[peer_pb2.DigestVolumeResponse], size_bytes: int, chunk_bytes: int) -> dict[int, bytes]:
    """Digests from the wire. Raises PeerError for those of no chunk of such a volume."""
    found: dict[int, bytes] = {}
    for run in runs:
        for number, digest in enumerate(run.digests, run.first_chunk):
            if not 0 <= number * chunk_bytes < size_bytes or len(digest) != DIGEST_BYTES or number in found:
                raise PeerError(f"a digest of chunk {number} in a volume of {size_bytes} bytes")
            found[number] = digest
    return found


def compare(sizes: Mapping[str, int], ours: Iterable[tuple[str, Chunks]], ask: Ask) -> None:
    """Compare whole volumes at both ends, by target. Raises PeerError for one that differs."""
    with ThreadPoolExecutor(1) as beside:
        asked = {target: beside.submit(_chunks_there, ask, target, size) for target, size in sizes.items()}
        for target, here in ours:
            if here != (there := asked[target].result()):
                first = min(number for number in {*here, *there} if here.get(number) != there.get(number))
                at = first * CHUNK_BYTES
                raise PeerError(f"{target} differs at the two ends, first within 64 MiB from {at}", reason="VERIFY")


def _chunks_there(ask: Ask, target: str, size_bytes: int) -> Chunks:
    return chunks(ask(target, CHUNK_BYTES), size_bytes, CHUNK_BYTES)


def differing(pieces: Iterable[Piece], base: Chunks) -> Iterator[Piece]:
    """What of the pieces is not in a base whose chunks are blocks. Of data only whole blocks are found to be in it."""
    for piece in pieces:
        begin = None
        for part in extents.pieces([Range(piece.offset, piece.offset + piece.length)], BLOCK_BYTES):
            known, at = base.get(part.start // BLOCK_BYTES), part.start - piece.offset
            data = None if piece.data is None else memoryview(piece.data)[at : at + part.length]
            same = known is None if data is None else known is not None and known == block_digest(data)
            if same and begin is not None:
                yield _part(piece, begin, at)
                begin = None
            elif not same and begin is None:
                begin = at
        if begin is not None:
            yield _part(piece, begin, piece.length)


def _part(piece: Piece, begin: int, end: int) -> Piece:
    data = None if piece.data is None else memoryview(piece.data)[begin:end]
    return Piece(piece.offset + begin, end - begin, data)
