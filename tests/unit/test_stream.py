"""Pieces survive the wire, and nothing else does."""

import os
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import xxhash
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from blockdev.blocks import Piece, batches, split_zeros
from migrator.errors import Cancelled, PeerError
from migrator.stream import MAX_PIECE_BYTES, Compression, Digests, Meter, Receiver, Sender
from migrator.v1 import peer_pb2

BLOCKS = st.lists(
    st.one_of(
        st.just(bytes(65536)),
        st.binary(min_size=1, max_size=300),
        st.binary(min_size=1, max_size=8).map(lambda b: b * 9000),
    ),
    max_size=8,
)


def _join(pieces: list[Piece]) -> bytes:
    return b"".join(bytes(p.length) if p.data is None else bytes(p.data) for p in pieces)


@given(BLOCKS)
def test_what_is_sent_arrives(blocks: list[bytes]) -> None:
    data = b"".join(blocks)
    sent, stored = Digests(), Digests()
    sender, receiver = Sender("m", 1, sent, Meter()), Receiver(stored)
    requests = list(sender.requests("image/pages-1.img", split_zeros(0, data)))
    pieces = [receiver.piece(peer_pb2.SendRequest.FromString(r.SerializeToString())) for r in requests]
    assert _join(pieces) == data
    assert sent.all() == stored.all()


PIECES = st.lists(
    st.tuples(
        st.integers(0, 1 << 40),
        st.one_of(st.just(bytes(4096)), st.binary(min_size=1, max_size=9).map(lambda b: b * 9000)),
    ),
    max_size=40,
)


@given(PIECES)
def test_many_in_one_arrive(given: list[tuple[int, bytes]]) -> None:
    """In order, with zeros between them, and few requests for many pieces."""
    pieces = [Piece(offset, len(data), data if any(data) else None) for offset, data in given]
    sent, stored = Digests(), Digests()
    meter = Meter()
    sender, receiver = Sender("m", 1, sent, meter), Receiver(stored)
    requests = list(sender.batches("memory/1", batches(pieces)))
    arrived = [
        piece
        for request in requests
        for piece in receiver.pieces(peer_pb2.SendRequest.FromString(request.SerializeToString()))
    ]
    assert arrived == pieces
    assert sent.all() == stored.all()
    assert meter.content_bytes.get("memory", 0) == sum(piece.length for piece in pieces)
    bytes_sent = sum(piece.length for piece in pieces if piece.data)
    assert len(requests) <= 1 + 2 * bytes_sent // MAX_PIECE_BYTES


def test_zeros_carry_no_bytes() -> None:
    sender = Sender("m", 1, Digests(), Meter())
    requests = list(sender.requests("volume/0", split_zeros(0, bytes(1 << 20))))
    assert [(r.offset, r.length, r.data) for r in requests] == [(0, 1 << 20, b"")]


def _plain(data: bytes, **changes: Any) -> peer_pb2.SendRequest:
    values: dict[str, Any] = {
        "target": "volume/0",
        "length": len(data),
        "encoding": peer_pb2.ENCODING_PLAIN,
        "data": data,
        "checksum": xxhash.xxh3_64_intdigest(data),
    }
    return peer_pb2.SendRequest(**{**values, **changes})


BOMB = zstandard.ZstdCompressor().compress(bytes(1 << 30))


@pytest.mark.parametrize(
    "request_",
    [
        _plain(b"abc", checksum=1),
        _plain(b"abc", length=4),
        _plain(b"abc", offset=-1),
        _plain(b"abc", length=-3),
        _plain(b"abc", encoding=99),
        _plain(b"abc", encoding=peer_pb2.ENCODING_ZSTD),
        _plain(b"abc", encoding=peer_pb2.ENCODING_ZEROS),
        _plain(BOMB, encoding=peer_pb2.ENCODING_ZSTD, length=MAX_PIECE_BYTES),
        _plain(bytes(8), length=MAX_PIECE_BYTES + 1),
        _plain(zstandard.ZstdCompressor().compress(b"a" * 100) + b"tail", encoding=peer_pb2.ENCODING_ZSTD, length=100),
    ],
    ids=lambda r: f"{r.encoding}-{r.offset}-{r.length}",
)
def test_damaged_pieces_are_refused(request_: peer_pb2.SendRequest) -> None:
    with pytest.raises(PeerError):
        Receiver(Digests()).piece(request_)


@given(
    st.lists(st.tuples(st.text(min_size=1, max_size=20), st.binary(max_size=9).map(lambda b: b * 20_000)), max_size=20)
)
def test_small_files_arrive(given: list[tuple[str, bytes]]) -> None:
    sent, stored = Digests(), Digests()
    sender, receiver = Sender("m", 1, sent, Meter()), Receiver(stored)
    requests = list(sender.files("images", given))
    found = [file for r in requests for file in receiver.files(peer_pb2.SendRequest.FromString(r.SerializeToString()))]
    assert found == given
    assert sent.all() == stored.all()
    assert all(len(request.data) <= MAX_PIECE_BYTES for request in requests)
    assert len(requests) <= 1 + 2 * sum(len(content) for _, content in given) // MAX_PIECE_BYTES


@pytest.mark.parametrize(("data", "parts"), [(b"abc", [3]), (b"abc", [1, 1]), (b"abc", [4, -1]), (b"\xffbc", [1, 2])])
def test_files_that_do_not_fit_together_are_refused(data: bytes, parts: list[int]) -> None:
    with pytest.raises(PeerError):
        Receiver(Digests()).files(_plain(data, parts=parts))


@pytest.mark.parametrize("parts", [[0], [0, 2], [0, 4], [0, 2, 0, 2], [-1, 3], [0, 3, 5, 1]])
def test_pieces_that_do_not_fit_together_are_refused(parts: list[int]) -> None:
    with pytest.raises(PeerError):
        Receiver(Digests()).pieces(_plain(b"abc", parts=parts))
    with pytest.raises(PeerError):
        Receiver(Digests()).piece(_plain(b"abc", parts=[0, 3]))


def test_a_lost_piece_shows_in_the_digest() -> None:
    sent, stored = Digests(), Digests()
    sender, receiver = Sender("m", 1, sent, Meter()), Receiver(stored)
    requests = list(sender.requests("volume/0", [Piece(0, 3, b"abc"), Piece(3, 3, b"def")]))
    receiver.piece(requests[0])
    assert sent.all() != stored.all()


def test_compression_pays_on_a_slow_link_only() -> None:
    compression = Compression()
    compression.compress(b"compressible " * 80000)
    compression.link(1 << 20, 1.0)
    assert compression.pays()
    for _ in range(50):
        compression.link(1 << 30, 0.001)
    assert not all(compression.pays() for _ in range(3))


def test_random_bytes_are_sent_plain() -> None:
    sender = Sender("m", 1, Digests(), Meter())
    (request,) = sender.requests("volume/0", [Piece(0, 65536, os.urandom(65536))])
    assert request.encoding == peer_pb2.ENCODING_PLAIN


def test_a_bandwidth_limit_holds_for_all_streams_together() -> None:
    """Nothing may be faster; a machine that is busy is slower."""
    limit_bytes_per_s, count = 40 << 20, 8
    meter = Meter(limit_bytes_per_s)
    data = os.urandom(MAX_PIECE_BYTES)

    def send(target: str) -> None:
        sender = Sender("m", 1, Digests(), meter)
        assert len(list(sender.requests(target, [Piece(0, len(data), data)] * count))) == count

    began = time.monotonic()
    with ThreadPoolExecutor(2) as streams:
        list(streams.map(send, ("memory/1", "volume/0")))
    assert meter.content_bytes == {"memory": count * len(data), "volume": count * len(data)}
    assert meter.wire_bytes / (time.monotonic() - began) <= limit_bytes_per_s


def test_who_waits_for_the_limit_is_told_when_it_has_to_end() -> None:
    def check() -> None:
        raise Cancelled("cancelled before the handover")

    sender = Sender("m", 1, Digests(), Meter(1, check))
    with pytest.raises(Cancelled):
        list(sender.requests("log", [Piece(0, 4, b"line")]))
