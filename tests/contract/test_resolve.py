"""An operator's word for that of a host that is gone, and a source that was rebooted before it had decided."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.handovers import Handovers
from agent.peers import UnknownPeer
from migrator import answers, recovery
from migrator.errors import MigratorError, NotFound, Precondition, Uncertain
from migrator.handover import Decision, Incoming, Outgoing
from migrator.ports import Decider
from migrator.progress import Progress
from migrator.v1 import migration_pb2, peer_pb2
from tests.fakes.ends import Died, Fault
from tests.fakes.pair import Pair, die, make_pair

HERE, THERE = migration_pb2.KEEP_HERE, migration_pb2.KEEP_THERE
RELEASED = Fault("journal a.release", 0, True, Died)
READY = Fault("peer.restore", 0, True, Died)


class Operated:
    """A pair with what an operator may ask at either end."""

    def __init__(self, pair: Pair) -> None:
        self.pair = pair
        self.known = {"ct"}
        self.at = [
            Handovers(end, database, pair.peer.arrivals, self._check, self._ask_destination, self._ask_source)
            for end, database in zip("ab", pair.databases, strict=True)
        ]

    def _check(self, container: str) -> None:
        if container not in self.known:
            raise NotFound(f"there is no {container}", reason="CONTAINER_NOT_FOUND")

    def _ask_destination(self, record: Outgoing) -> "peer_pb2.ArrivalStage":
        return self.pair.peer.stage(record.migration, record.epoch)

    def _ask_source(self, record: Incoming) -> "peer_pb2.Decision":
        return self.pair.ask(record)

    def waits_at_the_source(self) -> tuple[str, Progress]:
        """It has released, and the destination is away."""
        self.pair.calls.fault = RELEASED
        made = die(self.pair)
        self.pair.peer.reachable = False
        return made

    def waits_at_the_destination(self) -> tuple[str, Progress]:
        """It is ready, and the source is away."""
        self.pair.calls.fault = READY
        made = die(self.pair)
        self.pair.source_is_up = False
        self.pair.tend()
        assert "held" in self.pair.host.left()
        return made


@pytest.fixture
def operated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Operated]:
    monkeypatch.setattr(recovery, "LOST_PATIENCE_S", 0.0)
    monkeypatch.setattr(recovery, "RETRY_S", 0.0)
    with make_pair(tmp_path / "pair", monkeypatch) as pair:
        yield Operated(pair)


@pytest.mark.parametrize("named", [True, False], ids=["named", "not named any more"])
@pytest.mark.parametrize(("keep", "moved"), [(HERE, False), (THERE, True)])
def test_the_destination_is_gone(operated: Operated, keep: "migration_pb2.Keep", moved: bool, named: bool) -> None:
    pair = operated.pair
    peer: Decider = pair.peer if named else UnknownPeer("b", NotFound("no peer is called b", reason="UNKNOWN_HOST"))
    migration, progress = operated.waits_at_the_source()
    source, _ = operated.at
    found = source.get("ct")
    assert (found.side, found.host, found.peer) == (migration_pb2.HANDOVER_SIDE_SOURCE, "a", "b")
    assert (found.migration, found.heard, found.peer_answers) == (migration, "it is ready", False)
    assert found.heard_time.seconds >= found.since_time.seconds > 0
    with pytest.raises(MigratorError):
        recovery.carry_on(migration, "a", pair.container, peer, pair.outgoings, progress)
    assert not pair.world.source_runs

    source.resolve("ct", found.epoch, keep)
    recovery.carry_on(migration, "a", pair.container, peer, pair.outgoings, progress)
    assert pair.world.source_runs == (not moved)
    if not moved:
        assert progress.snapshot().reason == "RESOLVED"
    # It was not gone after all: what it holds runs only if that was the word.
    pair.peer.reachable = True
    pair.tend()
    assert pair.expect_settled() == moved


@pytest.mark.parametrize(("keep", "moved"), [(HERE, True), (THERE, False)])
@pytest.mark.parametrize("known", [True, False], ids=["arrival", "record"])
def test_the_source_is_gone(operated: Operated, keep: "migration_pb2.Keep", moved: bool, known: bool) -> None:
    pair = operated.pair
    migration, progress = operated.waits_at_the_destination()
    _, destination = operated.at
    found = destination.get("ct")
    assert (found.side, found.host, found.peer) == (migration_pb2.HANDOVER_SIDE_DESTINATION, "b", "a")
    assert (found.heard, found.peer_answers) == ("restore it and hold it", False)
    if not known:
        pair.peer.arrivals._arrivals.clear()

    destination.resolve("ct", found.epoch, keep)
    pair.peer.arrivals.tend(pair.ask)
    assert pair.world.destination_runs == moved
    # It was not gone, but rebooted.
    pair.container.reboot() if moved else None
    pair.source_is_up = True
    pair.carry_on(migration, progress)
    assert pair.expect_settled() == moved


def test_an_answer_that_is_none_decides_nothing(operated: Operated, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a later version, say."""
    pair = operated.pair
    migration, progress = operated.waits_at_the_source()
    answer = peer_pb2.DecideResponse(ownership=7)  # type: ignore[arg-type]
    monkeypatch.setattr(pair.peer, "decide", lambda *_: answer)
    with pytest.raises(Uncertain):
        recovery.carry_on(migration, "a", pair.container, pair.peer, pair.outgoings, progress)
    record = pair.outgoings.get(migration)
    assert record is not None and record.is_waiting
    assert not pair.world.source_runs


def test_a_lost_copy_is_kept_until_somebody_says_something(operated: Operated) -> None:
    """The destination was rebooted as well: the disk that it holds is the last one, and is not deleted in silence."""
    pair = operated.pair
    operated.waits_at_the_destination()
    for made in pair.host.reservations.values():
        made.reboot()
    pair.restart_destination()
    pair.tend()
    assert "volume" in pair.host.left()
    destination = Operated(pair).at[1]
    destination.resolve("ct", destination.get("ct").epoch, HERE)
    assert not pair.world.destination_runs  # it is stopped
    assert any(made.owned for made in pair.host.reservations.values())


def test_nothing_is_resolved_that_does_not_wait(operated: Operated) -> None:
    source, destination = operated.at
    for end in operated.at:
        with pytest.raises(Precondition) as raised:
            end.get("ct")
        assert raised.value.reason == "NOTHING_TO_RESOLVE"
        with pytest.raises(NotFound):
            end.get("other")
    migration, progress = operated.waits_at_the_source()
    epoch = source.get("ct").epoch
    for end, wrong, reachable, reason in (
        (source, epoch + 1, False, "EPOCH_CHANGED"),
        (source, epoch, True, "PEER_ANSWERS"),
        (destination, epoch, False, "PEER_ANSWERS"),
    ):
        operated.pair.peer.reachable = reachable or end is destination
        with pytest.raises(Precondition) as raised:
            end.resolve("ct", wrong, HERE)
        assert raised.value.reason == reason
    operated.pair.peer.reachable = True
    operated.pair.carry_on(migration, progress)
    assert operated.pair.expect_settled()


def test_a_destination_that_knows_nothing_may_be_overruled(operated: Operated) -> None:
    operated.waits_at_the_source()
    operated.pair.peer.reachable = True
    with operated.pair.databases[1].transaction() as cursor:
        cursor.execute("DELETE FROM incoming")
    found = operated.at[0].get("ct")
    assert not found.peer_answers
    assert "knows nothing" in found.answer


def test_a_migration_that_asks_hears_the_word(operated: Operated, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "PATIENCE_S", 0.0)
    monkeypatch.setattr(answers, "RETRY_S", 0.01)
    pair = operated.pair
    asked = threading.Event()

    def cut(call: str) -> None:
        if call == "decide":
            pair.peer.reachable = False
            asked.set()

    pair.peer.intercept = cut
    ended: list[Progress] = []
    thread = threading.Thread(target=lambda: ended.append(pair.migrate()[1]))
    thread.start()
    assert asked.wait(20)
    source = operated.at[0]
    source.resolve("ct", source.get("ct").epoch, HERE)
    thread.join(20)
    assert not thread.is_alive()
    assert pair.world.source_runs
    migration = ended[0].snapshot()
    assert (migration.reason, migration.where_running) == ("RESOLVED", "a")
    pair.peer.intercept = lambda _: None
    pair.peer.reachable = True
    pair.tend()
    assert not pair.expect_settled()


def test_a_rebooted_source_releases_what_the_destination_holds(operated: Operated) -> None:
    """Its memory is there alone."""
    pair = operated.pair
    migration, progress = operated.waits_at_the_destination()
    pair.container.reboot()
    pair.source_is_up = True
    pair.carry_on(migration, progress)
    assert pair.expect_settled()


@pytest.mark.parametrize("reachable", [True, False])
def test_a_rebooted_source_keeps_what_the_destination_does_not_hold(operated: Operated, reachable: bool) -> None:
    pair = operated.pair
    pair.calls.fault = Fault("peer.hold traffic", 0, True, Died)
    migration, progress = die(pair)
    pair.container.reboot()
    pair.peer.reachable = reachable
    pair.carry_on(migration, progress)
    record = pair.outgoings.get(migration)
    assert record is not None and record.decision is Decision.ABORTED
    pair.peer.reachable = True
    pair.tend()
    assert not pair.host.left()
    assert not pair.container.removed
