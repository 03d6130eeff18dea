"""Processes that write in all the ways there are, until they are told to stop: to files, or to a bare device.

python3 -m soakkit.writers files|device PATH SEED    until the end of standard input; prints what it has done
"""

import fcntl
import json
import mmap
import os
import random
import struct
import subprocess
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from blockdev import blocks
from blockdev.blocks import Piece

MIB = 1 << 20
PAGE = 4096
FILES, FILE_BYTES = 2, 2 * MIB
STOP_S = 60
# Of linux/fs.h: _IO(0x12, 119), _IO(0x12, 127), _IOWR('X', 121, struct fstrim_range)
BLKDISCARD, BLKZEROOUT, FITRIM = 0x1277, 0x127F, 0xC0185879


@contextmanager
def writing(what: str, paths: Sequence[Path], seed: int) -> Iterator[set[str]]:
    """One writer for each path during the block. Afterwards the set has in it what they have done.

    Processes, as those of a container are: threads would take turns with the tracker. Raises RuntimeError if one fails.
    """
    done: set[str] = set()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    writers = [
        subprocess.Popen(
            [sys.executable, "-m", "soakkit.writers", what, str(path), str(seed + number)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
        )
        for number, path in enumerate(paths)
    ]  # fmt: skip
    try:
        for writer in writers:
            assert writer.stdout is not None
            writer.stdout.readline()
        yield done
    finally:
        ended = [(writer, *writer.communicate(timeout=STOP_S)) for writer in writers]
    for writer, output, errors in ended:
        if writer.returncode != 0:
            raise RuntimeError(f"a writer failed: {errors}")
        done.update(json.loads(output))


class Writer(ABC):
    """Does one thing after another, chosen at random. `done` says what it has done."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.buffer = mmap.mmap(-1, 4 * MIB)
        self.buffer[:] = self.random.randbytes(len(self.buffer))
        self.done: set[str] = set()

    def write_until(self, end: threading.Event) -> None:
        """Leaves what it has written."""
        self.done.add(self.write_once())
        print("writing", flush=True)
        while not end.is_set():
            self.done.add(self.write_once())

    @abstractmethod
    def write_once(self) -> str:
        """Returns the name of what it did."""

    def direct_write(self, descriptor: int, at: int, length: int) -> None:
        """New contents, at least in its first bytes."""
        self.buffer[:16] = self.random.randbytes(16)
        with memoryview(self.buffer) as view, view[:length] as part:
            os.pwrite(descriptor, part, at)


class FileWriter(Writer):
    """Writes to files of its own."""

    def __init__(self, folder: Path, seed: int) -> None:
        super().__init__(seed)
        folder.mkdir()
        self._folder = folder

    def write_once(self) -> str:
        """One way to change one file."""
        ways: Sequence[Callable[[Path, int], None]] = [
            self.direct, self.buffered, self.synced, self.mapped, self.allocate, self.punch, self.cut, self.remove,
        ]  # fmt: skip
        way = self.random.choice(ways)
        path = self._folder / str(self.random.randrange(FILES))
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT)
        try:
            os.truncate(descriptor, max(FILE_BYTES, os.fstat(descriptor).st_size))
            way(path, descriptor)
        finally:
            os.close(descriptor)
        return way.__name__

    def _place(self) -> tuple[int, int]:
        return self.random.randrange(FILE_BYTES // PAGE - 64) * PAGE, self.random.randint(1, 64) * PAGE

    def direct(self, path: Path, _: int) -> None:
        """O_DIRECT."""
        descriptor = os.open(path, os.O_RDWR | os.O_DIRECT)
        try:
            self.direct_write(descriptor, *self._place())
        finally:
            os.close(descriptor)

    def buffered(self, _: Path, descriptor: int) -> None:
        """Bytes that are not whole pages, in the page cache."""
        at, length = self._place()
        os.pwrite(descriptor, self.random.randbytes(length - 100), at + 7)

    def synced(self, path: Path, descriptor: int) -> None:
        """The same with fsync."""
        self.buffered(path, descriptor)
        os.fsync(descriptor)

    def mapped(self, _: Path, descriptor: int) -> None:
        """Through a mapping, with msync or without."""
        at, length = self._place()
        with mmap.mmap(descriptor, FILE_BYTES) as view:
            view[at : at + length] = self.random.randbytes(length)
            if self.random.random() < 0.5:
                view.flush()

    def allocate(self, _: Path, descriptor: int) -> None:
        """fallocate(2)."""
        os.posix_fallocate(descriptor, FILE_BYTES, self.random.randint(1, 256) * PAGE)

    def punch(self, _: Path, descriptor: int) -> None:
        """FALLOC_FL_PUNCH_HOLE."""
        at, length = self._place()
        blocks.write(descriptor, Piece(at, length, None), FILE_BYTES)

    def cut(self, _: Path, descriptor: int) -> None:
        """ftruncate(2)."""
        os.truncate(descriptor, self._place()[0])

    def remove(self, path: Path, _: int) -> None:
        """unlink(2)."""
        path.unlink()


class DeviceWriter(Writer):
    """Writes to the device itself, sometimes to all of it."""

    def __init__(self, device: Path, seed: int) -> None:
        super().__init__(seed)
        self._descriptor = os.open(device, os.O_RDWR | os.O_DIRECT)
        self._size_bytes = os.lseek(self._descriptor, 0, os.SEEK_END)

    def write_once(self) -> str:
        """Short or long, data, zeros or a discard; one in a hundred is the whole device. Then a pause."""
        time.sleep(self.random.uniform(0, 0.03))
        pages = self._size_bytes // PAGE
        way = self.random.choice(["write", "write", "discard", "zero"])
        if self.random.random() < 0.01:
            start, count, name = 0, pages, f"{way} all"
        else:
            start, name = self.random.randrange(pages), way
            longest = self.random.choices([16, len(self.buffer) // PAGE, pages], [80, 17, 3])[0]
            count = self.random.randint(1, min(longest, pages - start))
        if way == "write":
            for at in range(start * PAGE, (start + count) * PAGE, len(self.buffer)):
                self.direct_write(self._descriptor, at, min(len(self.buffer), (start + count) * PAGE - at))
        else:
            request = BLKDISCARD if way == "discard" else BLKZEROOUT
            fcntl.ioctl(self._descriptor, request, struct.pack("=2Q", start * PAGE, count * PAGE))
        return name


def trim(at: Path) -> None:
    """What fstrim(8) does."""
    descriptor = os.open(at, os.O_RDONLY)
    try:
        fcntl.ioctl(descriptor, FITRIM, struct.pack("=3Q", 0, 2**64 - 1, 0))
    finally:
        os.close(descriptor)


def main(what: str, path: Path, seed: int) -> None:
    """Until the end of standard input."""
    end = threading.Event()
    writer = FileWriter(path, seed) if what == "files" else DeviceWriter(path, seed)

    def wait() -> None:
        sys.stdin.read()
        end.set()

    threading.Thread(target=wait, daemon=True).start()
    writer.write_until(end)
    print(json.dumps(sorted(writer.done)))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
