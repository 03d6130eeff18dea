"""For suites of memory trackers: processes that change their memory, and a replica made of what is reported."""

import contextlib
import os
import select
import signal
import subprocess
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from blockdev.blocks import Batch
from migrator.memory import (
    Collected,
    MemoryTracker,
    ObjectKey,
    ProcessGone,
    ProcessKey,
    SharedChange,
    mappings,
    processes,
)
from migrator.memory.mappings import Mapping
from migrator.memory.pagemap import ENTRY_FILE, ENTRY_PRESENT, ENTRY_SWAPPED, PAGE_BYTES, Pagemap, is_marker
from migrator.memory.shared import key_of

HERE = Path(__file__).parent
ZEROS = bytes(PAGE_BYTES)
SECONDS = 10.0


def compiled(folder: Path, source: str, *options: str) -> Path:
    """A program beside this file, built into a folder."""
    program = folder / source.removesuffix(".c")
    flags = ["-O1", "-Wall", "-Wextra", "-Wno-unused-result"]
    subprocess.run(["gcc", *flags, "-o", program, HERE / source, *options], check=True)
    return program


def tree(pid: int) -> list[int]:
    """A process and its children."""
    children: list[int] = []
    for tid in processes.threads(pid):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            children += map(int, Path(f"/proc/{pid}/task/{tid}/children").read_text().split())
    return [pid, *children]


def eventually(what: str, ready: Callable[[], bool], seconds: float = SECONDS) -> None:
    """Wait until it is so."""
    deadline = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.001)


class Process:
    """One that was started for a test, in a group of its own; ended with it. Frozen here means stopped by signal."""

    def __init__(self, *command: str | Path) -> None:
        self.running = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0, start_new_session=True
        )
        self.pid = self.running.pid

    def pids(self) -> list[int]:
        return tree(self.pid)

    def answer(self) -> str:
        assert self.running.stdout is not None
        return self.running.stdout.readline().decode()

    def say(self, line: str) -> str:
        """A line to it, and its answer."""
        assert self.running.stdin is not None
        self.running.stdin.write(f"{line}\n".encode())
        # Its children have the other end of the pipe too: that alone would not end.
        assert self.running.stdout is not None
        while not select.select([self.running.stdout], [], [], 0.5)[0]:
            assert self.running.poll() is None, f"the process ended with {self.running.poll()} before {line!r}"
        return self.answer().strip()

    def freeze(self) -> None:
        """Stop it and its children, and wait until they are."""
        stopped: set[int] = set()
        while (now := set(self.pids())) != stopped:
            for pid in now - stopped:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGSTOP)
                eventually(f"{pid} stops", lambda pid=pid: all(_stopped(pid)))  # type: ignore[misc]
            stopped = now

    def thaw(self) -> None:
        for pid in self.pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self.running.wait()
        for stream in (self.running.stdin, self.running.stdout):
            assert stream is not None
            stream.close()


def _stopped(pid: int) -> Iterator[bool]:
    for tid in processes.threads(pid):
        with contextlib.suppress(ProcessGone):
            yield processes.thread(pid, tid).state in "TtZX"


# Pages by address or offset; None is zeros.
Pages = dict[int, bytes | memoryview | None]


class Replica:
    """What a destination would have, from nothing but what a tracker reports and reads."""

    def __init__(self, tracker: MemoryTracker) -> None:
        self._tracker = tracker
        self.processes: dict[ProcessKey, Pages] = defaultdict(dict)
        self.objects: dict[ObjectKey, Pages] = defaultdict(dict)

    def apply(self, collected: Collected) -> Collected:
        for process in collected.ended:
            self.processes.pop(process, None)
        for key in collected.released:
            self.objects.pop(key, None)
        for change in collected.processes:
            pages = self.processes[change.process]
            _drop(pages, change.gone)
            with contextlib.suppress(ProcessGone):  # the next collect says that it ended
                _store(pages, self._tracker.read(change.process, change.written))
        self.take(collected.shared)
        return collected

    def take(self, changes: Iterable[SharedChange]) -> None:
        """Of shared memory."""
        for shared in changes:
            pages = self.objects[shared.key]
            _drop(pages, shared.gone)
            _store(pages, self._tracker.read_shared(shared.key, shared.written))

    def differences(self, pids: Iterable[int]) -> list[str]:
        """Between frozen processes and this."""
        found: list[str] = []
        keys: set[ProcessKey] = set()
        for pid in pids:
            with contextlib.suppress(ProcessGone):  # a zombie
                keys.add(processes.key(pid))
        if keys != self.processes.keys():
            found.append(f"processes {keys} and {self.processes.keys()}")
        for key in keys:
            with Pagemap(key.pid) as source, Path(f"/proc/{key.pid}/mem").open("rb", buffering=0) as memory:
                left = dict(self.processes[key])
                for area in mappings.read(key.pid):
                    if area.is_private or area.is_aio_ring:
                        found += _private(area, source, memory.fileno(), left)
                    elif area.is_shared and ("/memfd:" in area.name or area.name.startswith(("/dev/zero", "/SYSV"))):
                        found += self._shared(area, memory.fileno())
                found += [f"{key.pid}: stale page at {at:x}" for at in left]
        return found

    def _shared(self, area: Mapping, memory: int) -> Iterator[str]:
        pages = self.objects.get(key_of(os.makedev(*area.device), area.inode, area.name))
        if pages is None:
            yield f"object of {area} is missing"
            return
        for at in range(area.start, area.end, PAGE_BYTES):
            try:
                content = os.pread(memory, PAGE_BYTES, at)
            except OSError:
                continue  # beyond the end of the file
            if (pages.get(at - area.start + area.offset) or ZEROS) != content:
                yield f"shared page at {at:x} of {area}"


def _private(area: Mapping, source: Pagemap, memory: int, left: Pages) -> Iterator[str]:
    entries = source.entries(area.start, area.end)
    for number, entry in enumerate(entries):
        if (
            not entry & (ENTRY_PRESENT | ENTRY_SWAPPED)
            or (entry & ENTRY_FILE and not area.is_aio_ring)
            or is_marker(entry)
        ):
            continue
        at = area.start + number * PAGE_BYTES
        content = os.pread(memory, PAGE_BYTES, at)
        known = at in left
        page = left.pop(at, None)
        if (page or ZEROS) != content:
            yield f"page at {at:x} (entry {entry:x}) of {area} {'differs' if known else 'is missing'}"
        elif not known and area.inode:
            yield f"page of zeros at {at:x} of {area} is missing: the file would show"


def _drop(pages: Pages, ranges: Iterable[tuple[int, int]]) -> None:
    for start, end in ranges:
        if end - start > len(pages) * PAGE_BYTES:
            for at in [at for at in pages if start <= at < end]:
                del pages[at]
        else:
            for at in range(start, end, PAGE_BYTES):
                pages.pop(at, None)


def _store(pages: Pages, batches: Iterable[Batch]) -> None:
    for batch in batches:
        data = memoryview(batch.data)
        for start, length in zip(batch.layout[::2], batch.layout[1::2], strict=True):
            for at in range(start, start + abs(length), PAGE_BYTES):
                pages[at], data = (data[:PAGE_BYTES], data[PAGE_BYTES:]) if length > 0 else (None, data)
        assert not data
