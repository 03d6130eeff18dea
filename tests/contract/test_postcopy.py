"""Post-copy behind real restores by CRIU: pages that the store has not got are pulled while the process runs."""

import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from blockdev.blocks import Batch
from blockdev.extents import Range, sought
from migrator import postcopy
from migrator.errors import ExecutionError, Unreachable
from migrator.fill import missing
from migrator.fill.images import lazy_ranges
from migrator.fill.status import State
from migrator.fill.store import PAGE_BYTES, path_of
from migrator.handover import Incoming
from migrator.memory.reading import without_zeros
from migrator.postcopy import MemoryLost, Puller
from migrator.stream import Digests, Meter, Sender
from tests.contract.fill_kit import Room, Victim, kill_workers, room, victim

pytestmark = pytest.mark.root

RECORD = Incoming("m-1", "ct", "host-a", 1)
STALE = b"old!" * (PAGE_BYTES // 4)
SCENARIOS = ["none", "fork", "grandchildren", "exit", "exec", "munmap", "madvise", "mremap", "threads", "mixed", "slow"]


@pytest.fixture(scope="module")
def made() -> Iterator[Room]:
    with room() as found:
        yield found


class Source:
    """What was left behind of a victim, as its source would lend it. `break_after` so many answers a stream breaks."""

    def __init__(self, moved: Victim, share: float = 0.6) -> None:
        """Of all pages that may stay behind, this share does."""
        self.pages: dict[tuple[int, int], bytes] = {}
        self.asked: list[tuple[int, int]] = []
        self.is_lost = self.is_lost_in_the_end = False
        self.break_after = 1 << 30
        self.slowness_s = 0.0
        chance = random.Random(7)
        missing.make_pipes(moved.store)
        for pid in moved.pids:
            left = self._leave(moved, pid, chance, share)
            with missing.path_of(moved.store, pid).open("wb") as marks:
                for at, some in missing.marked(left, 1 << 20):
                    marks.seek(at)
                    marks.write(some)

    def _leave(self, moved: Victim, pid: int, chance: random.Random, share: float) -> list[tuple[int, int]]:
        left: list[tuple[int, int]] = []
        store = os.open(path_of(moved.store, pid), os.O_RDWR)
        for part in lazy_ranges(moved.images, pid):
            for first, last in list(sought(store, part.end, part.start)):
                for at in range(first, last, PAGE_BYTES):
                    if chance.random() < share:
                        self.pages[pid, at] = os.pread(store, PAGE_BYTES, at)
                        os.pwrite(store, STALE, at)
                        left.append((at, at + PAGE_BYTES))
        os.close(store)
        return left

    def lend(self, record: Incoming, requests: postcopy.Requests) -> "Stream":
        assert record == RECORD
        return Stream(self, requests)

    def read(self, pid: int, ranges: list[Range]) -> Iterator[Batch]:
        if self.is_lost:
            raise MemoryLost("it was given up")
        time.sleep(self.slowness_s)
        for part in ranges:
            for at in range(part.start, part.end, PAGE_BYTES):
                self.asked.append((pid, at))
                yield without_zeros([Range(at, at + PAGE_BYTES)], self.pages[pid, at])


class Stream:
    def __init__(self, source: Source, requests: postcopy.Requests) -> None:
        self._source = source
        self._closed = threading.Event()
        self._responses = postcopy.lend(requests, source.read, Sender("m-1", 1, Digests(), Meter()))

    def __iter__(self) -> postcopy.Responses:
        for number, response in enumerate(self._responses):
            if self._closed.is_set() or number == self._source.break_after:
                raise Unreachable("the link is cut")
            yield response
        if self._source.is_lost_in_the_end:
            raise MemoryLost("it was given up")

    def close(self) -> None:
        self._closed.set()


def pull(moved: Victim, source: Source) -> Puller:
    made = Puller(RECORD, moved.store, source.lend, lambda _: os.kill(moved.members()[0], signal.SIGKILL))
    made.hasten()
    return made


def expect_whole(moved: Victim, restarts: int = 0) -> None:
    status = moved.wait_until_filled()
    assert (status.state, status.left_bytes, status.restarts) == (State.DONE, 0, restarts), moved.log()
    assert set(moved.wait_for("bad", moved.count)) == {"bad 0"}


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_every_page_is_right(made: Room, scenario: str) -> None:
    with victim(made, scenario, 24) as moved:
        moved.dump()
        source = Source(moved)
        moved.launch()
        with closing(pull(moved, source)):
            moved.restore()
            expect_whole(moved)


@pytest.mark.parametrize("environment", [{"SPARSE": "1"}, {"HUGE": "1"}, {"LOCKED": "1"}, {"PROCESSES": "4"}])
def test_memory_of_all_kinds(made: Room, environment: dict[str, str]) -> None:
    with victim(made, "fork", 16, **environment) as moved:
        moved.dump()
        source = Source(moved, share=1.0)
        moved.launch()
        with closing(pull(moved, source)):
            moved.restore()
            expect_whole(moved)


def test_what_is_waited_for_comes_first(made: Room) -> None:
    """The process begins wherever its stack is, which is above all of what would come in order."""
    with victim(made, "none", 64) as moved:
        moved.dump()
        source = Source(moved, share=1.0)
        source.slowness_s = 0.02
        moved.launch()
        with closing(pull(moved, source)):
            moved.restore()
            expect_whole(moved)
        assert source.asked.index(max(source.asked)) < len(source.asked) // 2
        assert len(source.asked) < 1.2 * len(source.pages)


def test_only_what_is_waited_for_comes_before_it_runs(made: Room) -> None:
    with victim(made, "none", 64) as moved:
        moved.dump()
        source = Source(moved, share=1.0)
        moved.launch()
        with closing(Puller(RECORD, moved.store, source.lend, lambda _: None)) as puller:
            moved.restore()
            assert len(source.asked) < len(source.pages) / 2
            puller.hasten()
            expect_whole(moved)


def test_a_link_that_breaks_is_opened_again(made: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(postcopy, "RETRY_S", 0.05)
    with victim(made, "mixed", 24) as moved:
        moved.dump()
        source = Source(moved)
        source.break_after = 20
        moved.launch()
        with closing(pull(moved, source)):
            moved.restore()
            expect_whole(moved)


def test_who_pulls_may_be_replaced(made: Room) -> None:
    """As by an agent that is started again: what its predecessor had heard is said once more."""
    with victim(made, "threads", 48) as moved:
        moved.dump()
        source = Source(moved)
        source.slowness_s = 0.001
        moved.launch()
        first = pull(moved, source)
        moved.restore()
        first.close()
        assert missing.left_bytes(moved.store)
        time.sleep(0.3)
        assert moved.status.state is not State.DONE
        with closing(pull(moved, source)):
            expect_whole(moved)


@pytest.mark.parametrize("scenario", ["mixed", "threads", "slow"])
def test_a_worker_that_dies_is_replaced(made: Room, scenario: str) -> None:
    with victim(made, scenario, 48) as moved:
        moved.dump()
        source = Source(moved)
        source.slowness_s = 0.002
        fill = moved.launch()
        with closing(pull(moved, source)):
            moved.restore()
            kill_workers(fill, 3, 0.05)
            assert moved.wait_until_filled().state is State.DONE, moved.log()
            assert moved.wait_for("bad") == ["bad 0"]


def test_what_is_lost_is_said_and_the_fill_ends_with_the_process(made: Room) -> None:
    lost: list[str] = []
    with victim(made, "slow", 48) as moved:
        moved.dump()
        source = Source(moved)
        source.is_lost = True
        moved.launch()
        with closing(Puller(RECORD, moved.store, source.lend, lost.append)) as puller:
            puller.hasten()
            moved.restore()
            deadline = time.monotonic() + 5
            while not lost and time.monotonic() < deadline:
                time.sleep(0.01)
            assert lost == ["it was given up"]
            assert moved.status.state is not State.DONE
            for pid in moved.members():
                os.kill(pid, signal.SIGKILL)
            assert moved.wait_until_filled().state is State.DONE, moved.log()
            assert not moved.lines("bad")


def test_what_has_come_cannot_be_lost(made: Room) -> None:
    """The source ends its copy as soon as nothing is missing, whatever was asked for once more."""
    with victim(made, "threads", 24) as moved:
        moved.dump()
        source = Source(moved)
        source.is_lost_in_the_end = True
        moved.launch()
        with closing(pull(moved, source)) as puller:
            moved.restore()
            expect_whole(moved)
        assert not puller.is_working


def test_what_cannot_wait_is_not_left_behind(made: Room) -> None:
    with victim(made, "none", 1) as moved:
        moved.dump()
        Source(moved, share=0.0)
        (pid,) = moved.pids
        with missing.path_of(moved.store, pid).open("r+b") as marks:
            for start, _ in _vdso(moved, pid):
                marks.seek(start // PAGE_BYTES)
                marks.write(missing.MARK)
        with pytest.raises(ExecutionError, match="cannot be pulled"):
            moved.restore()


def _vdso(moved: Victim, pid: int) -> Iterator[tuple[int, int]]:
    """What of the store is not left to the fill."""
    lazy = lazy_ranges(moved.images, pid)
    with Path(path_of(moved.store, pid)).open("rb") as store:
        for first, last in sought(store.fileno(), 1 << 47):
            if not any(part.start <= first < part.end for part in lazy):
                yield first, last
