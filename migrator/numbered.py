"""Streams of pieces that go on where they were when their connection has broken.

Each piece of a stream has a number. The destination stores them in order and now and then says how far it is; the
source keeps what it has not heard of, and sends that again on a new connection. Nothing is read twice or stored twice,
and the digests of both ends stay equal.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterator

from migrator.errors import PeerError
from migrator.v1 import peer_pb2

# What a source keeps of a stream: two seconds of a link of 256 Mbit/s, and more than 100 Gbit/s need for a round trip.
WINDOW_BYTES = 64 << 20
# How often the destination says how far it is.
ANSWER_PIECES = 64
ANSWER_BYTES = 8 << 20
MAX_STREAMS = 1000


class Outbound:
    """The source's end of one stream. An attempt is one connection; the last one counts."""

    def __init__(self, number: int, requests: Iterator[peer_pb2.SendRequest]) -> None:
        self._stream = number
        self._requests = requests
        self._window: deque[peer_pb2.SendRequest] = deque()
        self._window_bytes = 0
        self._sent = 0
        self._attempt = 0
        self._answered = False
        self._first: peer_pb2.SendRequest | None = None
        self._failure: BaseException | None = None
        self._reading = threading.Lock()
        self._changed = threading.Condition()

    def attempt(self) -> Iterator[peer_pb2.SendRequest]:
        """What to send on a new connection; an iterator of an earlier attempt ends."""
        with self._changed:
            self._attempt += 1
            attempt, again = self._attempt, self._first
            self._answered = False
            self._changed.notify_all()
        return self._pieces(attempt, again)

    def answered(self, answer: peer_pb2.SendResponse) -> None:
        """Forget what the destination has stored. Raises PeerError if it says what cannot be."""
        with self._changed:
            if not self.confirmed <= answer.received <= self._sent:
                raise PeerError(f"{answer.received} pieces of a stream are said to have arrived, of {self._sent} sent")
            while self._window and self._window[0].number <= answer.received:
                self._window_bytes -= len(self._window.popleft().data)
            self._answered = True
            self._changed.notify_all()

    @property
    def confirmed(self) -> int:
        """How many pieces the destination has."""
        return self._sent - len(self._window)

    def close(self) -> None:
        """End every attempt, and wait for one that is reading a piece: what is read is left to the caller again."""
        with self._changed:
            self._attempt += 1
            self._changed.notify_all()
        with self._reading:
            pass

    def check(self) -> None:
        """Raises what the pieces' own source has raised, of which gRPC says only that the stream broke."""
        if self._failure is not None:
            raise self._failure

    def check_complete(self) -> None:
        """Raises PeerError if the destination has ended the stream without having everything."""
        if self._window:
            raise PeerError(f"the stream ended with {len(self._window)} pieces that were not confirmed")

    def _pieces(self, attempt: int, again: peer_pb2.SendRequest | None) -> Iterator[peer_pb2.SendRequest]:
        if again is not None:
            yield peer_pb2.SendRequest(migration=again.migration, epoch=again.epoch, stream=self._stream)
            if not self._wait(attempt, lambda: self._answered):
                return
            with self._changed:
                kept = list(self._window)
            yield from kept
        while (request := self._next(attempt)) is not None:
            yield request

    def _next(self, attempt: int) -> peer_pb2.SendRequest | None:
        # An attempt whose connection has broken may still be reading a piece: that is then the next one's.
        with self._reading:
            if not self._wait(attempt, lambda: self._window_bytes < WINDOW_BYTES):
                return None
            try:
                request = next(self._requests, None)
            except BaseException as error:
                self._failure = error
                raise
            if request is None:
                return None
            with self._changed:
                self._sent += 1
                request.stream, request.number = self._stream, self._sent
                self._first = self._first or request
                self._window.append(request)
                self._window_bytes += len(request.data)
                return request if attempt == self._attempt else None

    def _wait(self, attempt: int, until: Callable[[], bool]) -> bool:
        """Whether it became so while this was the last attempt."""
        with self._changed:
            self._changed.wait_for(lambda: attempt != self._attempt or until())
            return attempt == self._attempt


class _Stream:
    def __init__(self) -> None:
        self.received = 0
        self.turn = 0
        self.lock = threading.Lock()


class Inbound:
    """The destination's end of all streams of one migration."""

    def __init__(self, store: Callable[[peer_pb2.SendRequest], None]) -> None:
        self._store = store
        self._streams: dict[int, _Stream] = {}
        self._lock = threading.Lock()

    def receive(
        self, first: peer_pb2.SendRequest, requests: Iterator[peer_pb2.SendRequest]
    ) -> Iterator[peer_pb2.SendResponse]:
        """Store what comes on one connection. Raises PeerError for a piece out of its turn."""
        stream = self._stream(first.stream)
        with stream.lock:
            stream.turn += 1
            turn = stream.turn
        pieces = size = 0
        request: peer_pb2.SendRequest | None = first
        while request is not None:
            if request.stream != first.stream:
                raise PeerError("pieces of two streams in one", reason="OUT_OF_ORDER")
            if request.number:
                self._take(stream, turn, request)
                pieces, size = pieces + 1, size + len(request.data)
            if not request.number or pieces >= ANSWER_PIECES or size >= ANSWER_BYTES:
                yield peer_pb2.SendResponse(received=stream.received)
                pieces = size = 0
            request = next(requests, None)
        yield peer_pb2.SendResponse(received=stream.received)

    def _stream(self, number: int) -> _Stream:
        with self._lock:
            if number not in self._streams and len(self._streams) >= MAX_STREAMS:
                raise PeerError(f"more than {MAX_STREAMS} streams in one migration")
            return self._streams.setdefault(number, _Stream())

    def _take(self, stream: _Stream, turn: int, request: peer_pb2.SendRequest) -> None:
        with stream.lock:
            if turn != stream.turn:
                raise PeerError("this stream goes on with another connection", reason="OUT_OF_ORDER")
            if request.number != stream.received + 1:
                raise PeerError(f"piece {request.number} of a stream that has {stream.received}", reason="OUT_OF_ORDER")
            self._store(request)
            stream.received += 1
