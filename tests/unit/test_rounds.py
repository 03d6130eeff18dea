"""The last moments before a container is stopped: what is written to its disk meanwhile, and how much of it is sent."""

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from migrator.convergence import OnNoConverge
from migrator.memory import Moment
from migrator.options import Options
from migrator.progress import Progress
from migrator.rounds import LAST_ROUNDS, LITTLE_BYTES, Rounds
from migrator.v1 import migration_pb2, peer_pb2

MUCH = 16 * LITTLE_BYTES


class FakeDisk:
    """So many bytes are found by each look."""

    def __init__(self, left: list[int], *, is_quick: bool = True) -> None:
        self.is_quick = is_quick
        self.did: list[str] = []
        self._left = left

    def sync(self) -> None:
        self.did.append("sync")

    def collect(self) -> int:
        self.did.append("collect")
        return self._left.pop(0)

    def requests(self, _sender: object) -> Iterator[peer_pb2.SendRequest]:
        self.did.append("send")
        return iter(())


class FakePeer:
    def __init__(self, seconds_a_round: float) -> None:
        self._seconds = seconds_a_round

    def send(self, requests: Iterator[peer_pb2.SendRequest]) -> None:
        list(requests)
        time.sleep(self._seconds)


class FakeContainer:
    name = "ct101"
    unwritten_bytes = 0

    def early_images(self) -> Sequence[Path]:
        return []


class FakeMemory:
    """`left` is what each look finds."""

    is_quick = True
    stays_behind = False
    shared_bytes = 0

    def __init__(self, left: Sequence[int]) -> None:
        self._left = list(left)
        self.sent = 0

    def collect(self, moment: Moment = Moment.RUNNING) -> int:
        return 0 if moment is Moment.STOPPED else self._left.pop(0)

    def requests(self, _sender: object) -> Iterator[peer_pb2.SendRequest]:
        self.sent += 1
        return iter(())


def _stop(
    disk: FakeDisk, memory: FakeMemory | None = None, options: Options | None = None, *, seconds_a_round: float = 0.0
) -> list[str]:
    """What is done with the disk until the container stands still; with `memory` there were rounds before."""
    progress = Progress(migration_pb2.Migration())
    anything: Any = None
    made: Any = disk
    peer: Any = FakePeer(seconds_a_round)
    container: Any = FakeContainer()
    of_memory: Any = memory
    rounds = Rounds(container, peer, lambda: anything, made, of_memory, progress, options or Options())
    with progress.phase("freeze"), ExitStack() as undo:
        if memory is not None:
            rounds.converge(undo)
        rounds.hurry()
        rounds.stop(undo, lambda: disk.did.append("stop"))
    return disk.did


@pytest.mark.parametrize(
    ("left", "rounds"),
    [
        ([0], 0),
        ([MUCH, 0], 1),
        ([MUCH, MUCH // 2, LITTLE_BYTES], 2),
        ([MUCH << 9 - shift for shift in range(9)], LAST_ROUNDS),
        ([MUCH] * 9, 1),  # it stays as much
    ],
)
def test_what_is_written_at_the_last_moment_is_sent_before_it_stops(left: list[int], rounds: int) -> None:
    did = _stop(FakeDisk(left))
    assert did.count("send") == rounds
    # Nothing is to be dirty that the freeze would have to write.
    assert did[-2:] == ["sync", "stop"]


def test_what_takes_a_look_at_everything_is_not_looked_at_once_more() -> None:
    assert set(_stop(FakeDisk([], is_quick=False))) == {"sync", "stop"}


@pytest.mark.parametrize(
    ("left", "on_no_converge", "rounds"),
    [
        (MUCH, OnNoConverge.FREEZE, 3),
        (8 * MUCH, OnNoConverge.FREEZE, 2),  # as much would be left
        (MUCH, OnNoConverge.POSTCOPY, 2),  # it stays behind
    ],
)
def test_memory_that_never_converges_is_sent_once_more_where_that_leaves_less(
    left: int, on_no_converge: OnNoConverge, rounds: int
) -> None:
    memory = FakeMemory([MUCH, MUCH, left, MUCH, MUCH])
    options = Options(on_no_converge=on_no_converge)
    _stop(FakeDisk([0] * 9), memory, options, seconds_a_round=0.1)
    assert memory.sent == rounds
