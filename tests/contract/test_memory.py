"""What every MemoryTracker must do, shown with real processes: a replica made of its reports becomes equal to them."""

import ctypes
import mmap
import os
import random
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as some

from blockdev import extents
from blockdev.extents import Range
from migrator.memory import (
    METHODS,
    Collected,
    MemoryTracker,
    Moment,
    ProcessGone,
    descriptors,
    make,
    mappings,
    pagemap,
    probe,
    processes,
    userfault,
    write_protect,
)
from migrator.memory.own import address_of
from migrator.memory.pagemap import PAGE_BYTES
from migrator.memory.write_protect import WriteProtectWatch
from tests.contract.memory_kit import Process, Replica, compiled

pytestmark = pytest.mark.root

STORM_ROUNDS = 15

Line = tuple[str, int, int, int, int]


@pytest.fixture(scope="session")
def child_program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("gcc") is None:
        pytest.skip("needs gcc")
    return compiled(tmp_path_factory.mktemp("child"), "memory_child.c")


@pytest.fixture(scope="session")
def storm_program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("gcc") is None:
        pytest.skip("needs gcc")
    return compiled(tmp_path_factory.mktemp("storm"), "memory_storm.c", "-pthread")


@pytest.fixture(scope="session")
def mapped_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("mapped") / "file"
    path.write_bytes(random.Random(1).randbytes(400_000))
    return path


@pytest.fixture(params=METHODS)
def method(request: pytest.FixtureRequest) -> str:
    if reason := probe()[request.param]:
        pytest.skip(f"this kernel: {reason}")
    return str(request.param)


class Followed:
    """A child, a tracker on it, and a replica."""

    def __init__(self, stack: ExitStack, method: str, *command: str | Path) -> None:
        self.child = stack.enter_context(closing(Process(*command)))
        self.tracker: MemoryTracker = stack.enter_context(closing(make(self.child.pids, method)))
        self.replica = Replica(self.tracker)

    def round(self, moment: Moment = Moment.RUNNING) -> None:
        """As a source does it: frozen for the collect where it has to be."""
        if moment.is_running and not self.tracker.needs_pause:
            self.replica.apply(self.tracker.collect(moment))
            return
        self.child.freeze()
        try:
            self.replica.apply(self.tracker.collect(Moment.PAUSED if moment.is_running else moment))
            if moment is Moment.STOPPED:
                self.replica.take(self.tracker.compare())
                self.ahead(self.child.pids()[::2])
                self.replica.apply(self.tracker.collect(Moment.LAST))
        finally:
            self.child.thaw()

    def ahead(self, pids: Sequence[int]) -> None:
        """Take the last look at some of its processes before the others."""
        for pid in pids:
            with suppress(ProcessGone):
                if change := self.tracker.collect_ahead(processes.key(pid)):
                    self.replica.apply(Collected([change]))

    def end(self) -> None:
        """The last round, and then nothing differs; the child goes on."""
        self.child.freeze()
        self.replica.apply(self.tracker.collect(Moment.LAST))
        assert self.replica.differences(self.child.pids()) == []
        self.child.thaw()


@pytest.fixture
def follow(method: str, child_program: Path, mapped_file: Path) -> Iterator[Callable[[], Followed]]:
    with ExitStack() as stack:
        yield lambda: Followed(stack, method, child_program, mapped_file)


number = some.integers(0, 2**32)
line = some.tuples(some.sampled_from("mmmwwwwwwuurrppddsbPPhlgfkxjJ"), number, number, number, number)
step = some.one_of(line, line, line, some.sampled_from([*Moment, Moment.RUNNING]))


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=some.lists(step, max_size=60), large=some.booleans())
def test_a_replica_equals_after_any_sequence(
    method: str, child_program: Path, mapped_file: Path, steps: list[Line | Moment], large: bool
) -> None:
    """All of its mappings are small, and may be taken for large ones."""
    with ExitStack() as stack:
        if large:
            stack.enter_context(mock.patch.object(write_protect, "_LARGE_BYTES", PAGE_BYTES))
        followed = Followed(stack, method, child_program, mapped_file)
        followed.child.say("m 0 50 0")
        followed.tracker.start()
        for what in steps:
            if isinstance(what, Moment):
                followed.round(what)
            else:
                followed.child.say(" ".join(map(str, what)))
        followed.end()


@pytest.mark.parametrize("seed", range(3))
def test_a_replica_equals_after_rounds_beside_a_busy_tree(follow: Callable[[], Followed], seed: int) -> None:
    followed = follow()
    followed.tracker.start()
    for again in range(3):
        followed.child.say(f"R {seed * 100 + again + 1}")
        until = time.monotonic() + 0.5
        while time.monotonic() < until:
            followed.round()
        followed.end()
        followed.child.say("w 0 0 0 0")


def test_a_mapping_that_another_is_joined_to(follow: Callable[[], Followed]) -> None:
    """Written before the next look, and again after it."""
    followed = follow()
    followed.child.say("j 0 0 0 1")
    followed.tracker.start()
    followed.round()
    followed.child.say("J")
    for value in range(2, 5):
        followed.child.say(f"w 0 0 3 {value}")
        followed.round()
    followed.child.say("w 0 0 3 5")
    followed.end()


@pytest.mark.parametrize("compared", [True, False])
def test_one_that_was_stopped_may_go_on(follow: Callable[[], Followed], compared: bool) -> None:
    """What page tables said when it was stopped is not lost, whether all shared memory was looked at or not."""
    followed = follow()
    followed.child.say("m 0 50 0")
    followed.tracker.start()
    for seed in range(3):
        followed.round()
        followed.child.say(f"R {seed + 1}")
        time.sleep(0.1)
        followed.child.freeze()
        followed.replica.apply(followed.tracker.collect(Moment.STOPPED))
        if compared:
            followed.replica.take(followed.tracker.compare())
            followed.ahead(followed.child.pids())
        followed.child.thaw()
        time.sleep(0.05)
        followed.round()
        followed.end()
        followed.child.say("w 0 0 0 0")


@pytest.mark.parametrize("ahead", [True, False])
def test_what_is_written_to_a_stopped_one(follow: Callable[[], Followed], ahead: bool) -> None:
    """From outside, as CRIU puts system calls into its code: a page of each mapping, one that is not there included."""
    followed = follow()
    for slot in range(3):
        followed.child.say(f"m {slot} 50 0")
    followed.tracker.start()
    followed.round()
    (pid, *_) = followed.child.pids()
    followed.child.freeze()
    followed.replica.apply(followed.tracker.collect(Moment.STOPPED))
    with Path(f"/proc/{pid}/mem").open("r+b", buffering=0) as memory:
        for area in mappings.read(pid):
            if area.is_private and not area.name.startswith("[v"):
                for at in {area.start, (area.start + area.end) // 2 & -PAGE_BYTES}:
                    memory.seek(at)
                    byte = memory.read(1)
                    memory.seek(at)
                    memory.write(bytes([byte[0] ^ 1]))
    if ahead:
        followed.ahead([pid])
        assert followed.replica.differences([pid]) == []
    last = followed.replica.apply(followed.tracker.collect(Moment.LAST))
    assert followed.replica.differences([pid]) == []
    assert any(change.written for change in last.processes) != ahead


def test_no_system_call_and_no_signal_is_disturbed(method: str, storm_program: Path) -> None:
    """It is followed from the start again and again, each time with system calls injected; it checks its own."""
    with closing(Process(storm_program, "fork")) as storm:
        assert storm.answer() == "ready\n"
        rounds = [0]
        for _ in range(STORM_ROUNDS):
            with closing(make(storm.pids, method)) as tracker:
                tracker.start()
                for _ in range(3):
                    if tracker.needs_pause:
                        storm.freeze()
                    tracker.collect(Moment.PAUSED if tracker.needs_pause else Moment.RUNNING)
                    if tracker.needs_pause:
                        storm.thaw()
            rounds.append(int(storm.say("on")))
        assert rounds == sorted(rounds)
        assert rounds[-1] > rounds[1]


@pytest.mark.skipif(not pagemap.has_scan(), reason="this kernel has no PAGEMAP_SCAN")
@pytest.mark.parametrize("part_mib", [4, 256, 1024])
def test_a_look_at_many_regions_is_in_order(part_mib: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """More than the kernel keeps before it hands them out (512), and than one call takes (16,384)."""
    monkeypatch.setattr(pagemap, "_PART_BYTES", part_mib << 20)
    pages = 1 << 17
    with mmap.mmap(-1, pages * PAGE_BYTES, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        start = address_of(memory)
        for written in (1000, 40_000):
            for number in range(written):
                memory[3 * number * PAGE_BYTES] = 1
            with pagemap.Pagemap(os.getpid()) as source:
                found = list(source.scan(start, start + len(memory), pagemap.ANONYMOUS))
            assert [(region.start - start) // PAGE_BYTES for region in found] == [3 * n for n in range(written)]


@pytest.mark.skipif(not pagemap.has_scan(), reason="this kernel has no PAGEMAP_SCAN")
def test_a_look_in_parts_fails_if_one_is_not_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pagemap, "_PART_BYTES", 1 << 20)
    descriptor = userfault.create()
    userfault.agree(descriptor)
    with mmap.mmap(-1, 64 << 20, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        start = address_of(memory)
        end, middle = start + len(memory), start + len(memory) // 2
        memory[0] = memory[-1] = 1
        with pagemap.Pagemap(os.getpid()) as source:
            userfault.register(descriptor, start, middle)
            with pytest.raises(PermissionError):
                list(source.scan(start, end, pagemap.ANONYMOUS, protect=True))
            userfault.register(descriptor, middle, end)
            list(source.scan(start, end, pagemap.ANONYMOUS, protect=True))
            memory[0] = 2
            for expected in ([start], []):
                found = source.scan(start, end, pagemap.ANONYMOUS, protect=True)
                assert [region.start for region in found if region.categories & pagemap.WRITTEN] == expected
        userfault.unregister(descriptor, start, end)
    os.close(descriptor)


@pytest.mark.skipif(not pagemap.has_scan(), reason="this kernel has no PAGEMAP_SCAN")
def test_what_cannot_be_protected_is_told_and_nothing_beside_it() -> None:
    """A droppable mapping, as glibc 2.41 has one, between two others."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype, libc.mmap.argtypes = ctypes.c_void_p, [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 4]
    anonymous, droppable, fixed, both = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, mmap.MAP_ANONYMOUS | 0x08, 0x10, 3
    start = libc.mmap(None, 5 * PAGE_BYTES, 0, anonymous, -1, 0)
    parts = [Range(start + number * PAGE_BYTES, start + (number + 1) * PAGE_BYTES) for number in range(1, 4)]
    for part, kind in zip(parts, (anonymous, droppable, anonymous), strict=True):
        if libc.mmap(part.start, PAGE_BYTES, both, kind | fixed, -1, 0) != part.start:
            pytest.skip("this kernel has no droppable mappings (Linux 6.11)")
        ctypes.memset(part.start, 1, PAGE_BYTES)
    descriptor = userfault.create()
    userfault.agree(descriptor)
    with closing(WriteProtectWatch(descriptor)) as watch, pagemap.Pagemap(os.getpid()) as source:
        areas = [area for area in mappings.read(os.getpid()) if parts[0].start <= area.start < parts[-1].end]
        assert len(areas) == 3
        for expected in ([Range(parts[0].start, parts[-1].end)], [parts[1]], [parts[1]]):
            assert extents.merge(watch.scan(source, areas).written) == expected
        ctypes.memset(parts[0].start, 2, PAGE_BYTES)
        assert extents.merge(watch.scan(source, areas).written) == [Range(parts[0].start, parts[1].end)]
    libc.munmap(ctypes.c_void_p(start), ctypes.c_size_t(5 * PAGE_BYTES))


def test_a_file_on_a_path_that_is_too_long_to_be_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for _ in range(20):
        Path("x" * 250).mkdir()
        os.chdir("x" * 250)
    with Path("file").open("w") as file:
        monkeypatch.undo()
        assert descriptors.look(os.getpid(), direct=True).direct_devices == frozenset(), file
    shutil.rmtree(tmp_path)
