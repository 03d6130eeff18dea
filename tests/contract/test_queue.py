"""A destination that takes no more for now: its source only gets in line, and comes when there is a place."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from migrator import arrivals
from migrator.errors import Busy
from migrator.line import FEATURE
from migrator.options import Options
from migrator.progress import Progress
from migrator.source import FEATURES, Departure
from migrator.v1 import container_pb2, migration_pb2, peer_pb2
from tests.fakes.ends import FakeLeaving
from tests.fakes.pair import HERE, Pair, make_pair


@pytest.fixture
def pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Pair]:
    monkeypatch.setattr(FakeLeaving, "snapshots", ())
    with make_pair(tmp_path / "pair", monkeypatch) as made:
        made.peer.arrivals = arrivals.Arrivals(made.host, made.incomings, made.lend, places=1)
        yield made


def other(name: str) -> peer_pb2.PrepareRequest:
    return peer_pb2.PrepareRequest(
        migration=name,
        epoch=1,
        container=f"ct-{name}",
        state=container_pb2.CONTAINER_STATE_STOPPED,
        spec=container_pb2.ContainerSpec(),
    )


def departure(pair: Pair, name: str) -> tuple[Departure, Progress]:
    progress = Progress(migration_pb2.Migration(name=name, container="ct", source="a", destination="b"))
    return Departure(name, HERE, pair.container, pair.peer, pair.outgoings, progress, Options()), progress


def test_nothing_is_done_until_there_is_a_place(pair: Pair) -> None:
    pair.peer.arrivals.prepare("c", other("m-other"))
    moving, progress = departure(pair, "m-1")
    assert not moving.run()
    assert pair.outgoings.get("m-1") is None
    assert not progress.snapshot().outcome
    assert pair.container.is_as_before()
    # One that comes later and does not ask has to stand behind it.
    aborted = peer_pb2.DecideRequest(migration="m-other", epoch=1, decision=peer_pb2.DECISION_ABORTED)
    pair.peer.arrivals.decide("c", aborted)
    with pytest.raises(Busy, match="has to wait") as refused:
        pair.peer.arrivals.prepare("c", other("m-late"))
    assert refused.value.reason == "HOST_FULL"
    assert moving.run()
    assert progress.snapshot().outcome == migration_pb2.OUTCOME_MIGRATED, progress.snapshot().error
    pair.tend()
    pair.peer.arrivals.prepare("c", other("m-late"))


def test_a_source_that_does_not_know_of_the_line_is_refused_and_rolls_back(pair: Pair) -> None:
    """As the previous version: there the operator tries again."""
    pair.peer.arrivals.prepare("c", other("m-other"))
    pair.host.features = [feature for feature in FEATURES if feature != FEATURE]
    moving, progress = departure(pair, "m-1")
    assert moving.run()
    ended = progress.snapshot()
    assert (ended.outcome, ended.reason) == (migration_pb2.OUTCOME_ROLLED_BACK, "HOST_FULL")
    assert pair.container.is_as_before()


def test_one_whose_source_is_gone_takes_no_place(pair: Pair) -> None:
    pair.peer.arrivals.prepare("c", other("m-other"))
    arrival = pair.peer.arrivals.get("c", "m-other", 1)
    arrival.restore({})
    assert pair.peer.arrivals.queue("a", peer_pb2.QueueRequest(migration="m-1")) == 1
    arrival.heard_at -= 100
    assert pair.peer.arrivals.queue("a", peer_pb2.QueueRequest(migration="m-1")) == 0
