"""Pieces on the wire: what is sent of volumes, images and logs, compressed where it pays, checked at the other end.

A stream is a sequence of `SendRequest`, each a piece of one target at one offset. Zeros travel as a length. Both ends
fold every piece into a running digest per target, so that the end compares what was stored with what was meant.
"""

import struct
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise

import xxhash
import zstandard

from blockdev.blocks import BATCH_PIECES, Batch, Piece
from migrator import wire
from migrator.errors import PeerError
from migrator.v1 import peer_pb2

MAX_PIECE_BYTES = 1 << 20
CHECK_S = 0.1
ZSTD_LEVEL = 1
# Offsets and lengths. A batch that says whose they are has one more piece, and goes alone: older agents refuse that of
# any other.
_MOST_PARTS = 2 * BATCH_PIECES
_MOST_PARTS_OF_ANY = _MOST_PARTS + 2
# A piece that zstd does not shrink below this part of its size travels plain.
WORTH_SENDING_COMPRESSED = 0.9


class TargetDigest:
    """XXH3-128 over the pieces of one target in the order they were sent: offset, length, bytes (none for zeros)."""

    def __init__(self) -> None:
        self._hash = xxhash.xxh3_128()
        # Two streams are not to have the same target, but a stranger's may.
        self._lock = threading.Lock()

    def add(self, piece: Piece, checksum: int) -> None:
        """Fold one piece in by its own checksum, so that its bytes are read once."""
        with self._lock:
            self._hash.update(b"%d %d %d;" % (piece.offset, piece.length, checksum))

    def add_parts(self, parts: Sequence[int], checksum: int) -> None:
        """Fold many in that have one checksum."""
        packed = struct.pack(f"<{len(parts)}q", *parts)
        with self._lock:
            self._hash.update(b"%s %d;" % (packed, checksum))

    def digest(self) -> bytes:
        """16 bytes."""
        with self._lock:
            return self._hash.digest()


class Digests:
    """The digests of all targets of one migration; several streams may add at once, each to targets of its own."""

    def __init__(self) -> None:
        self._targets: dict[str, TargetDigest] = {}
        self._lock = threading.Lock()

    def of(self, target: str) -> TargetDigest:
        """The digest of this target, begun if need be. Raises PeerError for one target too many."""
        with self._lock:
            if target not in self._targets and len(self._targets) >= wire.MAX_TARGETS:
                raise PeerError(f"more than {wire.MAX_TARGETS} targets in one migration")
            return self._targets.setdefault(target, TargetDigest())

    def all(self) -> dict[str, bytes]:
        """Target to digest."""
        with self._lock:
            return {target: digest.digest() for target, digest in self._targets.items()}


@dataclass
class Meter:
    """What went out: bytes at the target, and bytes on the wire, which may be limited to a rate. `check` is asked while
    that has somebody wait, who gets what it raises."""

    limit_bytes_per_s: int = 0
    check: Callable[[], None] = lambda: None
    content_bytes: dict[str, int] = field(default_factory=dict)
    wire_bytes: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _due: float = 0.0

    def count(self, target: str, content: int, wire: int) -> None:
        """Add one piece, and sleep as long as the bandwidth limit asks for."""
        kind = target.partition("/")[0]
        with self._lock:
            self.content_bytes[kind] = self.content_bytes.get(kind, 0) + content
            self.wire_bytes += wire
            if not self.limit_bytes_per_s:
                return
            now = time.monotonic()
            self._due = max(self._due, now) + wire / self.limit_bytes_per_s
            due = self._due
        while (left := due - time.monotonic()) > 0:
            self.check()
            time.sleep(min(left, CHECK_S))


class Compression:
    """Decides piece by piece whether zstd makes the link faster, from what both have measured lately.

    Compressing pays if the link needs longer for the bytes that zstd takes away than zstd needs for the piece.
    """

    PROBE_EVERY = 16

    def __init__(self) -> None:
        self._compressor = zstandard.ZstdCompressor(level=ZSTD_LEVEL)
        self._link_bytes_per_s = 0.0
        self._zstd_bytes_per_s = 0.0
        self._saved_part = 0.0
        self._pieces = 0

    def link(self, wire_bytes: int, seconds: float) -> None:
        """The link took this long to accept these bytes."""
        if seconds > 0:
            self._link_bytes_per_s = _smooth(self._link_bytes_per_s, wire_bytes / seconds)

    def pays(self) -> bool:
        """Whether to try zstd on the next piece; every 16th is tried anyway, so that the estimate stays alive."""
        self._pieces += 1
        if not self._zstd_bytes_per_s or not self._link_bytes_per_s or self._pieces % self.PROBE_EVERY == 0:
            return True
        return self._saved_part / self._link_bytes_per_s > 1 / self._zstd_bytes_per_s

    def compress(self, data: bytes | memoryview) -> bytes | None:
        """The compressed piece, or None if it is not worth it."""
        began = time.perf_counter()
        packed = self._compressor.compress(data)
        elapsed = time.perf_counter() - began
        self._zstd_bytes_per_s = _smooth(self._zstd_bytes_per_s, len(data) / max(elapsed, 1e-9))
        self._saved_part = _smooth(self._saved_part, 1 - len(packed) / len(data))
        return packed if len(packed) < WORTH_SENDING_COMPRESSED * len(data) else None


def _smooth(old: float, new: float) -> float:
    return new if not old else 0.8 * old + 0.2 * new


class Sender:
    """Makes the requests of one `Send` stream."""

    def __init__(
        self, migration: str, epoch: int, digests: Digests, meter: Meter, sent: Callable[[], None] = lambda: None
    ) -> None:
        """`sent` is called after each piece; what it raises ends the stream."""
        self._sent = sent
        self._migration = migration
        self._epoch = epoch
        self._digests = digests
        self._meter = meter
        self._compression = Compression()

    def requests(self, target: str, pieces: Iterable[Piece]) -> Iterator[peer_pb2.SendRequest]:
        """The pieces of one target, each at most MAX_PIECE_BYTES long unless it is zeros."""
        for piece in pieces:
            request = self._request(target, piece)
            self._digests.of(target).add(piece, request.checksum)
            yield from self._out(request, piece.length)

    def batches(self, target: str, batches: Iterable[Batch]) -> Iterator[peer_pb2.SendRequest]:
        """The same with many small pieces in one request, which costs more than the bytes in it: for memory, of which a
        few pages here and there are written."""
        layout: list[int] = []
        data: list[bytes | memoryview] = []
        size = 0
        for batch in batches:
            if size + len(batch.data) > MAX_PIECE_BYTES or len(layout) + len(batch.layout) > _MOST_PARTS:
                yield from self._send(target, layout, b"".join(data))
                layout, data, size = [], [], 0
            layout += batch.layout
            data.append(batch.data)
            size += len(batch.data)
        yield from self._send(target, layout, b"".join(data))

    def files(self, target: str, contents: Iterable[tuple[str, bytes]]) -> Iterator[peer_pb2.SendRequest]:
        """Small files, each whole, as many to a request as fit."""
        waiting: list[tuple[str, bytes]] = []
        size = 0
        for name, content in contents:
            if waiting and (size + len(content) > MAX_PIECE_BYTES or len(waiting) == BATCH_PIECES):
                yield from self._send_files(target, waiting)
                waiting, size = [], 0
            waiting.append((name, content))
            size += len(content)
        if waiting:
            yield from self._send_files(target, waiting)

    def _send_files(self, target: str, batch: list[tuple[str, bytes]]) -> Iterator[peer_pb2.SendRequest]:
        words = [word for name, content in batch for word in (name.encode(), content)]
        parts, data = [len(word) for word in words], b"".join(words)
        request = self._request(target, Piece(0, len(data), data))
        request.parts.extend(parts)
        self._digests.of(target).add_parts(parts, request.checksum)
        yield from self._out(request, len(data))

    def _send(self, target: str, layout: list[int], data: bytes) -> Iterator[peer_pb2.SendRequest]:
        if not layout:
            return
        request = self._request(target, Piece(0, len(data), data or None))
        request.parts.extend(layout)
        self._digests.of(target).add_parts(layout, request.checksum)
        yield from self._out(request, sum(map(abs, layout[1::2])))

    def _out(self, request: peer_pb2.SendRequest, content_bytes: int) -> Iterator[peer_pb2.SendRequest]:
        wire = len(request.data) + len(request.target) + 64 + 6 * len(request.parts)
        self._meter.count(request.target, content_bytes, wire)
        began = time.perf_counter()
        yield request
        self._compression.link(wire, time.perf_counter() - began)
        self._sent()

    def _request(self, target: str, piece: Piece) -> peer_pb2.SendRequest:
        request = peer_pb2.SendRequest(
            migration=self._migration, epoch=self._epoch, target=target, offset=piece.offset, length=piece.length
        )
        if piece.data is None:
            request.encoding = peer_pb2.ENCODING_ZEROS
            return request
        request.checksum = xxhash.xxh3_64_intdigest(piece.data)
        packed = self._compression.compress(piece.data) if self._compression.pays() else None
        request.encoding = peer_pb2.ENCODING_PLAIN if packed is None else peer_pb2.ENCODING_ZSTD
        request.data = bytes(piece.data) if packed is None else packed
        return request


class Receiver:
    """Turns requests back into pieces, trusting nothing in them."""

    def __init__(self, digests: Digests) -> None:
        self._digests = digests
        # Streams are side by side, each in a thread, and a decompressor is one thread's.
        self._decompressors = threading.local()

    def piece(self, request: peer_pb2.SendRequest) -> Piece:
        """The only piece of one request. Raises PeerError if its length, encoding or checksum is wrong."""
        if request.parts:
            raise PeerError(f"{wire.shown(request.target)}: many pieces in one")
        piece = self._checked(request)
        self._digests.of(request.target).add(piece, request.checksum)
        return piece

    def pieces(self, request: peer_pb2.SendRequest) -> list[Piece]:
        """All pieces of one request that `batches` may have made. Raises as `piece` does."""
        if not request.parts:
            return [self.piece(request)]
        if len(request.parts) > _MOST_PARTS_OF_ANY:
            raise PeerError(f"{wire.shown(request.target)}: {len(request.parts) // 2} pieces in one")
        data = memoryview(self._checked(request).data or b"")
        layout = list(request.parts)
        offsets, lengths = layout[::2], layout[1::2]
        with_bytes = sum([length for length in lengths if length > 0])
        if len(offsets) != len(lengths) or min(offsets) < 0 or with_bytes != len(data):
            raise PeerError(f"{wire.shown(request.target)}: pieces that do not fit together")
        self._digests.of(request.target).add_parts(layout, request.checksum)
        found, at = [], 0
        for offset, length in zip(offsets, lengths, strict=True):
            if length > 0:
                found.append(Piece(offset, length, data[at : at + length]))
                at += length
            else:
                found.append(Piece(offset, -length, None))
        return found

    def files(self, request: peer_pb2.SendRequest) -> list[tuple[str, bytes]]:
        """Names and contents of one request that `Sender.files` may have made. Raises as `piece` does."""
        data = bytes(self._checked(request).data or b"")
        if len(request.parts) % 2 or min(request.parts, default=0) < 0 or sum(request.parts) != len(data):
            raise PeerError(f"{request.target}: files that do not fit together")
        self._digests.of(request.target).add_parts(request.parts, request.checksum)
        ends = list(accumulate(request.parts))
        words = [data[start:end] for start, end in pairwise([0, *ends])]
        try:
            return [(name.decode(), content) for name, content in zip(words[::2], words[1::2], strict=True)]
        except UnicodeDecodeError as error:
            raise PeerError(f"{request.target}: a name that is none") from error

    def _checked(self, request: peer_pb2.SendRequest) -> Piece:
        data = self._data(request)
        if request.offset < 0 or request.length < 0:
            raise PeerError(f"{wire.shown(request.target)}: a piece of {request.length} bytes at {request.offset}")
        if data is not None and xxhash.xxh3_64_intdigest(data) != request.checksum:
            at = f"{wire.shown(request.target)}: the piece at {request.offset}"
            raise PeerError(f"{at} arrived damaged", reason="CHECKSUM")
        return Piece(request.offset, request.length, data)

    def _data(self, request: peer_pb2.SendRequest) -> bytes | None:
        if request.encoding == peer_pb2.ENCODING_ZEROS:
            if request.data or request.checksum:
                raise PeerError(f"{wire.shown(request.target)}: zeros that carry bytes")
            return None
        if request.length > MAX_PIECE_BYTES:
            too_long = f"a piece of {request.length} bytes; {MAX_PIECE_BYTES} is the limit"
            raise PeerError(f"{wire.shown(request.target)}: {too_long}")
        data = request.data
        if request.encoding == peer_pb2.ENCODING_ZSTD:
            try:
                # The frame says how much memory unpacking takes: it is asked before that is allocated.
                if zstandard.frame_content_size(data) != request.length:
                    raise PeerError(f"{wire.shown(request.target)}: a frame of another length at {request.offset}")
                data = self._decompressor().decompress(data, allow_extra_data=False)
            except zstandard.ZstdError as error:
                raise PeerError(
                    f"{wire.shown(request.target)}: the piece at {request.offset} cannot be unpacked: {error}"
                ) from error
        elif request.encoding != peer_pb2.ENCODING_PLAIN:
            raise PeerError(f"{wire.shown(request.target)}: unknown encoding {request.encoding}")
        if len(data) != request.length:
            raise PeerError(
                f"{wire.shown(request.target)}: {len(data)} bytes at {request.offset} instead of {request.length}"
            )
        return data

    def _decompressor(self) -> zstandard.ZstdDecompressor:
        own = self._decompressors
        if not hasattr(own, "zstd"):
            own.zstd = zstandard.ZstdDecompressor()
        made: zstandard.ZstdDecompressor = own.zstd
        return made
