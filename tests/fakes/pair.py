"""Two hosts and one container between them, as the contract tests of migrations drive them (`tests.fakes.ends`)."""

import itertools
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

from agent import journal
from agent.database import Database
from agent.journal import Incomings, Outgoings
from blockdev.blocks import Batch
from blockdev.errors import BlockError
from blockdev.extents import Range
from migrator import answers, destination, postcopy, recovery
from migrator.arrivals import Arrivals
from migrator.convergence import OnNoConverge
from migrator.destination import GIVE_UP_ASKS
from migrator.errors import MigratorError, NotFound, Unreachable
from migrator.handover import Incoming, Stage
from migrator.options import Options
from migrator.postcopy import MemoryLost
from migrator.progress import Progress
from migrator.source import Departure, Here
from migrator.stream import Digests, Meter, Sender
from migrator.v1 import container_pb2, migration_pb2, peer_pb2
from tests.fakes.ends import (
    LIVE,
    Calls,
    Died,
    FakeArrivalHost,
    FakeLeaving,
    FakeMemory,
    FaultyIncomings,
    FaultyOutgoings,
    LoopbackPeer,
    World,
)

FAILURES = (MigratorError, BlockError, OSError)
HERE = Here("a", "6.18", ("fpu",), "4.2")
PULL_S = 2.0
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
        self.options = Options(verify=True)
        self.peer = LoopbackPeer("b", self.host, self.arrivals(), self.calls)
        self.peer.before_decide = self.let_pull
        self.working = False
        self.source_is_up = True

    def leave_memory(self) -> None:
        """Have it write faster than can be sent, and migrate by post-copy."""
        self.container.writes_fast = True
        self.options = Options(verify=True, max_downtime_s=0.001, on_no_converge=OnNoConverge.POSTCOPY)

    def let_pull(self) -> None:
        """Wait for what is under way, so that the number of questions is always the same."""
        for arrival in self.peer.arrivals._arrivals.values():
            if arrival.record.stage is Stage.OWNER and (puller := arrival._puller) is not None:
                puller._thread.join(PULL_S)

    def close(self) -> None:
        self._end_pulls()
        self.host.close()
        for database in self.databases:
            database.close()

    def arrivals(self) -> Arrivals:
        return Arrivals(self.host, FaultyIncomings(self.incomings, self.calls), self.lend)

    def lend(self, record: Incoming, requests: postcopy.Requests) -> "Lent":
        """As `agent.peers.PulledMemory` and `agent.migrations.Migrations.lend`."""
        return Lent(self, record, requests)

    def migrate(self) -> tuple[str, Progress]:
        """One departure; a death of either agent comes out as Died."""
        name = next(names)
        progress = Progress(migration_pb2.Migration(name=name, container="ct", source="a", destination="b"))
        outgoings = FaultyOutgoings(self.outgoings, self.calls)
        departure = Departure(name, HERE, self.container, self.peer, outgoings, progress, self.options)
        self.working = True
        try:
            departure.run()
        finally:
            self.working = False
        if self.container.writes_fast:
            self.let_pull()
            self.peer.arrivals.tend(self.ask)
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
        self.let_pull()

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
        self._end_pulls()
        self.peer.arrivals = self.arrivals()
        self.peer.arrivals.recover()

    def _end_pulls(self) -> None:
        for arrival in self.peer.arrivals._arrivals.values():
            arrival._end_pull()

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


class Lent:
    """A stream of memory from the source (`migrator.postcopy.Lent`), or what comes of it."""

    def __init__(self, pair: Pair, record: Incoming, requests: postcopy.Requests) -> None:
        self._pair = pair
        sender = Sender(record.migration, record.epoch, Digests(), Meter())
        self._responses = postcopy.lend(requests, self._read, sender)
        self._record = record
        self._closed = False

    def _read(self, pid: int, ranges: list[Range]) -> Iterator[Batch]:
        assert pid == FakeLeaving.PID
        now = self._pair.outgoings.get(self._record.migration)
        container = self._pair.container
        if now is None or now.may_thaw or now.may_destroy or container.killed or container.ended:
            raise MemoryLost("there is no copy here")
        assert container.frozen, "memory of a container that runs was pulled"
        yield from FakeMemory.contents(ranges)

    def __iter__(self) -> postcopy.Responses:
        while not self._closed:
            if not (self._pair.source_is_up and self._pair.peer.reachable):
                raise Unreachable("the source is away")
            if not self._is_owned():
                time.sleep(0.001)
                continue
            response = next(self._responses, None)
            if response is None:
                return
            yield response

    def _is_owned(self) -> bool:
        """Before it is, nothing comes, so that something is always left for afterwards."""
        record = self._pair.incomings.get(self._record.migration)
        return record is not None and record.stage is Stage.OWNER

    def close(self) -> None:
        self._closed = True


@contextmanager
def make_pair(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    state: "container_pb2.ContainerState" = LIVE,
    *,
    leave_memory: bool = False,
) -> Iterator[Pair]:
    monkeypatch.setattr(answers, "RETRY_S", 0.0)
    monkeypatch.setattr(answers, "PULL_POLL_S", 0.0)
    monkeypatch.setattr(postcopy, "RETRY_S", 0.01)
    monkeypatch.setattr(destination, "STREAM_END_S", 0.2)
    folder.mkdir()
    made = Pair(folder, state)
    with ExitStack() as stack:
        stack.callback(made.close)
        if leave_memory:
            made.leave_memory()
        yield made
    # There are thousands of them.
    shutil.rmtree(folder)


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
        pair.options,
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
