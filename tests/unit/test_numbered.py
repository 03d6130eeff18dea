"""Streams that break anywhere: every piece arrives once and in order, whatever was lost of both directions."""

import itertools
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migrator import numbered
from migrator.errors import PeerError
from migrator.numbered import Inbound, Outbound
from migrator.v1 import peer_pb2


def pieces(count: int) -> Iterator[peer_pb2.SendRequest]:
    for number in range(count):
        yield peer_pb2.SendRequest(migration="m", epoch=3, target="volume/0", offset=number, data=b"x" * 100)


def transfer(stream: Outbound, inbound: Inbound, breaks_after: int, answers_lost: int) -> bool:
    """One connection that breaks after so many requests, and loses so many of the last answers; whether it ended."""
    requests = stream.attempt()
    sent = 0
    answers: list[peer_pb2.SendResponse] = []

    def wire() -> Iterator[peer_pb2.SendRequest]:
        nonlocal sent
        for request in requests:
            if sent == breaks_after:
                return
            sent += 1
            yield peer_pb2.SendRequest.FromString(request.SerializeToString())

    arriving = wire()
    first = next(arriving, None)
    if first is None:
        return breaks_after > 0
    ended = True
    for answer in inbound.receive(first, arriving):
        answers.append(answer)
        if first.number == 0 and len(answers) == 1:
            stream.answered(answer)  # without it the stream does not go on
    ended = sent < breaks_after
    for answer in answers if ended else answers[: max(0, len(answers) - answers_lost)]:
        stream.answered(answer)
    return ended


@given(st.integers(0, 300), st.lists(st.tuples(st.integers(0, 150), st.integers(0, 4)), max_size=6))
def test_nothing_is_lost_or_repeated(count: int, failures: list[tuple[int, int]]) -> None:
    stored: list[int] = []
    stream = Outbound(1, pieces(count))
    inbound = Inbound(lambda request: stored.append(request.offset))
    for breaks_after, answers_lost in failures:
        if transfer(stream, inbound, breaks_after, answers_lost):
            break
    else:
        assert transfer(stream, inbound, 1000, 0)
    stream.check_complete()
    assert stored == list(range(count))
    assert stream.confirmed == count


def test_window_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numbered, "WINDOW_BYTES", 1000)
    stream = Outbound(1, pieces(100))
    requests = stream.attempt()
    assert len(list(itertools.islice(requests, 10))) == 10
    stream.answered(peer_pb2.SendResponse(received=5))
    assert len(list(itertools.islice(requests, 5))) == 5
    stream.close()
    assert list(requests) == []


def test_nobody_reads_on_once_it_is_closed() -> None:
    """What is read may be taken down then."""
    is_read, may_go_on, reads = threading.Event(), threading.Event(), []

    def slow() -> Iterator[peer_pb2.SendRequest]:
        is_read.set()
        may_go_on.wait(20)
        reads.append(1)
        yield peer_pb2.SendRequest()
        reads.append(2)

    stream = Outbound(1, slow())
    with ThreadPoolExecutor(2) as threads:
        sent = threads.submit(list[peer_pb2.SendRequest], stream.attempt())
        assert is_read.wait(20)
        closed = threads.submit(stream.close)
        with pytest.raises(TimeoutError):
            closed.result(0.1)
        may_go_on.set()
        closed.result(20)
        assert (sent.result(20), reads) == ([], [1])


@pytest.mark.parametrize("received", [-1, 4, 11])
def test_impossible_answers_are_refused(received: int) -> None:
    stream = Outbound(1, pieces(100))
    list(itertools.islice(stream.attempt(), 10))
    stream.answered(peer_pb2.SendResponse(received=5))
    with pytest.raises(PeerError):
        stream.answered(peer_pb2.SendResponse(received=received))


def test_pieces_out_of_turn_are_refused() -> None:
    inbound = Inbound(lambda _: None)
    first = peer_pb2.SendRequest(stream=1, number=1)
    older = inbound.receive(first, iter([peer_pb2.SendRequest(stream=1, number=3)]))
    with pytest.raises(PeerError, match="piece 3"):
        list(older)
    slow = inbound.receive(peer_pb2.SendRequest(stream=1), iter([peer_pb2.SendRequest(stream=1, number=2)]))
    assert next(slow).received == 1
    assert [a.received for a in inbound.receive(peer_pb2.SendRequest(stream=1), iter([]))] == [1, 1]
    with pytest.raises(PeerError, match="another connection"):
        list(slow)
    with pytest.raises(PeerError, match="two streams"):
        list(inbound.receive(peer_pb2.SendRequest(stream=2), iter([peer_pb2.SendRequest(stream=3, number=1)])))


def test_failure_of_the_pieces_themselves_is_told() -> None:
    def failing() -> Iterator[peer_pb2.SendRequest]:
        yield peer_pb2.SendRequest()
        raise OSError("read failed")

    stream = Outbound(1, failing())
    with pytest.raises(OSError, match="read failed"):
        list(stream.attempt())
    with pytest.raises(OSError, match="read failed"):
        stream.check()
