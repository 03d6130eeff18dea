"""What every WriteTracker must do, shown with real I/O: a replica that only gets what was collected becomes equal."""

import fcntl
import mmap
import os
import random
import struct
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

import pytest

from blockdev import blocks, extents, filesystem, loop, tracker
from blockdev.blocks import Piece
from blockdev.extents import Range
from blockdev.tracker import BLOCK_BYTES, BpfTracker, WriteTracker

pytestmark = pytest.mark.root

MIB = 1 << 20
REGION_BYTES = 1024 * BLOCK_BYTES
ROUNDS = 30
# Of linux/fs.h: _IO(0x12, 119), _IO(0x12, 127), _IOWR('X', 121, struct fstrim_range)
BLKDISCARD, BLKZEROOUT, FITRIM = 0x1277, 0x127F, 0xC0185879

TRACKERS: dict[str, Callable[[Path], WriteTracker]] = {"bpf": BpfTracker}


@pytest.fixture(params=TRACKERS)
def track(request: pytest.FixtureRequest) -> Callable[[Path], WriteTracker]:
    if os.geteuid() != 0:
        pytest.skip("needs root")
    if reason := tracker.probe():
        pytest.skip(f"this kernel cannot track by eBPF: {reason}")
    return TRACKERS[request.param]


@dataclass(frozen=True)
class Disk:
    """An attached image, a tracker on it, and a replica that is brought up to date by what the tracker reports."""

    device: loop.LoopDevice
    tracker: WriteTracker
    source: int
    image: int
    replica: Path
    target: int
    size_bytes: int

    def copy(self, ranges: list[Range]) -> list[Range]:
        for piece in blocks.read(self.source, ranges, image=self.image):
            blocks.write(self.target, piece, self.size_bytes)
        return ranges

    def round(self) -> list[Range]:
        return self.copy(self.tracker.collect())

    def difference(self) -> str:
        """The first one there is. By the image: the device's own page cache may have what a file system threw away."""
        command = ["cmp", f"/proc/self/fd/{self.image}", str(self.replica)]
        done = subprocess.run(command, capture_output=True, text=True, pass_fds=[self.image], check=False)
        return done.stdout + done.stderr


@pytest.fixture
def disks(track: Callable[[Path], WriteTracker], tmp_path: Path) -> Iterator[Callable[..., Disk]]:
    """Makes disks: the replica is equal to begin with, and the tracker knows nothing yet."""
    with ExitStack() as stack:

        def opened(path: Path, flags: int) -> int:
            descriptor = os.open(path, flags)
            stack.callback(os.close, descriptor)
            return descriptor

        def make(name: str, size_bytes: int, kind: str = "") -> Disk:
            image, replica = tmp_path / f"{name}.img", tmp_path / f"{name}.replica"
            for path in (image, replica):
                with path.open("xb") as file:
                    os.truncate(file.fileno(), size_bytes)
            if kind:
                filesystem.make(image, kind)
            device = loop.attach(image)
            stack.callback(device.detach)
            disk = Disk(
                device,
                stack.enter_context(closing(track(device.path))),
                opened(device.path, os.O_RDWR | os.O_DIRECT),
                opened(image, os.O_RDONLY),
                replica,
                opened(replica, os.O_RDWR),
                size_bytes,
            )
            disk.copy(list(extents.allocated(disk.image, size_bytes)))
            assert disk.tracker.collect() == []
            return disk

        yield make


class Writer(threading.Thread):
    """Writes to files of its own in all the ways there are, until it is told to stop."""

    def __init__(self, folder: Path, seed: int) -> None:
        super().__init__()
        folder.mkdir()
        self._folder, self._random, self._end = folder, random.Random(seed), threading.Event()
        self._buffer = mmap.mmap(-1, MIB)
        self.failure: BaseException | None = None
        self.done: set[str] = set()

    def run(self) -> None:
        ways = [self.direct, self.buffered, self.mapped, self.allocate, self.punch, self.cut, self.remove]
        try:
            while not self._end.is_set():
                way = self._random.choice(ways)
                path = self._folder / str(self._random.randrange(4))
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT)
                try:
                    os.truncate(descriptor, max(8 * MIB, os.fstat(descriptor).st_size))
                    way(path, descriptor)
                finally:
                    os.close(descriptor)
                self.done.add(way.__name__)
        except BaseException as error:
            self.failure = error

    def stop(self) -> None:
        self._end.set()
        self.join()
        self._buffer.close()
        if self.failure is not None:
            raise self.failure

    def _place(self) -> tuple[int, int]:
        return self._random.randrange(1800) * 4096, self._random.randint(1, 64) * 4096

    def direct(self, path: Path, _: int) -> None:
        at, length = self._place()
        self._buffer[:length] = self._random.randbytes(length)
        descriptor = os.open(path, os.O_RDWR | os.O_DIRECT)
        try:
            with memoryview(self._buffer) as view, view[:length] as part:
                os.pwrite(descriptor, part, at)
        finally:
            os.close(descriptor)

    def buffered(self, _: Path, descriptor: int) -> None:
        at, length = self._place()
        os.pwrite(descriptor, self._random.randbytes(length - 100), at + 7)
        if self._random.random() < 0.5:
            os.fsync(descriptor)

    def mapped(self, _: Path, descriptor: int) -> None:
        at, length = self._place()
        with mmap.mmap(descriptor, 8 * MIB) as view:
            view[at : at + length] = self._random.randbytes(length)
            if self._random.random() < 0.5:
                view.flush()

    def allocate(self, _: Path, descriptor: int) -> None:
        os.posix_fallocate(descriptor, 8 * MIB, 8 * MIB)

    def punch(self, _: Path, descriptor: int) -> None:
        at, length = self._place()
        blocks.write(descriptor, Piece(at, length, None), 8 * MIB)

    def cut(self, _: Path, descriptor: int) -> None:
        os.truncate(descriptor, self._place()[0])

    def remove(self, path: Path, _: int) -> None:
        path.unlink()


def _trim(at: Path) -> None:
    descriptor = os.open(at, os.O_RDONLY)
    try:
        fcntl.ioctl(descriptor, FITRIM, struct.pack("=3Q", 0, 2**64 - 1, 0))
    finally:
        os.close(descriptor)


@pytest.mark.parametrize("kind", filesystem.KINDS)
def test_a_replica_of_a_busy_file_system_becomes_equal(disks: Callable[..., Disk], tmp_path: Path, kind: str) -> None:
    disk = disks("busy", 512 * MIB, kind)
    at = tmp_path / "mounted"
    at.mkdir()
    filesystem.mount(disk.device.path, at, kind)
    with ExitStack() as stack:
        stack.callback(filesystem.unmount, at)
        writers = [Writer(at / str(seed), seed) for seed in range(3)]
        covered = []
        for writer in writers:
            writer.start()
        try:
            for number in range(ROUNDS):
                if number % 10 == 5:
                    _trim(at)
                else:
                    filesystem.sync(at)
                covered.append(extents.total(disk.round()))
        finally:
            for writer in writers:
                writer.stop()
        filesystem.freeze(at)
        stack.callback(filesystem.thaw, at)
        disk.round()
        assert disk.tracker.collect() == []
        assert disk.difference() == ""
    # Otherwise this would prove nothing.
    assert max(covered) < disk.size_bytes
    assert sorted(covered)[ROUNDS // 2] < disk.size_bytes / 4
    assert set.union(*(writer.done for writer in writers)) >= {"direct", "buffered", "mapped", "punch"}


def test_two_bare_devices_at_once_do_not_mix(disks: Callable[..., Disk]) -> None:
    both = [disks("one", 700 * MIB), disks("two", 300 * MIB + 4096)]
    idle = disks("idle", 16 * MIB)
    covered = []

    def write(disk: Disk, seed: int) -> None:
        chance = random.Random(seed)
        pages = disk.size_bytes // 4096
        with mmap.mmap(-1, 4 * MIB) as buffer, memoryview(buffer) as view:
            buffer[:] = chance.randbytes(len(buffer))
            for number in range(60):
                start = chance.randrange(pages)
                longest = pages if number % 10 == 0 else 1024
                count = chance.randint(1, min(longest, pages - start))
                if number % 3 == 0:
                    request = chance.choice([BLKDISCARD, BLKZEROOUT])
                    fcntl.ioctl(disk.source, request, struct.pack("=2Q", start * 4096, count * 4096))
                else:
                    with view[: min(count * 4096, len(buffer))] as part:
                        os.pwrite(disk.source, part, start * 4096)

    threads = [threading.Thread(target=write, args=(disk, seed)) for seed, disk in enumerate(both)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        covered += [extents.total(disk.round()) / disk.size_bytes for disk in both]
    for thread in threads:
        thread.join()
    for disk in both:
        disk.round()
        assert disk.difference() == ""
    assert max(covered) < 1
    assert idle.tracker.collect() == []


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
    disks: Callable[..., Disk], request_number: int, start: int, length: int
) -> None:
    disk = disks("large", 1 << 40)
    fcntl.ioctl(disk.source, request_number, struct.pack("=2Q", start, length))
    end = start + length
    assert disk.tracker.collect() == [Range(start // BLOCK_BYTES * BLOCK_BYTES, -(-end // BLOCK_BYTES) * BLOCK_BYTES)]
    assert disk.tracker.collect() == []


def test_reads_and_flushes_are_not_reported(disks: Callable[..., Disk]) -> None:
    disk = disks("read", 16 * MIB)
    list(blocks.read(disk.source, [Range(0, disk.size_bytes)]))
    os.fsync(disk.source)
    assert disk.tracker.collect() == []


def test_what_is_reported_lies_within_the_device(disks: Callable[..., Disk]) -> None:
    disk = disks("odd", 3 * BLOCK_BYTES + 4096)
    with mmap.mmap(-1, 4096) as page:
        os.pwrite(disk.source, page, 3 * BLOCK_BYTES)
    assert disk.tracker.collect() == [Range(3 * BLOCK_BYTES, 3 * BLOCK_BYTES + 4096)]


def _descriptors() -> set[str]:
    return {entry.name for entry in Path("/proc/self/fd").iterdir()}


def test_nothing_stays_open(track: Callable[[Path], WriteTracker], tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(bytes(MIB))
    device = loop.attach(image)
    try:
        before = _descriptors()
        track(device.path).close()
        with pytest.raises(OSError):
            track(Path("/dev/null"))
        assert _descriptors() == before
    finally:
        device.detach()
