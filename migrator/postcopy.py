"""Post-copy: memory that was written faster than it could be sent is pulled after the handover.

The destination asks (`Puller`), for pages that a process waits for first and for the rest in order, never for more at a
time than keeps the link busy, so that an urgent page has little to wait for. The source answers from the copy that
stands still there (`lend`), and keeps nothing of who has what: each request says what is missing, so a connection that
breaks, and either agent, may be replaced at any time.

Lost are only pages whose last copy is: then the container is killed, never left to read what it has not written.
"""

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Protocol

import structlog

from blockdev import blocks, extents
from blockdev.blocks import Batch, Piece
from blockdev.errors import BlockError
from blockdev.extents import Range
from migrator import faults, wire
from migrator.errors import InvalidArgument, MigratorError, PeerError, Precondition
from migrator.fill import missing
from migrator.fill import store as page_store
from migrator.fill.missing import Marks, Pipes
from migrator.fill.store import ADDRESS_END, PAGE_BYTES
from migrator.handover import Incoming
from migrator.stream import Digests, Receiver, Sender
from migrator.v1 import peer_pb2
from migrator.waiting import readable

FEATURE = "postcopy-v1"

REQUEST_BYTES, REQUEST_RANGES = 512 << 10, 1024
# Asked for and not here yet: what an urgent page waits for at the most.
WINDOW_BYTES = 2 * REQUEST_BYTES
# Around a page that is waited for.
URGENT_BYTES = max(16 << 10, PAGE_BYTES)
RETRY_S = 0.5
# How soon it is seen that the container runs.
WAIT_S = 0.01

Requests = Iterator[peer_pb2.PullMemoryRequest]
Responses = Iterator[peer_pb2.PullMemoryResponse]
Read = Callable[[int, list[Range]], Iterator[Batch]]

# What a source says that has the memory no more, or knows nothing of it.
LOST = ("MEMORY_LOST", "MIGRATION_NOT_FOUND")

log = structlog.get_logger()


class MemoryLost(Precondition):
    """The copy that pages were to be pulled from is not there any more."""

    reason = LOST[0]


class Lent(Protocol):
    """A stream of memory from the source."""

    def __iter__(self) -> Responses: ...

    def close(self) -> None:
        """End it, from any thread."""


Lend = Callable[[Incoming, Requests], Lent]


def lend(requests: Requests, read: Read, sender: Sender) -> Responses:
    """The source's end. `read` gives what is in ranges of a process that stands still, by its pid in the container, and
    raises MemoryLost where that copy was given up."""
    for request in requests:
        for piece in sender.batches(f"memory/{request.pid}", read(request.pid, _ranges(request))):
            yield peer_pb2.PullMemoryResponse(piece=piece)
        faults.point("source.pulled")


def _ranges(request: peer_pb2.PullMemoryRequest) -> list[Range]:
    words = request.ranges
    found = [Range(start, start + length) for start, length in zip(words[::2], words[1::2], strict=False)]
    if (
        len(words) % 2
        or any(part.start < 0 or part.start >= part.end or part.end > ADDRESS_END for part in found)
        or any(word % PAGE_BYTES for word in words)
        or sum(part.length for part in found) > blocks.PIECE_BYTES
    ):
        raise InvalidArgument("ranges of memory that cannot be asked for")
    return found


class Puller:
    """The destination's end: a thread that works until nothing is missing in the store, or `close`.

    `lend` opens a stream to the source; `lost` is told why the rest can never come. Before `hasten` nothing comes but
    what somebody waits for: until the container runs, all else would only be in its way.
    """

    def __init__(self, record: Incoming, store: Path, lend: Lend, lost: Callable[[str], None]) -> None:
        self._record = record
        self._store = store
        self._lend = lend
        self._lost = lost
        self._closed = threading.Event()
        self._runs = threading.Event()
        self._stream: Lent | None = None
        self._thread = threading.Thread(target=self._run, name=f"pull {record.migration}", daemon=True)
        self._thread.start()

    @property
    def is_working(self) -> bool:
        return self._thread.is_alive()

    def hasten(self) -> None:
        """The container runs: have all the rest come."""
        self._runs.set()

    def close(self) -> None:
        """Nothing in the store is open or changed any more on return."""
        self._closed.set()
        if self._stream is not None:
            self._stream.close()
        self._thread.join()

    def _run(self) -> None:
        left = before = 0
        while not self._closed.is_set() and (left := missing.left_bytes(self._store)):
            if left == before:
                self._closed.wait(RETRY_S)
            before = left
            try:
                with _Connection(self._record, self._store, self._runs, self._closed) as connection:
                    self._stream = self._lend(self._record, connection.orders())
                    with closing(self._stream):
                        if not self._closed.is_set():
                            connection.take(self._stream)
            except (MigratorError, BlockError, OSError) as error:
                if isinstance(error, MigratorError) and error.reason in LOST:
                    # What was asked for twice may still be on its way when the source hears that everything has come.
                    if missing.left_bytes(self._store):
                        self._lost(str(error))
                    return
                log.warning("pulling memory", migration=self._record.migration, reason=str(error))


class _Connection:
    """One stream: `orders`, which gRPC iterates in a thread of its own, says what is to come, `take` has it come."""

    def __init__(self, record: Incoming, store: Path, runs: threading.Event, closed: threading.Event) -> None:
        self._record = record
        self._runs = runs
        self._closed = closed
        self._marks: dict[int, Marks] = {}
        self._files: dict[int, int] = {}
        with ExitStack() as stack:
            self._open(store, stack)
            self._stack = stack.pop_all()
        self._receiver = Receiver(Digests())
        self._urgent: dict[tuple[int, int], None] = {}
        self._rest = self._in_order()
        self._ordered = self._taken = 0
        self._over = threading.Event()
        # Held by who uses the descriptors in gRPC's thread, which may never come back to the end of `orders`.
        self._using = threading.Lock()

    def _open(self, store: Path, stack: ExitStack) -> None:
        self._pipes = stack.enter_context(closing(Pipes(store)))
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        stack.callback(os.close, self._wake)
        for pid in missing.pids(store):
            marks = Marks.open_if_there(missing.path_of(store, pid))
            if marks is not None:
                self._marks[pid] = stack.enter_context(closing(marks))
                flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
                self._files[pid] = os.open(page_store.path_of(store, pid), flags, 0o600)
                stack.callback(os.close, self._files[pid])

    def __enter__(self) -> "_Connection":
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        os.eventfd_write(self._wake, 1)
        with self._using:
            self._stack.close()

    def take(self, responses: Iterable[peer_pb2.PullMemoryResponse]) -> None:
        """Until everything that is missing has come. Raises what the stream raises."""
        for response in responses:
            self._take(response.piece)

    def orders(self) -> Requests:
        """What is to come, as fast as it comes."""
        with self._using:
            if not self._over.is_set():
                self._pipes.say_again()
        while True:
            with self._using:
                request = None if self._over.is_set() else self._next()
            if request is None:
                return  # and the stream ends
            yield request

    def _next(self) -> peer_pb2.PullMemoryRequest | None:
        """Waits for something to ask for; None when everything has come."""
        while not (self._over.is_set() or self._closed.is_set()):
            for pid, address in self._pipes.are_wanted():
                self._urgent[pid, address & -URGENT_BYTES] = None
            while self._urgent:
                pid, start = next(iter(self._urgent))
                del self._urgent[pid, start]
                runs = self._marks[pid].runs(start, start + URGENT_BYTES) if pid in self._marks else ()
                if ranges := [Range(*run) for run in runs]:
                    return self._order(pid, ranges)
            if self._runs.is_set() and self._ordered - self._taken < WINDOW_BYTES:
                if (found := next(self._rest, None)) is not None:
                    return self._order(*found)
                if self._ordered == self._taken:
                    return None
            if self._wake in readable([self._pipes.wanted, self._wake], RETRY_S if self._runs.is_set() else WAIT_S):
                os.eventfd_read(self._wake)
        return None

    def _order(self, pid: int, ranges: list[Range]) -> peer_pb2.PullMemoryRequest:
        self._ordered += extents.total(ranges)
        return peer_pb2.PullMemoryRequest(
            migration=self._record.migration,
            epoch=self._record.epoch,
            pid=pid,
            ranges=[word for start, end in ranges for word in (start, end - start)],
        )

    def _in_order(self) -> Iterator[tuple[int, list[Range]]]:
        """All that is missing, from the lowest process and address on, as much as one request may ask for."""
        for pid, marks in self._marks.items():
            order: list[Range] = []
            size = 0
            for run in marks.runs(0, ADDRESS_END):
                for part in extents.pieces([Range(*run)], REQUEST_BYTES):
                    if order and (size + part.length > REQUEST_BYTES or len(order) == REQUEST_RANGES):
                        yield pid, order
                        order, size = [], 0
                    order.append(part)
                    size += part.length
            if order:
                yield pid, order

    def _take(self, request: peer_pb2.SendRequest) -> None:
        pid = next((pid for pid in self._marks if request.target == f"memory/{pid}"), None)
        if pid is None:
            raise PeerError(f"{wire.shown(request.target)} was not asked for", reason="OUT_OF_ORDER")
        for piece in self._receiver.pieces(request):
            self._store_missing(pid, piece)
            self._taken += piece.length
        self._pipes.has_come()
        os.eventfd_write(self._wake, 1)

    def _store_missing(self, pid: int, piece: Piece) -> None:
        """What is there already stays: it was asked for twice, or has been given to its process."""
        marks, (at, length, data) = self._marks[pid], piece
        if at % PAGE_BYTES or length % PAGE_BYTES or length > REQUEST_BYTES or at + length > ADDRESS_END:
            raise PeerError(f"{length} bytes of memory at {at} were not asked for", reason="OUT_OF_ORDER")
        whole = marks.are_all(at, at + length)
        for start, end in [(at, at + length)] if whole else list(marks.runs(at, at + length)):
            part = None if data is None else memoryview(data)[start - at : end - at]
            blocks.write(self._files[pid], Piece(start, end - start, part), ADDRESS_END)
            marks.clear(start, end)
            faults.point("destination.pulled")
