"""A migration waits for a place here and one there without holding its container, and in order."""

import threading
import time
from collections.abc import Callable

import pytest

from agent import turns
from agent.leases import Leases
from agent.places import Places
from agent.turns import Turn
from migrator.errors import Busy, Cancelled, Unreachable
from migrator.line import Line
from migrator.progress import Progress
from migrator.v1 import migration_pb2


class Destination:
    """Has one place, which is taken until it is told otherwise."""

    host = "host-b"

    def __init__(self) -> None:
        self.line = Line(1)
        self.taken = 1
        self.asked = 0
        self.reachable = True

    def queue(self, migration: str, waited_s: float, *, leave: bool = False) -> int:
        self.asked += 1
        if not self.reachable:
            raise Unreachable("gone")
        if leave:
            self.line.leave("host-a", migration)
            return 0
        return self.line.ask("host-a", migration, waited_s, self.taken)


class Bench:
    """Turns at one host with one place."""

    def __init__(self) -> None:
        self.leases, self.places, self.there = Leases(), Places(1), Destination()

    def turn(self, name: str) -> tuple[Turn, Progress]:
        progress = Progress(migration_pb2.Migration(name=name))
        made = Turn(name, f"ct-{name}", self.leases, self.places, "host-a", progress)
        made.take_container()
        return made, progress

    def is_held(self, name: str) -> bool:
        return self.leases.operation(f"ct-{name}") is not None

    def wait_there(self, turn: Turn) -> None:
        turn.wait_there(self.there)  # type: ignore[arg-type]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Bench:
    monkeypatch.setattr(turns, "ASK_S", 0.02)
    return Bench()


def eventually(probe: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not probe():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def begin(work: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def test_it_waits_here_without_its_container(bench: Bench) -> None:
    first, _ = bench.turn("a")
    first.join()
    first.wait_here()
    assert bench.is_held("a")
    second, progress = bench.turn("b")
    second.join()
    assert (progress.snapshot().queue_position, progress.snapshot().queue_host) == (1, "host-a")
    waiting = begin(second.wait_here)
    eventually(lambda: not bench.is_held("b"))
    first.close()
    waiting.join(20)
    assert bench.is_held("b")
    assert (progress.snapshot().queue_position, progress.snapshot().queue_host) == (0, "")
    second.close()
    assert not bench.is_held("b") and not bench.is_held("a")


def test_it_waits_there_without_its_container(bench: Bench) -> None:
    turn, progress = bench.turn("a")
    waiting = begin(lambda: bench.wait_there(turn))
    eventually(lambda: progress.snapshot().queue_host == "host-b")
    assert progress.snapshot().queue_position == 1
    assert not bench.is_held("a")
    bench.there.taken = 0
    waiting.join(20)
    assert bench.is_held("a")
    assert not progress.snapshot().queue_position
    turn.close()


def test_a_busy_container_is_waited_for_and_the_place_kept(bench: Bench) -> None:
    bench.there.taken = 0
    turn, _ = bench.turn("a")
    turn.close()
    with bench.leases.hold("ct-a", "a snapshot is taken"):
        waiting = begin(lambda: bench.wait_there(turn))
        eventually(lambda: bench.there.asked > 3)
    waiting.join(20)
    assert bench.is_held("a")
    turn.close()


def test_a_container_that_stays_busy_is_given_up(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "BUSY_S", 0.1)
    bench.there.taken = 0
    turn, _ = bench.turn("a")
    turn.close()
    with bench.leases.hold("ct-a", "a snapshot is taken"), pytest.raises(Busy, match="snapshot"):
        bench.wait_there(turn)
    assert bench.there.line.ask("host-c", "other", 0.0, 0) == 0, "it has left the line"


def test_who_is_cancelled_leaves_the_line(bench: Bench) -> None:
    turn, progress = bench.turn("a")
    progress.cancel()
    with pytest.raises(Cancelled):
        bench.wait_there(turn)
    assert bench.there.line.ask("host-c", "other", 0.0, 0) == 0
    turn.close()


def test_a_destination_that_is_away_for_a_moment_is_waited_for(bench: Bench) -> None:
    turn, _ = bench.turn("a")
    waiting = begin(lambda: bench.wait_there(turn))
    eventually(lambda: bench.there.asked > 1)
    bench.there.reachable = False
    before = bench.there.asked
    eventually(lambda: bench.there.asked > before + 2)
    bench.there.reachable, bench.there.taken = True, 0
    waiting.join(20)
    assert bench.is_held("a")
    turn.close()


def test_a_destination_that_stays_away_is_given_up(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "SILENCE_S", 0.1)
    turn, _ = bench.turn("a")
    bench.there.reachable = False
    with pytest.raises(Unreachable):
        bench.wait_there(turn)
    turn.close()
