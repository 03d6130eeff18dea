"""Two hosts and one container between them, as the contract tests of migrations drive them (`tests.fakes.ends`)."""

import itertools
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

from agent import journal
from agent.database import Database
from agent.journal import Incomings, Outgoings
from blockdev.errors import BlockError
from migrator import answers, destination, recovery
from migrator.arrivals import Arrivals
from migrator.destination import GIVE_UP_ASKS
from migrator.errors import MigratorError, NotFound, Unreachable
from migrator.handover import Incoming
from migrator.options import Options
from migrator.progress import Progress
from migrator.source import Departure, Here
from migrator.v1 import container_pb2, migration_pb2, peer_pb2
from tests.fakes.ends import (
    LIVE,
    Calls,
    Died,
    FakeArrivalHost,
    FakeLeaving,
    FaultyIncomings,
    FaultyOutgoings,
    LoopbackPeer,
    World,
)

FAILURES = (MigratorError, BlockError, OSError)
HERE = Here("a", "6.18", ("fpu",), "4.2")
names = (f"m-{number}" for number in itertools.count())


class Pair:
    """Two hosts and one container, which is at the first."""

    def __init__(self, folder: Path, state: "container_pb2.ContainerState" = LIVE) -> None:
        self.calls = Calls()
        self.world = World()
        self.databases = [Database(folder / f"{end}.db", [journal.SCHEMA]) for end in "ab"]
        self.outgoings, self.incomings = Outgoings(self.databases[0]), Incomings(self.databases[1])
        self.container = FakeLeaving(folder / "a", self.world, self.calls, state)
        self.host = FakeArrivalHost(folder / "b", self.world, self.calls)
        self.peer = LoopbackPeer("b", self.host, self.arrivals(), self.calls)
        self.working = False
        self.source_is_up = True

    def close(self) -> None:
        self.host.close()
        for database in self.databases:
            database.close()

    def arrivals(self) -> Arrivals:
        return Arrivals(self.host, FaultyIncomings(self.incomings, self.calls))

    def migrate(self) -> tuple[str, Progress]:
        """One departure; a death of either agent comes out as Died."""
        name = next(names)
        progress = Progress(migration_pb2.Migration(name=name, container="ct", source="a", destination="b"))
        outgoings = FaultyOutgoings(self.outgoings, self.calls)
        departure = Departure(name, HERE, self.container, self.peer, outgoings, progress, Options(verify=True))
        self.working = True
        try:
            departure.run()
        finally:
            self.working = False
        return name, progress

    def carry_on(self, name: str, progress: Progress) -> None:
        """As the agent does after a departure, and after a start: until the record is finished."""
        outgoings = FaultyOutgoings(self.outgoings, self.calls)
        for _ in range(5):
            record = self.outgoings.get(name)
            if record is None or record.finished:
                return
            container = None if self.container.removed else self.container
            try:
                recovery.carry_on(name, "a", container, self.peer, outgoings, progress)
            except FAILURES:
                self.tend()
        raise AssertionError(f"not finished: {self.outgoings.get(name)}")

    def tend(self) -> None:
        """A long time passes at the destination."""
        for arrival in list(self.peer.arrivals._arrivals.values()):
            arrival.heard_at -= 100
            arrival.unanswered = GIVE_UP_ASKS
        self.peer.arrivals.tend(self.ask)

    def ask(self, record: Incoming) -> "peer_pb2.Decision":
        """As `agent.migrations.Migrations.decision`."""
        if not (self.source_is_up and self.peer.reachable):
            raise Unreachable("the source is away")
        found = self.outgoings.get(record.migration)
        if found is None:
            raise NotFound("no such migration")
        return recovery.decision(self.outgoings, found, is_worked_on=self.working)

    def restart_destination(self) -> None:
        """A new agent, which knows what is on the disk."""
        self.peer.arrivals = self.arrivals()
        self.peer.arrivals.recover()

    def expect_settled(self, live: bool = True) -> bool:
        """Exactly one end has the container, the other has nothing. Returns whether it has moved."""
        moved = self.container.removed
        if moved:
            assert any(made.owned for made in self.host.reservations.values())
            assert self.world.destination_runs == live
            assert not self.world.source_runs
        else:
            assert self.world.source_runs == live
            assert not self.world.destination_runs
            assert self.container.is_as_before()
        assert not self.container.images.exists()
        assert not self.host.left(), "something is left at the destination"
        assert not self.outgoings.unfinished()
        assert not self.incomings.unfinished()
        assert not self.peer.arrivals.count()
        return moved


@contextmanager
def make_pair(
    folder: Path, monkeypatch: pytest.MonkeyPatch, state: "container_pb2.ContainerState" = LIVE
) -> Iterator[Pair]:
    monkeypatch.setattr(answers, "RETRY_S", 0.0)
    monkeypatch.setattr(destination, "STREAM_END_S", 0.2)
    folder.mkdir()
    made = Pair(folder, state)
    with ExitStack() as stack:
        stack.callback(made.close)
        yield made


def die(pair: Pair) -> tuple[str, Progress]:
    """Migrate until the source's agent dies; nothing of its way back happens. What CRIU held rolls back by itself."""
    name = next(names)
    progress = Progress(migration_pb2.Migration(name=name, container="ct", source="a", destination="b"))
    calls = pair.calls

    class Frozen:
        """After the death nobody calls anything any more: the way back of Python's own stack is not the agent's."""

        def __init__(self, inner: object) -> None:
            self._inner = inner

        def __getattr__(self, attribute: str) -> object:
            if calls.struck:
                raise Died
            return getattr(self._inner, attribute)

    container = pair.container
    departure = Departure(
        name,
        HERE,
        Frozen(container),  # type: ignore[arg-type]
        Frozen(pair.peer),  # type: ignore[arg-type]
        Frozen(FaultyOutgoings(pair.outgoings, calls)),  # type: ignore[arg-type]
        progress,
        Options(verify=True),
    )
    before: dict[str, bool] = {}
    words = ("frozen", "disconnected", "fs_frozen", "killed", "removed")
    calls.at_strike = lambda: before.update({word: getattr(container, word) for word in words})
    with suppress(Died):
        departure.run()
    calls.fault = None
    container.__dict__.update(before)
    container.criu_holds = container.guarded = False
    if container.images.exists():
        for image in container.images.iterdir():
            image.unlink()
        container.images.rmdir()
    container._update()
    return name, progress
