"""Ends of different versions: what one of them does not know is left out, or ignored, or refused with a reason."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from google.protobuf.message import Message

from migrator import recovery
from migrator.errors import Precondition
from migrator.handover import Decision
from migrator.v1 import migration_pb2, peer_pb2
from tests.fakes.ends import Died, FakeLeaving, Fault
from tests.fakes.pair import Pair, die, make_pair

# Field 1000, of length 3: no version has it yet.
UNKNOWN_FIELD = b"\xc2\x3e\x03new"


@pytest.fixture
def pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Pair]:
    with make_pair(tmp_path / "pair", monkeypatch) as made:
        yield made


@pytest.mark.parametrize("features", [[], ["send-v1", "snapshots-v1", "send-v9", "telepathy-v1"]])
def test_a_destination_that_offers_less_or_more(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, features: list[str]
) -> None:
    monkeypatch.setattr(FakeLeaving, "snapshots", ())
    pair.host.features = features
    _, progress = pair.migrate()
    assert pair.expect_settled(), progress.snapshot().error


def test_what_needs_a_feature_is_refused_without_it(pair: Pair) -> None:
    pair.host.features = ["send-v1"]
    _, progress = pair.migrate()
    assert not pair.expect_settled()
    migration = progress.snapshot()
    assert (migration.outcome, migration.reason) == (migration_pb2.OUTCOME_REFUSED, "SNAPSHOTS")
    assert "too old" in migration.error


def test_fields_of_a_newer_version_are_ignored(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """In all that is asked, and in what is answered."""

    def newer(message: Message) -> Message:
        return type(message).FromString(message.SerializeToString() + UNKNOWN_FIELD)

    peer = pair.peer
    for name in ("examine", "prepare"):
        inner = getattr(peer, name)
        monkeypatch.setattr(peer, name, lambda request, inner=inner: newer(inner(newer(request))))
    decide, send = peer.decide, peer.send
    monkeypatch.setattr(peer, "decide", lambda *arguments: newer(decide(*arguments)))
    monkeypatch.setattr(peer, "send", lambda requests: send(newer(request) for request in requests))  # type: ignore[misc]
    _, progress = pair.migrate()
    assert pair.expect_settled(), progress.snapshot().error


def test_a_decision_of_a_newer_version_changes_nothing(pair: Pair) -> None:
    pair.calls.fault = Fault("peer.restore", 0, True, Died)
    migration, progress = die(pair)
    (arrival,) = pair.peer.arrivals._arrivals.values()
    request = peer_pb2.DecideRequest(migration=migration, epoch=arrival.record.epoch, decision=7)  # type: ignore[arg-type]
    with pytest.raises(Exception, match="decision 7"):
        pair.peer.arrivals.decide("a", request)
    assert "held" in pair.host.left()
    pair.carry_on(migration, progress)
    pair.tend()
    assert not pair.expect_settled()


def test_a_destination_that_cannot_be_asked_how_far_it_is(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """An older one, asked by a source that was rebooted: the copy on the disk here is kept."""

    def unimplemented(*_: object) -> None:
        raise Precondition("the agent of b does not know this call: is it an older version?")

    monkeypatch.setattr(recovery, "LOST_PATIENCE_S", 0.0)
    pair.calls.fault = Fault("peer.restore", 0, True, Died)
    migration, progress = die(pair)
    pair.container.reboot()
    monkeypatch.setattr(pair.peer, "stage", unimplemented)
    pair.carry_on(migration, progress)
    record = pair.outgoings.get(migration)
    assert record is not None and record.decision is Decision.ABORTED
    pair.tend()
    assert not pair.host.left()
