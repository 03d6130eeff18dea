"""Two hosts that hand one container to and fro, and whatever can happen to them, in an order that hypothesis seeks.

It is the code itself that moves: `migrator.source`, `migrator.arrivals`, `migrator.recovery`, and the journals in their
databases. Only what a kernel does is made up (`tests.fakes.ends`). In the middle of any call an agent is killed, with
its guard or without, a host is rebooted or destroyed, the link is cut, a call fails, messages of the past arrive once
more, the operator cancels; and that while either end is still recovering from the last time.

At every moment: never do two copies run, and as long as its host is not destroyed, there is one that can. When all is
mended, it runs at one host without anybody's help; or, where one was destroyed, by an operator's word.
"""

import itertools
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from agent import journal
from agent.database import Database
from agent.journal import Incomings, Outgoings
from blockdev.errors import BlockError
from migrator import answers, destination, recovery
from migrator.arrivals import Arrivals
from migrator.destination import GIVE_UP_ASKS
from migrator.errors import AlreadyExists, ExecutionError, MigratorError, NotFound, Unreachable
from migrator.handover import HandoverError, Incoming, Keep, Stage
from migrator.network import Neighbour
from migrator.options import Options
from migrator.postcopy import Lent, Requests
from migrator.progress import Progress
from migrator.source import FEATURES, Departure, Here
from migrator.v1 import migration_pb2, peer_pb2
from tests.fakes.ends import (
    Calls,
    Died,
    FakeArrivalHost,
    FakeLeaving,
    FakeReservation,
    FaultyIncomings,
    FaultyOutgoings,
    LoopbackPeer,
)

FAILURES = (MigratorError, BlockError, OSError)
NAME = "ct"
# A source that asks in vain for longer is killed by the model, and asks again when it was started.
ASKED_IN_VAIN = 2
# More than CI's for a longer look: MODEL_EXAMPLES=5000 pytest tests/contract/test_handover_model.py
EXAMPLES = int(os.environ.get("MODEL_EXAMPLES", "120"))
SCRATCH = "/dev/shm" if Path("/dev/shm").is_dir() else None

# At one moment of a call: its name, which of that name, whether it has had its effect.
Moment = tuple[str, int, bool]


class At:
    """The copies of one host as the fakes know a world: the host's own and one that arrives are not told apart."""

    _running: set[str]
    _host: str

    def __init__(self, running: set[str], host: str) -> None:
        self.__dict__.update(_running=running, _host=host)

    def __getattr__(self, name: str) -> bool:
        return self._host in self._running

    def __setattr__(self, name: str, runs: bool) -> None:
        (self._running.add if runs else self._running.discard)(self._host)
        self.check()

    def check(self) -> None:
        assert len(self._running) < 2, "two copies run"


class Leaving(FakeLeaving):
    """Without snapshots, which are of no consequence here."""

    snapshots = ()


class Arriving(FakeReservation):
    """A reservation whose container becomes the host's own when it has settled."""

    def __init__(self, host: "Host", *arguments: Any) -> None:
        super().__init__(*arguments)
        self._host = host

    def settle(self) -> bool:
        if not self.owned:
            self._host.adopt(ended=self.lost)
        return super().settle()


class ArrivalHost(FakeArrivalHost):
    """Knows its own epochs, and that a name is taken."""

    def __init__(self, host: "Host") -> None:
        super().__init__(host.folder / "arrivals", host.world, host.calls)
        self._host = host

    def examine(self, source: str, request: peer_pb2.ExamineRequest) -> peer_pb2.ExamineResponse:
        last = self._host.incomings.last_epoch(request.container)
        return peer_pb2.ExamineResponse(host=self._host.name, last_epoch=last, features=FEATURES)

    def reserve(self, request: peer_pb2.PrepareRequest) -> FakeReservation:
        if self._host.own is not None:
            raise AlreadyExists(f"{request.container} is there already")
        return super().reserve(request)

    def _make(self, folder: Path, *, live: bool) -> FakeReservation:
        return Arriving(self._host, folder, self._world, self._call, live)


def _lend_nothing(record: Incoming, requests: Requests) -> Lent:
    raise AssertionError("nothing is left behind here")


class Host:
    """One host: what is on its disk, what runs there, and its agent while that lives."""

    def __init__(self, name: str, folder: Path, running: set[str], calls: Calls) -> None:
        folder.mkdir()
        self.name, self.folder, self.calls = name, folder, calls
        self.world: Any = At(running, name)
        self.database = Database(folder / "agent.db", [journal.SCHEMA])
        self.outgoings, self.incomings = Outgoings(self.database), Incomings(self.database)
        self.copy: Leaving | None = None
        self.exists = self.is_up = True
        # Counts the lives of the agent.
        self.life = 0
        # The migration that a thread of the agent works on.
        self.working = ""
        self._folders = itertools.count()
        self.arrival_host = ArrivalHost(self)
        self.start()

    def start(self) -> None:
        """A new agent, which knows what is on the disk."""
        self.is_up = True
        self.arrivals = Arrivals(self.arrival_host, FaultyIncomings(self.incomings, self.calls), _lend_nothing)

    def stop(self) -> None:
        """The agent is dead."""
        self.is_up, self.working = False, ""
        self.life += 1
        if self.own is not None:
            self.own.criu_holds = False  # it rolls back by itself

    def reboot(self) -> None:
        """All processes are gone, the disk is not."""
        self.stop()
        self.world.source_runs = False
        if self.own is not None:
            self.own.guarded = False
            self.own.reboot()
        for made in self.arrival_host.reservations.values():
            made.reboot()

    def destroy(self) -> None:
        self.reboot()
        self.exists = False

    def guard(self) -> None:
        """As agent.guard, when the agent is dead."""
        if self.own is None or not self.own.guarded:
            return
        (record,) = self.outgoings.unfinished()
        with suppress(HandoverError):
            self.outgoings.abort(record.migration)
            self.own.resume()
        self.own.guarded = False

    @property
    def own(self) -> Leaving | None:
        """The container, while it is this host's."""
        return None if self.copy is None or self.copy.removed else self.copy

    def adopt(self, *, ended: bool) -> None:
        self.copy = Leaving(self.folder / f"copy-{next(self._folders)}", self.world, self.calls, ended=ended)

    def decision(self, record: Incoming) -> "peer_pb2.Decision":
        """As agent.migrations.Migrations.decision."""
        found = self.outgoings.get(record.migration)
        if found is None or found.epoch != record.epoch:
            raise NotFound("no such migration", reason="MIGRATION_NOT_FOUND")
        return recovery.decision(self.outgoings, found, is_worked_on=self.working == record.migration)

    @property
    def is_idle(self) -> bool:
        """Whether it has no handover under way."""
        return not self.outgoings.unfinished() and not self.incomings.unfinished()

    def can_run(self) -> bool:
        """Whether it has the container on its disk, and has not promised it away for good."""
        if not self.exists:
            return False
        if self.own is not None:
            return not any(record.may_destroy for record in self.outgoings.unfinished())
        return any(
            record.stage is Stage.OWNER and "volume" in self.arrival_host.reservations[record.migration].left
            for record in self.incomings.unfinished()
        )

    def holds_complete(self) -> bool:
        """As `can_run`, or it holds a complete copy that waits for the source's word."""
        waiting = [record for record in self.incomings.unfinished() if record.is_waiting]
        return self.can_run() or (
            self.exists and any("volume" in self.arrival_host.reservations[r.migration].left for r in waiting)
        )


class Link(LoopbackPeer):
    """From one host to the other, while both are there. What passes is remembered, to arrive once more."""

    def __init__(self, model: "Handovers", source: Host, there: Host) -> None:
        super().__init__(there.name, there.arrival_host, there.arrivals, model.calls, source.name)
        self._model, self._from, self._there = model, source, there

    @property
    def arrivals(self) -> Arrivals:
        return self._there.arrivals

    @arrivals.setter
    def arrivals(self, _: Arrivals) -> None:
        """It is the other host's, whatever life its agent is in."""

    @contextmanager
    def _wire(self, name: str) -> Iterator[None]:
        model = self._model
        model.expect_alive(self._from)
        if not (model.is_linked and self._there.is_up):
            model.asked_in_vain += name == "decide"
            if model.asked_in_vain > ASKED_IN_VAIN:
                model.kill(self._from)
                raise Died
            raise Unreachable(f"{self._there.name} does not answer")
        life = self._there.life
        try:
            with super()._wire(name):
                yield
        except Died:
            model.expect_alive(self._from)
            assert self._there.life != life
            raise Unreachable(f"{self._there.name} died") from None

    def prepare(self, request: peer_pb2.PrepareRequest) -> peer_pb2.PrepareResponse:
        self._remember(lambda arrivals: arrivals.prepare(self._source, request))
        return super().prepare(request)

    def hold_traffic(self, migration: str, epoch: int, neighbours: Sequence[Neighbour]) -> None:
        self._remember(lambda arrivals: arrivals.get(self._source, migration, epoch).hold_traffic(neighbours))
        super().hold_traffic(migration, epoch, neighbours)

    def restore(self, migration: str, epoch: int, digests: Mapping[str, bytes]) -> Any:
        self._remember(lambda arrivals: arrivals.get(self._source, migration, epoch).restore(digests))
        return super().restore(migration, epoch, digests)

    def decide(self, migration: str, epoch: int, decision: "peer_pb2.Decision") -> peer_pb2.DecideResponse:
        request = peer_pb2.DecideRequest(migration=migration, epoch=epoch, decision=decision)
        self._remember(lambda arrivals: arrivals.decide(self._source, request))
        return super().decide(migration, epoch, decision)

    def _remember(self, message: Callable[[Arrivals], object]) -> None:
        self._model.past.append((self._there, message))


EVENTS = (
    "kill source",
    "kill source and guard",
    "reboot source",
    "destroy source",
    "kill destination",
    "reboot destination",
    "destroy destination",
    "cut",
    "fail",
    "lose",
    "cancel",
    "tend",
    "echo",
)


# What a migration calls only when it does not go well.
WAYS_BACK = ("journal a.abort", "source.resume", "journal b.refuse", "destination.discard", "peer.stage")


@cache
def moments() -> list[Moment]:
    """Those of one migration, from its freeze on twice, since that is what matters."""
    model = Handovers()
    try:
        model.migrate([])
        calls = list(model.calls.seen)
    finally:
        model.teardown()
    calls += [*calls[calls.index(("source.freeze", 0)) :], *((name, 0) for name in WAYS_BACK)]
    return [(name, number, after) for name, number in calls for after in (False, True)]


def test_every_event_at_every_moment() -> None:
    """One at a time; hypothesis has the rest."""
    known = {moment: index for index, moment in enumerate(moments())}
    for index, event in itertools.product(known.values(), EVENTS):
        model = Handovers()
        try:
            model.migrate([(index, event)])
            model.one_that_can()
            model.teardown()
        except AssertionError as error:
            raise AssertionError(f"{event} at {moments()[index]}: {error}") from error


Happenings = list[tuple[int, str]]
# Where in the list of moments (cut to its length), and what.
HAPPENINGS: st.SearchStrategy[Happenings] = st.lists(
    st.tuples(st.sampled_from(range(200)), st.sampled_from(EVENTS)), min_size=1, max_size=3
)
SIDE = st.sampled_from("ab")


class Handovers(RuleBasedStateMachine):
    """The two hosts, and everything that happens to them."""

    def __init__(self) -> None:
        super().__init__()
        self._folder = tempfile.TemporaryDirectory(dir=SCRATCH)
        self.calls = Calls()
        self.calls.witness = self._moment
        self.running: set[str] = set()
        self.hosts = {name: Host(name, Path(self._folder.name) / name, self.running, self.calls) for name in ("a", "b")}
        self.is_linked = True
        self.asked_in_vain = 0
        self.past: list[tuple[Host, Callable[[Arrivals], object]]] = []
        self._names = (f"m-{number}" for number in itertools.count())
        self._due: dict[Moment, str] = {}
        self._lives: dict[str, int] = {}
        self._progress: dict[str, Progress] = {}
        self._is_quiet = False
        self.source, self.destination = self.hosts["a"], self.hosts["b"]
        # The host that was destroyed had it alone: None as long as none was.
        self.is_doomed: bool | None = None
        self.source.adopt(ended=False)

    def other(self, host: Host) -> Host:
        return self.hosts["b" if host.name == "a" else "a"]

    # -- what happens in the middle of a call -----------------------------------------------------------------------

    def _moment(self, name: str, number: int, after: bool) -> None:
        if self._is_quiet:
            return
        at_source, there = name.startswith(("source", "journal a")), name.startswith(("destination", "journal b"))
        self._expect(at_source, there)
        event = self._due.pop((name, number, after), None)
        if event is not None:
            self._happen(event, is_wire=not (at_source or there), is_there=there)
        self._expect(at_source, there)

    def _expect(self, at_source: bool, there: bool) -> None:
        if not there:
            self.expect_alive(self.source)
        if not at_source:
            self.expect_alive(self.destination)

    def expect_alive(self, host: Host) -> None:
        """Nothing more is done by an agent that is dead."""
        if host.life != self._lives.get(host.name, host.life):
            raise Died

    def _happen(self, event: str, *, is_wire: bool, is_there: bool) -> None:
        what, _, whom = event.partition(" ")
        host = self.source if whom.startswith("source") else self.destination
        if what == "kill":
            self.kill(host, with_guard="guard" in whom)
        elif what == "reboot":
            self._quietly(host.reboot)
        elif what == "destroy":
            self._destroy(host)
        elif what == "cut":
            self.is_linked = False
        elif what == "fail":
            raise ExecutionError("it fails")
        elif what == "lose" and is_wire:
            raise Unreachable("it is lost")
        elif what == "cancel":
            for progress in self._progress.values():
                progress.cancel()
        elif is_there:
            return  # that agent is in the middle of something, and has a lock on it
        elif what == "tend":
            self._quietly(lambda: self._tend(self.destination, long=True))
        elif what == "echo":
            self._quietly(lambda: self._echo(-1))

    def _quietly(self, work: Callable[[], object]) -> None:
        self._is_quiet, before = True, self._is_quiet
        try:
            work()
        finally:
            self._is_quiet = before

    def kill(self, host: Host, *, with_guard: bool = False) -> None:
        """The agent alone, whose guard acts; or both."""
        host.stop()
        if with_guard and host.own is not None:
            host.own.guarded = False
        self._quietly(host.guard)

    def _destroy(self, host: Host) -> None:
        if self.other(host).exists:
            self._quietly(host.destroy)

    @contextmanager
    def _acting(self, source: Host, happenings: Happenings) -> Iterator[None]:
        """The agents work, and these things happen meanwhile."""
        self.source, self.destination = source, self.other(source)
        self._lives = {name: host.life for name, host in self.hosts.items()}
        self.calls._counts.clear()
        self.calls.seen.clear()
        self.asked_in_vain = 0
        known = moments() if happenings else []
        self._due = {known[index % len(known)]: event for index, event in happenings}
        try:
            with suppress(Died):
                yield
        finally:
            self._due, self._lives = {}, {}

    # -- what happens by itself -------------------------------------------------------------------------------------

    def _movable(self) -> Host | None:
        if all(host.exists for host in self.hosts.values()):
            for host in self.hosts.values():
                if host.own is not None and host.name in self.running and host.is_idle:
                    return host
        return None

    @precondition(lambda self: self._movable())
    @rule(happenings=HAPPENINGS)
    def migrate(self, happenings: Happenings) -> None:
        self.mend()
        source = self._movable()
        assert source is not None and source.own is not None
        name = next(self._names)
        there = self.other(source)
        progress = Progress(migration_pb2.Migration(name=name, container=NAME, source=source.name))
        self._progress = {name: progress}
        outgoings = FaultyOutgoings(source.outgoings, self.calls)
        source.working = name
        with self._acting(source, happenings):
            link = Link(self, source, there)
            here = Here(source.name, "6.18", ("fpu",), "4.2")
            Departure(name, here, source.own, link, outgoings, progress, Options()).run()
        if source.outgoings.get(name) is None:
            source.working = ""

    @precondition(lambda self: any(host.is_up for host in self.hosts.values()))
    @rule(side=SIDE, happenings=HAPPENINGS, long=st.booleans())
    def work(self, side: str, happenings: Happenings, long: bool) -> None:
        """The agent carries on what is not finished."""
        host = self.hosts[side]
        if not host.is_up:
            return
        for record in host.outgoings.unfinished():
            progress = self._progress.get(record.migration) or Progress(migration_pb2.Migration())
            outgoings = FaultyOutgoings(host.outgoings, self.calls)
            with self._acting(host, happenings), suppress(*FAILURES):
                link = Link(self, host, self.other(host))
                recovery.carry_on(record.migration, host.name, host.own, link, outgoings, progress)
                host.working = ""
            happenings = []
        if host.is_up:
            with self._acting(self.other(host), happenings):
                self._tend(host, long=long)

    def _tend(self, host: Host, *, long: bool) -> None:
        if not host.is_up:
            return
        for arrival in list(host.arrivals._arrivals.values()):
            arrival.heard_at -= 100 if long else 0
            arrival.unanswered = GIVE_UP_ASKS if long else 0
        host.arrivals.tend(lambda record: self._ask(host, record))

    def _ask(self, asker: Host, record: Incoming) -> "peer_pb2.Decision":
        source = self.other(asker)
        if not (self.is_linked and source.is_up):
            raise Unreachable(f"{source.name} does not answer")
        return source.decision(record)

    @precondition(lambda self: self.past)
    @rule(index=st.integers(0, 30))
    def echo(self, index: int) -> None:
        """What was sent before arrives once more."""
        self._quietly(lambda: self._echo(index))

    def _echo(self, index: int) -> None:
        if self.past:
            host, message = self.past[index % len(self.past)]
            if host.is_up:
                with suppress(*FAILURES):
                    message(host.arrivals)

    @rule(side=SIDE, event=st.sampled_from(["kill", "kill", "reboot", "reboot", "destroy"]))
    def strike(self, side: str, event: str) -> None:
        host = self.hosts[side]
        # One that is idle is not worth destroying: it is the end of the story.
        if not host.exists or (event == "destroy" and host.is_idle):
            return
        if event == "kill":
            self.kill(host)
        elif event == "reboot":
            self._quietly(host.reboot)
        else:
            self._destroy(host)

    @rule()
    def mend(self) -> None:
        """Both agents run and reach each other."""
        self.is_linked = True
        for name in self.hosts:
            self.start(name)

    @precondition(lambda self: not self._movable())
    @rule(long=st.booleans())
    def recover(self, long: bool) -> None:
        """All is well for a while."""
        self.mend()
        for name in self.hosts:
            self.work(name, [], long)
            self.start_container(name)

    @rule(side=SIDE)
    def start(self, side: str) -> None:
        host = self.hosts[side]
        if host.exists and not host.is_up:
            host.start()
            self._quietly(host.arrivals.recover)

    @rule()
    def cut(self) -> None:
        self.is_linked = False

    @rule(side=SIDE)
    def start_container(self, side: str) -> None:
        """One that has ended is started from its disk, if no migration holds it."""
        host = self.hosts[side]
        if host.is_up and host.own is not None and host.own.ended and host.is_idle:
            host.own.start_again()

    def resolve(self, host: Host) -> None:
        """The operator sees that the other host is gone for good, and says what is true."""
        assert not self.other(host).exists
        for outgoing in host.outgoings.unfinished():
            if outgoing.is_waiting:
                host.outgoings.resolve(outgoing.migration, Keep.HERE)
        for incoming in host.incomings.unfinished():
            if incoming.is_waiting:
                self._quietly(lambda m=incoming.migration: host.arrivals.resolve(m, Keep.HERE))  # type: ignore[misc]

    # -- what has to be so ------------------------------------------------------------------------------------------

    @invariant()
    def one_at_most(self) -> None:
        assert len(self.running) < 2, "two copies run"

    @invariant()
    def one_that_can(self) -> None:
        held = any(host.holds_complete() for host in self.hosts.values())
        if all(host.exists for host in self.hosts.values()):
            assert any(host.can_run() for host in self.hosts.values()), "none can run"
        elif self.is_doomed is None:
            self.is_doomed = not held
        else:
            assert held or self.is_doomed, "none can run"

    def teardown(self) -> None:
        """All is mended: it runs at one host, and nothing is left at the other."""
        try:
            self.mend()
            left = [host for host in self.hosts.values() if host.exists]
            for turn in range(8):
                # The destination's question may come first.
                for host in left if turn else reversed(left):
                    self.work(host.name, [], long=True)
                    if turn > 2 and len(left) < 2:
                        self.resolve(host)
                    self.one_at_most()
                    self.one_that_can()
            for host in left:
                self.start_container(host.name)
            for host in left:
                assert host.is_idle, "something is unfinished"
                assert not host.arrival_host.left(), "something is left"
            having = [host for host in left if host.own is not None]
            assert len(having) == (not self.is_doomed), f"at {[host.name for host in having]}"
            for host in having:
                assert host.own is not None and host.own.is_as_before()
                assert self.running == {host.name}
        finally:
            for host in self.hosts.values():
                host.arrival_host.close()
                host.database.close()
            self._folder.cleanup()


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "RETRY_S", 0.0)
    monkeypatch.setattr(answers, "PATIENCE_S", 0.0)
    monkeypatch.setattr(recovery, "RETRY_S", 0.0)
    monkeypatch.setattr(recovery, "LOST_PATIENCE_S", 0.0)
    monkeypatch.setattr(destination, "STREAM_END_S", 0.0)


Handovers.TestCase.settings = settings(
    max_examples=EXAMPLES,
    stateful_step_count=20,
    deadline=None,
    derandomize=EXAMPLES == 120,
    database=None,
    suppress_health_check=list(HealthCheck),
)
TestHandovers = Handovers.TestCase
