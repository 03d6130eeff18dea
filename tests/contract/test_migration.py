"""The two ends of a migration against each other, with every call of either failing once, before or after its effect.

Whatever fails: at the end exactly one end runs the container, the other has nothing left of it, and both records are
finished. The same for either agent dying at every call, and for a link that is cut at every call for good or for long.
"""

import itertools
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, suppress
from pathlib import Path
from typing import NamedTuple

import pytest

import blockdev.pool
from blockdev import kernel
from blockdev.blocks import Piece
from migrator import answers, rounds
from migrator.errors import ExecutionError, Unreachable
from migrator.handover import Decision, Stage
from migrator.numbered import Outbound
from migrator.progress import Progress
from migrator.source import FEATURES, Departure
from migrator.stream import Digests, Meter, Sender
from migrator.v1 import container_pb2, migration_pb2, peer_pb2
from tests.fakes.ends import (
    LIVE,
    Died,
    FakeMemory,
    Fault,
    FaultyOutgoings,
)
from tests.fakes.pair import FAILURES, HERE, Pair, die, make_pair, names

MS_BIND, MNT_DETACH = 4096, 2
STOPPED = container_pb2.CONTAINER_STATE_STOPPED


class Case(NamedTuple):
    """A container in this state; one that `pulls` is moved by post-copy."""

    state: "container_pb2.ContainerState"
    pulls: bool = False


RUNNING = Case(LIVE)
PULLED = Case(LIVE, pulls=True)
CASES = pytest.mark.parametrize("case", [RUNNING, Case(STOPPED), PULLED], ids=["running", "stopped", "pulled"])
LIVE_CASES = pytest.mark.parametrize("case", [RUNNING, PULLED], ids=["running", "pulled"])


@pytest.fixture
def pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Pair]:
    with make_pair(tmp_path / "pair", monkeypatch) as made:
        yield made


def pair_of(folder: Path, monkeypatch: pytest.MonkeyPatch, case: Case) -> AbstractContextManager[Pair]:
    return make_pair(folder, monkeypatch, case.state, leave_memory=case.pulls)


# While it pulls, as often as that takes.
ASKED_AGAIN = (("peer.decide", 1), ("destination.run", 1))


def all_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: Case) -> list[tuple[str, int]]:
    """What every migration of this case without a fault calls, in order."""
    with pair_of(tmp_path / "dry", monkeypatch, case) as pair:
        pair.migrate()
        assert pair.expect_settled(case.state == LIVE)
        return [call for call in pair.calls.seen if not (case.pulls and call in ASKED_AGAIN)]


@CASES
def test_it_moves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: Case) -> None:
    with pair_of(tmp_path / "pair", monkeypatch, case) as pair:
        _, progress = pair.migrate()
        assert pair.expect_settled(case.state == LIVE)
        (made,) = pair.host.reservations.values()
        assert made.volumes[0].read_bytes() == pair.container.image.read_bytes()
        assert made.log.read_text() == "a line\n"
        if case.state == LIVE:
            shared = made.shared.memfd(7)
            assert shared is not None
            assert os.pread(shared, 8192, 0) == b"s" * 4096
            assert pair.container.left_out == 1
            with (made.memory / "mem-7").open("rb") as memory:
                one, other = FakeMemory.pages
                memory.seek(one.start)
                assert memory.read(one.length) == b"m" * one.length
                memory.seek(other.start)
                assert any(memory.read(other.length)) == case.pulls
                if case.pulls:
                    memory.seek(FakeMemory.rush.start)
                    assert memory.read(FakeMemory.rush.length) == b"r" * FakeMemory.rush.length
        migration = progress.snapshot()
        assert (migration.outcome, migration.where_running) == (migration_pb2.OUTCOME_MIGRATED, "b")


@CASES
def test_verify_finds_what_was_not_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: Case) -> None:
    with pair_of(tmp_path / "pair", monkeypatch, case) as pair:
        asked = itertools.count()

        def damage(call: str) -> None:
            # The first digests are the base's.
            if call == "digest" and next(asked) == 1:
                (made,) = pair.host.reservations.values()
                with made.volumes[0].open("r+b") as file:
                    file.seek(77)
                    file.write(b"!")

        pair.peer.intercept = damage
        name, progress = pair.migrate()
        pair.carry_on(name, progress)
        pair.tend()
        assert not pair.expect_settled(case.state == LIVE)
        migration = progress.snapshot()
        assert (migration.outcome, migration.where_running) == (migration_pb2.OUTCOME_ROLLED_BACK, "a")
        assert migration.reason == "VERIFY"


def test_a_connection_that_was_given_up_is_not_waited_for(pair: Pair) -> None:
    """The destination may learn of its end seconds after the source, which has sent the rest by another one."""
    request = peer_pb2.PrepareRequest(
        migration="m-1", epoch=5, container="ct", spec=pair.container.spec, state=STOPPED, features=FEATURES
    )
    arrivals, digests = pair.arrivals(), Digests()
    arrivals.prepare("a", request)
    arrival = arrivals.get("a", "m-1", 5)
    pieces = [Piece(number * 4096, 4096, bytes([number]) * 4096) for number in (1, 2)]
    stream = Outbound(1, Sender("m-1", 5, digests, Meter()).requests("volume/0", pieces))
    was_given_up, ended = threading.Event(), threading.Event()

    def silent() -> Iterator[peer_pb2.SendRequest]:
        was_given_up.set()
        ended.wait(60)
        yield from ()

    first = next(stream.attempt())
    old = threading.Thread(target=lambda: list(arrival.send(silent(), first)))
    old.start()
    try:
        was_given_up.wait(10)
        again = stream.attempt()
        for answer in arrival.send(again, next(again)):
            stream.answered(answer)
        stream.check_complete()
        arrival.restore(digests.all())
        assert arrival.record.stage is Stage.READY
    finally:
        ended.set()
        old.join()
    arrival.decide(peer_pb2.DECISION_ABORTED)


@pytest.mark.root
def test_what_is_left_under_a_pool_file_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pool that cannot grow any more has I/O errors for all that are on it, however much room it shows."""
    if os.geteuid() != 0:
        pytest.skip("needs root")
    small, large = tmp_path / "small", tmp_path / "large"
    for folder in (small, large):
        folder.mkdir()
    with ExitStack() as stack:
        kernel.mount("tmpfs", small, "tmpfs", 0, "size=64m")
        stack.callback(kernel.umount, small, MNT_DETACH)
        (small / blockdev.pool.FOLDER).mkdir()
        kernel.mount(large, small / blockdev.pool.FOLDER, "none", MS_BIND)
        # What was broken off may be closed later.
        stack.callback(kernel.umount, small / blockdev.pool.FOLDER, MNT_DETACH)
        (small / blockdev.pool.FILE).write_bytes(bytes(63 << 20))
        pair = stack.enter_context(make_pair(small / blockdev.pool.FOLDER / "pair", monkeypatch))
        name, progress = pair.migrate()
        pair.carry_on(name, progress)
        pair.tend()
        assert not pair.expect_settled()
        assert progress.snapshot().reason == "NO_SPACE"


@pytest.mark.parametrize(("bursts", "retreats"), [(1, 1), (rounds.RETREATS + 2, rounds.RETREATS)])
def test_a_burst_in_the_last_moment_lets_it_go_on(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, bursts: int, retreats: int
) -> None:
    """But not for ever."""
    # Zeros are sent so fast that nothing is too much.
    monkeypatch.setattr(rounds, "RETREAT", 0.001)
    pair.container.bursts = bursts
    _, progress = pair.migrate()
    assert pair.expect_settled()
    assert [name for name, _ in pair.calls.seen].count("source.go on") == retreats
    assert sum("it goes on" in note for note in progress.snapshot().notes) == retreats


ERRORS: dict[str, Callable[[str], BaseException]] = {
    "execution": ExecutionError,
    "os": lambda text: OSError(5, text),
    "wire": Unreachable,
}


@CASES
@pytest.mark.parametrize("error", ERRORS)
def test_every_call_fails_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: Case, error: str) -> None:
    calls = all_calls(tmp_path, monkeypatch, case)
    for index, ((name, number), after) in enumerate(itertools.product(calls, (False, True))):
        if name.startswith("journal") and error != "execution":
            continue
        if name.startswith("peer") and error == "os":
            continue
        fault = Fault(name, number, after, ERRORS[error])
        with pair_of(tmp_path / str(index), monkeypatch, case) as pair:
            pair.calls.fault = fault
            migration, progress = pair.migrate()
            assert pair.calls.struck, fault
            pair.carry_on(migration, progress)
            for _ in range(3):
                pair.tend()
            moved = check(pair, fault, case)
            outcome = progress.snapshot()
            if moved:
                assert outcome.outcome == migration_pb2.OUTCOME_MIGRATED, fault
            else:
                assert outcome.outcome in (migration_pb2.OUTCOME_REFUSED, migration_pb2.OUTCOME_ROLLED_BACK), fault
                assert str(fault) in outcome.error or name.startswith("journal a.abort"), (fault, outcome.error)
            if not moved:
                next_one_works(pair, fault, case)


@CASES
def test_every_call_fails_for_a_while(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: Case) -> None:
    """As with a disk that is full until somebody makes room: from a moment on every call of a kind fails."""
    calls = all_calls(tmp_path, monkeypatch, case)
    for index, ((name, number), after) in enumerate(itertools.product(calls, (False, True))):
        fault = Fault(name, number, after, ExecutionError, lasting=True)
        with pair_of(tmp_path / str(index), monkeypatch, case) as pair:
            pair.calls.fault = fault
            pair.calls.at_strike = Mended(pair)
            migration, progress = pair.migrate()
            assert pair.calls.struck, fault
            with suppress(AssertionError, *FAILURES):
                pair.carry_on(migration, progress)
            pair.calls.fault = None
            pair.carry_on(migration, progress)
            for _ in range(3):
                pair.tend()
            if not check(pair, fault, case):
                next_one_works(pair, fault, case)


class Mended:
    """Ends a fault when it has struck often enough to have been met by the way back, too."""

    STRIKES = 4

    def __init__(self, pair: Pair) -> None:
        self._pair = pair
        self._strikes = 0

    def __call__(self) -> None:
        self._strikes += 1
        if self._strikes == self.STRIKES:
            self._pair.calls.fault = None


@CASES
def test_destination_dies_at_every_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: Case) -> None:
    calls = all_calls(tmp_path, monkeypatch, case)
    mine = [call for call in calls if call[0].startswith(("destination", "journal b"))]
    for index, ((name, number), after, reboot) in enumerate(itertools.product(mine, (False, True), (False, True))):
        committed = (name, after) == ("journal b.own", True)
        if reboot and (committed or name in ("destination.run", "destination.settle")):
            continue  # the container was that host's own: a reboot ends it as any other
        # Over the wire a dead agent is one that cannot be reached; it stays dead until it is started again.
        fault = Fault(name, number, after, Unreachable)
        with pair_of(tmp_path / str(index), monkeypatch, case) as pair:
            pair.calls.fault = fault
            monkeypatch.setattr(answers, "PATIENCE_S", 0.0)
            dead = DeadForOneQuestion(pair, reboot)
            pair.peer.intercept = dead.heard
            migration, progress = pair.migrate()
            assert pair.calls.struck, fault
            dead.restart()
            pair.carry_on(migration, progress)
            for _ in range(3):
                pair.tend()
            check(pair, fault, case)


class DeadForOneQuestion:
    """A destination whose agent has died by a fault, and is started again when it is asked the second time."""

    def __init__(self, pair: Pair, reboot: bool) -> None:
        self._pair = pair
        self._reboot = reboot
        self._asked = self._restarted = False

    def heard(self, call: str) -> None:
        if not self._pair.calls.struck or self._restarted:
            return
        if call == "decide" and not self._asked:
            self._asked = True
            raise Unreachable("it is dead")
        self.restart()

    def restart(self) -> None:
        if self._restarted:
            return
        self._restarted = True
        self._pair.calls.fault = None
        if self._reboot:
            for made in self._pair.host.reservations.values():
                made.reboot()
        self._pair.restart_destination()


@LIVE_CASES
@pytest.mark.parametrize("guard", [True, False], ids=["guard", "no guard"])
def test_source_dies_at_every_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: Case, guard: bool) -> None:
    calls = all_calls(tmp_path, monkeypatch, case)
    for index, ((name, number), after) in enumerate(itertools.product(calls, (False, True))):
        if name.startswith(("destination", "journal b")):
            continue
        fault = Fault(name, number, after, Died)
        with pair_of(tmp_path / str(index), monkeypatch, case) as pair:
            pair.calls.fault = fault
            migration, progress = die(pair)
            assert pair.calls.struck, fault
            pair.source_is_up = False
            record = pair.outgoings.get(migration)
            if guard and record is not None and record.decision is not Decision.RELEASED:
                # As agent.guard.
                pair.outgoings.abort(migration)
                pair.container.resume()
                assert pair.world.source_runs
            pair.tend()
            pair.source_is_up = True
            pair.carry_on(migration, progress)
            for _ in range(3):
                pair.tend()
            check(pair, fault, case)


@LIVE_CASES
def test_link_is_cut_at_every_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: Case) -> None:
    calls = [call for call in all_calls(tmp_path, monkeypatch, case) if call[0].startswith("peer")]
    for index, ((name, number), after) in enumerate(itertools.product(calls, (False, True))):
        fault = Fault(name, number, after, Unreachable)
        with pair_of(tmp_path / str(index), monkeypatch, case) as pair:
            pair.calls.fault = fault
            monkeypatch.setattr(answers, "PATIENCE_S", 0.0)
            link = CutLink(pair)
            pair.peer.intercept = link.heard
            migration, progress = pair.migrate()
            assert pair.calls.struck, fault
            link.healed = True
            pair.calls.fault = None
            pair.carry_on(migration, progress)
            for _ in range(3):
                pair.tend()
            if not check(pair, fault, case):
                next_one_works(pair, fault, case)


class CutLink:
    """After the fault nothing gets through for some questions, or, while the source can do without, for good."""

    def __init__(self, pair: Pair) -> None:
        self.healed = False
        self._pair = pair
        self._lost = 0

    def heard(self, _call: str) -> None:
        if not self._pair.calls.struck or self.healed:
            return
        self._lost += 1
        if self._pair.world.source_runs or self._lost <= 3:
            raise Unreachable("the link is cut")


@LIVE_CASES
def test_cancelled_at_every_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: Case) -> None:
    calls = all_calls(tmp_path, monkeypatch, case)
    outcomes = []
    for index, ((name, number), after) in enumerate(itertools.product(calls, (False, True))):
        with pair_of(tmp_path / str(index), monkeypatch, case) as pair:
            outcomes.append(cancelled_at(pair, case, (name, number, after)))
    assert outcomes.count(True) > 10
    assert outcomes.count(False) > 10


def cancelled_at(pair: Pair, case: Case, moment: tuple[str, int, bool]) -> bool:
    """Whether the cancellation was accepted; then it has to be true, and else the container has to move."""
    made = next(names)
    progress = Progress(migration_pb2.Migration(name=made, container="ct", source="a", destination="b"))
    accepted: list[bool] = []

    def witness(*call: object) -> None:
        if call == moment:
            accepted.append(progress.cancel())

    pair.calls.witness = witness
    outgoings = FaultyOutgoings(pair.outgoings, pair.calls)
    Departure(made, HERE, pair.container, pair.peer, outgoings, progress, pair.options).run()
    if case.pulls:
        pair.tend()
    moved = check(pair, moment, case)
    assert accepted == [not moved], moment
    assert moved or progress.snapshot().exit_code == 130
    return not moved


def test_source_gone_for_good_before_ready(pair: Pair) -> None:
    pair.calls.fault = Fault("peer.hold traffic", 0, True, Died)
    die(pair)
    pair.source_is_up = False
    pair.tend()
    assert not pair.host.left()
    assert not pair.incomings.unfinished()


def test_silence_after_ready_decides_nothing(pair: Pair) -> None:
    pair.calls.fault = Fault("peer.restore", 0, True, Died)
    migration, progress = die(pair)
    pair.source_is_up = False
    for _ in range(5):
        pair.tend()
    assert "held" in pair.host.left()
    pair.restart_destination()
    assert "held" in pair.host.left()
    pair.source_is_up = True
    pair.carry_on(migration, progress)
    check(pair, pair.calls.fault, RUNNING)


def check(pair: Pair, fault: object, case: Case) -> bool:
    try:
        return pair.expect_settled(case.state == LIVE)
    except AssertionError as error:
        raise AssertionError(f"{fault}: {error}") from error


def next_one_works(pair: Pair, fault: object, case: Case) -> None:
    pair.calls.fault = None
    _, progress = pair.migrate()
    assert check(pair, f"after {fault}", case), progress.snapshot().error
