"""The last moments before a container is stopped: what is written to its disk meanwhile, and how much of it is sent."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

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
    def send(self, requests: Iterator[peer_pb2.SendRequest]) -> None:
        list(requests)


class FakeContainer:
    def early_images(self) -> Sequence[Path]:
        return []


class FakeMemory:
    """`left` is what each look finds."""

    is_quick = True
    stays_behind = False

    def __init__(self, left: Sequence[int]) -> None:
        self._left = list(left)
        self.sent = 0

    def collect(self, moment: Moment = Moment.RUNNING) -> int:
        return 0 if moment is Moment.STOPPED else self._left.pop(0)

    def requests(self, _sender: object) -> Iterator[peer_pb2.SendRequest]:
        self.sent += 1
        return iter(())


def _stop(disk: FakeDisk, memory: FakeMemory | None = None) -> list[str]:
    """What is done with the disk until the container stands still."""
    progress = Progress(migration_pb2.Migration())
    anything: Any = None
    made: Any = disk
    peer: Any = FakePeer()
    container: Any = FakeContainer()
    of_memory: Any = memory
    rounds = Rounds(container, peer, lambda: anything, made, of_memory, progress, Options())
    with progress.phase("freeze"), ExitStack() as undo:
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


def test_memory_that_is_written_as_fast_as_it_is_sent_is_sent_once_more_just_before_it_stops() -> None:
    """However much may be left: what was written while the dump was prepared need not be."""
    _stop(FakeDisk([0, 0]), memory := FakeMemory([MUCH, MUCH]))
    assert memory.sent == 1


def test_memory_that_stays_behind_is_not_looked_at_before_it_stops() -> None:
    memory = FakeMemory([])
    memory.stays_behind = True
    _stop(FakeDisk([0]), memory)
    assert memory.sent == 0
