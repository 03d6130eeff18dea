"""What every WriteTracker must do, shown with real I/O: a replica that only gets what was collected becomes equal."""

import errno
import fcntl
import mmap
import os
import random
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

import pytest

from blockdev import blocks, extents, fiemap, filesystem, loop, tracker
from blockdev.block_device import BLOCK_BYTES, Statistics
from blockdev.bpf_program import COMPLETE, ISSUE
from blockdev.bpf_tracker import BpfTracker
from blockdev.errors import BlockError
from blockdev.extents import Range
from blockdev.marks import MAX_PAGES
from soakkit import soak
from soakkit.disk import TRACKERS, Disk, open_disk
from soakkit.writers import BLKDISCARD, BLKZEROOUT, MIB, writing

pytestmark = pytest.mark.root

REGION_BYTES = 1024 * BLOCK_BYTES
SEED = 20
PAGE = 4096

Disks = Callable[..., Disk]


@pytest.fixture
def disks(kind_of_tracker: str, tmp_path: Path) -> Iterator[Disks]:
    """Makes disks of which the tracker was started and the replica is equal."""
    with ExitStack() as stack:

        def make(name: str, size_bytes: int, kind: str = "", *, started: bool = True) -> Disk:
            disk = stack.enter_context(open_disk(tmp_path, name, size_bytes, kind_of_tracker, kind))
            if started:
                disk.first()
                assert disk.tracker.collect() == []
            return disk

        yield make


def _write(disk: Disk, at: int, length: int = PAGE, fill: bytes = b"x") -> None:
    with mmap.mmap(-1, length) as buffer, memoryview(buffer) as view:
        buffer[:] = fill * length
        os.pwrite(disk.source, view, at)


def _request(disk: Disk, request: int, at: int, length: int) -> None:
    fcntl.ioctl(disk.source, request, struct.pack("=2Q", at, length))


def _blocks(start: int, end: int) -> Range:
    return Range(start // BLOCK_BYTES * BLOCK_BYTES, -(-end // BLOCK_BYTES) * BLOCK_BYTES)


def _tell(found: list[Range], *written: Range) -> bool:
    """Whether what was found is what was written, or up to whole blocks of it."""
    blocks_of = extents.merge(_blocks(part.start, part.end) for part in written)
    outer, inner = extents.total(blocks_of), extents.total(found)
    return (
        extents.total(extents.merge([*found, *written])) == inner
        and extents.total(extents.merge([*found, *blocks_of])) == outer
        and extents.merge(found) == found
    )


def _everything(disk: Disk) -> list[Range]:
    return [Range(0, disk.size_bytes)]


# -- random writing of all shapes ------------------------------------------------------------------------------------


def _check(result: soak.Result, ways: set[str]) -> None:
    assert result.equal
    assert result.leftover_bytes == 0
    # Otherwise this would prove nothing.
    assert result.done >= ways
    assert any(result.covered)
    assert sorted(result.covered)[len(result.covered) // 2] < 0.5


FILE_WAYS = {"direct", "buffered", "synced", "mapped", "allocate", "punch", "cut", "remove"}


def test_200_rounds(kind_of_tracker: str, tmp_path: Path) -> None:
    _check(soak.soak_file_system(tmp_path, kind_of_tracker, "ext4", SEED, lambda number: number < 200), FILE_WAYS)


@pytest.mark.parametrize("kind", ["xfs", "btrfs"])
def test_file_systems_that_grow(kind_of_tracker: str, tmp_path: Path, kind: str) -> None:
    _check(soak.soak_file_system(tmp_path, kind_of_tracker, kind, SEED, lambda number: number < 30), set())


def test_a_bare_device(kind_of_tracker: str, tmp_path: Path) -> None:
    _check(soak.soak_device(tmp_path, kind_of_tracker, SEED, lambda number: number < 60), {"write", "discard", "zero"})


def test_several_devices_at_once_do_not_mix(disks: Disks) -> None:
    busy, idle = [disks("one", 70 * MIB), disks("two", 30 * MIB + PAGE)], disks("idle", 16 * MIB)
    with writing("device", [disk.device.path for disk in busy], SEED):
        for _ in range(30):
            for disk in busy:
                disk.round()
    for disk in busy:
        disk.round()
        assert disk.equal()
    assert idle.tracker.collect() == []


# -- one thing at a time ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [PAGE, BLOCK_BYTES, 5 * MIB + PAGE])
def test_a_whole_device_is_written(disks: Disks, size: int) -> None:
    disk = disks("whole", size)
    _write(disk, 0, size)
    assert disk.round() == _everything(disk)
    assert disk.equal()
    _request(disk, BLKDISCARD, 0, size)
    assert disk.round() == _everything(disk)
    assert disk.equal()
    assert disk.tracker.collect() == []


def test_what_was_zeros_again_before_it_is_copied(disks: Disks) -> None:
    disk = disks("there-and-back", MIB)
    _write(disk, 0)
    found = disk.tracker.collect()
    _request(disk, BLKZEROOUT, 0, PAGE)
    disk.copy(found)
    _write(disk, 0)
    disk.round()
    assert disk.equal()


def test_what_changes_while_it_is_copied_and_changes_back(disks: Disks) -> None:
    disk = disks("and-back-again", MIB)
    _write(disk, 0, fill=b"a")
    found = disk.tracker.collect()
    _write(disk, 0, fill=b"b")
    disk.copy(found)
    _write(disk, 0, fill=b"a")
    disk.round()
    assert disk.equal()


def test_data_that_goes_between_start_and_first_copy(disks: Disks) -> None:
    disk = disks("gone", MIB, started=False)
    _write(disk, 0, 2 * PAGE)
    disk.tracker.start()
    data = list(fiemap.allocated(disk.image, disk.size_bytes))
    _request(disk, BLKDISCARD, 0, PAGE)
    disk.copy(data)
    _request(disk, BLKDISCARD, 0, 2 * PAGE)
    disk.round()
    assert disk.equal()


@pytest.mark.parametrize("file_system", ["xfs", "btrfs"])
def test_a_file_system_grows(disks: Disks, tmp_path: Path, file_system: str) -> None:
    disk, at = disks("growing", 320 * MIB, file_system), tmp_path / "mounted"
    at.mkdir()
    filesystem.mount(disk.device.path, at, file_system)
    try:
        disk.grow(64 * MIB)
        assert disk.tracker.collect() == _everything(disk)
        filesystem.grow(at, file_system)
        # What is beyond the old end is tracked as well.
        _write(disk, disk.size_bytes - PAGE)
        filesystem.freeze(at)
        try:
            disk.copy(_everything(disk))
            disk.round()
            assert disk.equal()
            assert disk.tracker.collect() == []
        finally:
            filesystem.thaw(at)
    finally:
        filesystem.unmount(at)


def test_a_write_beyond_the_old_end_before_the_next_collect(disks: Disks) -> None:
    disk = disks("longer", MIB)
    disk.grow(REGION_BYTES)
    _write(disk, disk.size_bytes - PAGE)
    assert disk.round() == _everything(disk)
    assert disk.equal()
    assert disk.tracker.collect() == []


def test_reads_and_flushes_are_not_reported(disks: Disks) -> None:
    disk = disks("read", 16 * MIB)
    list(blocks.read(disk.source, _everything(disk)))
    os.fsync(disk.source)
    assert disk.tracker.collect() == []


def test_what_is_reported_lies_within_the_device(disks: Disks) -> None:
    disk = disks("odd", 3 * BLOCK_BYTES + PAGE)
    _write(disk, 3 * BLOCK_BYTES)
    assert disk.round() == [Range(3 * BLOCK_BYTES, 3 * BLOCK_BYTES + PAGE)]
    assert disk.tracker.collect() == []


# -- what it does not know -------------------------------------------------------------------------------------------


def test_without_a_start_the_first_collect_reports_everything(disks: Disks) -> None:
    disk = disks("unknown", 3 * MIB + PAGE, started=False)
    _write(disk, MIB)
    assert disk.round() == _everything(disk)
    _write(disk, 2 * MIB)
    assert _tell(disk.round(), Range(2 * MIB, 2 * MIB + PAGE))
    assert disk.equal()


CHILD = """
import sys
from pathlib import Path
from soakkit.disk import TRACKERS
tracker = TRACKERS[sys.argv[1]](Path(sys.argv[2]), Path(sys.argv[3]))
tracker.start()
print("started", flush=True)
sys.stdin.read()
"""


def test_after_the_death_of_its_process_a_new_one_reports_everything(
    disks: Disks, kind_of_tracker: str, tmp_path: Path
) -> None:
    disk = disks("restart", MIB, started=False)
    command = [sys.executable, "-c", CHILD, kind_of_tracker, str(disk.device.path), str(tmp_path / "restart.img")]
    root = Path(__file__).resolve().parents[2]
    child = subprocess.Popen(
        command, env={**os.environ, "PYTHONPATH": f"{root}:{root / 'scripts'}"}, stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    with child:
        assert child.stdout is not None
        assert child.stdout.readline() == "started\n"
        _write(disk, 0)
        child.send_signal(signal.SIGKILL)
    assert disk.round() == _everything(disk)
    assert disk.equal()
    assert disk.tracker.collect() == []


def _descriptors() -> set[str]:
    return {entry.name for entry in Path("/proc/self/fd").iterdir()}


@pytest.fixture
def device(tmp_path: Path) -> Iterator[loop.LoopDevice]:
    (tmp_path / "image").write_bytes(bytes(MIB))
    found = loop.attach(tmp_path / "image")
    yield found
    found.detach()


def test_nothing_stays_open(kind_of_tracker: str, tmp_path: Path, device: loop.LoopDevice) -> None:
    before = _descriptors()
    for _ in range(3):
        made = TRACKERS[kind_of_tracker](device.path, tmp_path / "image")
        made.start()
        made.start()
        made.collect()
        made.close()
    assert _descriptors() == before


def test_what_has_no_requests_is_refused(kind_of_tracker: str, tmp_path: Path) -> None:
    before = _descriptors()
    for path in (Path("/dev/null"), tmp_path):
        with pytest.raises(BlockError, match="cannot be tracked"):
            TRACKERS[kind_of_tracker](path, path)
    assert _descriptors() == before


def test_a_device_that_ebpf_fails_on_is_compared(
    tmp_path: Path, device: loop.LoopDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: BpfTracker) -> None:
        raise OSError(errno.ENOMEM, "no memory for the marks")

    monkeypatch.setattr(BpfTracker, "start", fail)
    before = _descriptors()
    made, why = tracker.start(device.path, tmp_path / "image")
    assert made.reads_all
    assert why == "[Errno 12] no memory for the marks"
    assert extents.total(made.collect()) == MIB
    made.close()
    assert _descriptors() == before


# -- one tracker's own -----------------------------------------------------------------------------------------------


@pytest.fixture
def ebpf_disk(tmp_path: Path) -> Iterator[Callable[[int], Disk]]:
    if os.geteuid() != 0:
        pytest.skip("needs root")
    if reason := tracker.probe():
        pytest.skip(f"this kernel cannot track by eBPF: {reason}")
    with ExitStack() as stack:

        def make(size_bytes: int) -> Disk:
            disk = stack.enter_context(open_disk(tmp_path, "large", size_bytes, "ebpf"))
            disk.tracker.start()
            return disk

        yield make


@pytest.mark.parametrize("request_number", [BLKDISCARD, BLKZEROOUT])
@pytest.mark.parametrize(
    ("start", "length"),
    [
        (0, 4096),
        (5 * 4096, REGION_BYTES),
        (0, REGION_BYTES),
        (REGION_BYTES, 2 * REGION_BYTES),
        (BLOCK_BYTES, REGION_BYTES),
        (REGION_BYTES - 4096, 2 * REGION_BYTES + 8192),
        (REGION_BYTES // 2, 100 * REGION_BYTES + 4096),
    ],
)
def test_long_requests_are_reported_exactly(
    ebpf_disk: Callable[[int], Disk], request_number: int, start: int, length: int
) -> None:
    disk = ebpf_disk(1 << 40)
    _request(disk, request_number, start, length)
    end = start + length
    found = disk.tracker.collect()
    assert _tell(found, Range(start, end))
    assert len(found) == 1
    assert disk.tracker.collect() == []


def test_a_device_of_16_tib(ebpf_disk: Callable[[int], Disk]) -> None:
    # ext4 has no larger file.
    size = (16 << 40) - BLOCK_BYTES
    disk = ebpf_disk(size)
    # By 64 KiB where nothing is known to be written, then by 4 KiB.
    for width in (BLOCK_BYTES, PAGE):
        for at in (0, 5 << 40, size - PAGE):
            _write(disk, at)
        assert disk.tracker.collect() == [
            Range(0, width),
            Range(5 << 40, (5 << 40) + width),
            Range(size - width, size),
        ]
        assert disk.tracker.collect() == []


def test_more_regions_are_written_than_can_be_told_apart_by_4_kib(ebpf_disk: Callable[[int], Disk]) -> None:
    disk = ebpf_disk(1 << 40)
    regions = range(0, (1 << 40) // REGION_BYTES, 12)
    assert len(regions) > MAX_PAGES
    for _ in range(2):
        for region in regions:
            _write(disk, region * REGION_BYTES + PAGE)
        found = disk.tracker.collect()
        assert _tell(
            found, *(Range(region * REGION_BYTES + PAGE, region * REGION_BYTES + 2 * PAGE) for region in regions)
        )
    assert sum(part.length == PAGE for part in found) == MAX_PAGES
    assert disk.tracker.collect() == []


@pytest.mark.parametrize("size", [200 * MIB, 1 << 40])
def test_requests_of_all_lengths_at_all_places(ebpf_disk: Callable[[int], Disk], size: int) -> None:
    disk, chance = ebpf_disk(size), random.Random(SEED)
    for _ in range(200):
        written = []
        for _ in range(chance.choice((1, 5))):
            start = chance.choice((0, REGION_BYTES, 2 * REGION_BYTES)) + chance.randrange(-40, 40) * PAGE
            start = max(0, start)
            length = chance.choice((1, 2, 15, 16, 17, 255, 256, 257, 300)) * PAGE
            _request(disk, BLKZEROOUT, start, length)
            written.append(Range(start, start + length))
        assert _tell(disk.tracker.collect(), *written)
    assert disk.tracker.collect() == []


def test_missed_events_mean_everything(ebpf_disk: Callable[[int], Disk]) -> None:
    disk = ebpf_disk(200 * MIB)
    _write(disk, MIB)
    assert isinstance(disk.tracker, BpfTracker)
    assert disk.tracker._marking is not None
    # A miss cannot be had at will: the count is made to look as if there had been one.
    disk.tracker._marking._missed += 1
    assert disk.tracker.collect() == _everything(disk)
    assert disk.tracker.collect() == []


def _leave_out(disk: Disk, *tracepoints: str) -> None:
    """Let the kernel call these programs no more, without a word: as a kernel was seen to do for moments."""
    assert isinstance(disk.tracker, BpfTracker)
    assert disk.tracker._marking is not None
    null = os.open(os.devnull, os.O_RDONLY)
    for name in tracepoints:
        os.dup2(null, disk.tracker._marking.programs[name]._link)
    os.close(null)


def test_a_completion_that_the_kernel_kept_from_the_program_is_reported(ebpf_disk: Callable[[int], Disk]) -> None:
    disk = ebpf_disk(200 * MIB)
    _write(disk, 64 * MIB)
    disk.tracker.collect()
    _leave_out(disk, COMPLETE)
    _write(disk, MIB)
    found = disk.tracker.collect()
    # Also what was reported the last time, which may have been under way then.
    assert found == [Range(MIB, MIB + PAGE), Range(64 * MIB, 64 * MIB + PAGE)]
    assert disk.tracker.collect() == []


def test_a_request_that_the_kernel_kept_from_both_programs_means_everything(
    ebpf_disk: Callable[[int], Disk],
) -> None:
    disk = ebpf_disk(200 * MIB)
    _leave_out(disk, COMPLETE, ISSUE)
    _write(disk, MIB)
    assert disk.tracker.collect() == _everything(disk)
    assert disk.tracker.collect() == []


@dataclass(frozen=True)
class HeldUp:
    """A disk on a file system that can be frozen: writes are under way for as long as the test likes."""

    disk: Disk
    at: Path
    stack: ExitStack

    def begin(self) -> threading.Thread:
        """A page at 1 MiB is under way on return."""
        filesystem.freeze(self.at)
        self.stack.callback(filesystem.thaw, self.at)
        writer = threading.Thread(target=_write, args=(self.disk, MIB))
        writer.start()
        self.stack.callback(writer.join)
        self.stack.callback(filesystem.thaw, self.at)
        with closing(Statistics(self.disk.device.path.stat().st_rdev)) as statistics:
            eventually = time.monotonic() + 30
            while statistics.read()[1] == 0:
                assert time.monotonic() < eventually, "the write was not begun"
                time.sleep(0.005)
        return writer

    def end(self, writer: threading.Thread) -> None:
        filesystem.thaw(self.at)
        writer.join()


@pytest.fixture
def held_up(tmp_path: Path) -> Iterator[HeldUp]:
    if os.geteuid() != 0:
        pytest.skip("needs root")
    if reason := tracker.probe():
        pytest.skip(f"this kernel cannot track by eBPF: {reason}")
    with ExitStack() as stack:
        below, at = tmp_path / "below", tmp_path / "at"
        at.mkdir()
        with below.open("xb") as file:
            os.truncate(file.fileno(), 256 * MIB)
        filesystem.make(below, "ext4")
        lower = loop.attach(below)
        stack.callback(lower.detach)
        filesystem.mount(lower.path, at, "ext4")
        stack.callback(filesystem.unmount, at)
        yield HeldUp(stack.enter_context(open_disk(at, "disk", 64 * MIB, "ebpf")), at, stack)


@pytest.mark.parametrize("collects", [1, 3])
def test_what_was_under_way_at_a_collect_and_ended_unseen_is_reported(held_up: HeldUp, collects: int) -> None:
    disk = held_up.disk
    disk.first()
    disk.tracker.collect()
    writer = held_up.begin()
    assert disk.tracker.collect() == [Range(MIB, MIB + PAGE)]
    for _ in range(collects - 1):
        assert disk.tracker.collect() == []
    _leave_out(disk, COMPLETE)
    held_up.end(writer)
    assert disk.tracker.collect() == [Range(MIB, MIB + PAGE)]
    assert disk.tracker.collect() == []


def test_what_was_under_way_at_the_start_and_ended_unseen_means_everything(held_up: HeldUp) -> None:
    disk = held_up.disk
    writer = held_up.begin()
    disk.first()
    assert disk.tracker.collect() == []
    _leave_out(disk, COMPLETE)
    held_up.end(writer)
    assert disk.round() == _everything(disk)
    assert disk.equal()
    assert disk.tracker.collect() == []
