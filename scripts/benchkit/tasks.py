"""What is run, over and over, by contenders in turns: moves, snapshots, write trackers, and the machine's ceilings."""

import socket
import struct
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Protocol

from benchkit import ceilings, tools
from benchkit.contenders.base import Bench, Contender
from benchkit.errors import BenchError
from benchkit.measure import Metrics, one_run
from benchkit.results import OURS
from benchkit.workloads import Workload
from blockdev import pool
from blockdev.volume import VolumeStore
from migrator.memory import choosing

Once = Callable[[str], Metrics]

EXTENTS = 100_000
SNAPSHOT_WAYS = {OURS: "tracker", "freeze and clone": "naive"}
ON, OFF = "tracked", "untracked"
TRACKER_PORT = 7996
TRACKER_MIB = 256
COLLECT_EVERY_S = 0.1


class Task(Protocol):
    """A thing to measure. `contenders` are names; a run of each comes in turn."""

    name: str
    contenders: list[str]

    def opened(self, bench: Bench) -> AbstractContextManager[Once]:
        """Ready to run; the value runs once for a contender. Raises BenchError if a run fails."""


class Move:
    """Moves of one workload."""

    def __init__(self, workload: Workload, contenders: list[Contender]) -> None:
        self.name = workload.name
        self._workload = workload
        self._by_name = {contender.name: contender for contender in contenders if not contender.takes(workload)}
        self.contenders = list(self._by_name)

    @contextmanager
    def opened(self, bench: Bench) -> Iterator[Once]:
        yield lambda name: one_run(bench, self._by_name[name], self._workload)


class Ceilings:
    name = "ceilings"
    contenders = ["machine"]

    @contextmanager
    def opened(self, bench: Bench) -> Iterator[Once]:
        yield lambda _: ceilings.measure(bench)


class Snapshots:
    """Snapshots of a volume of 100,000 extents under a program that appends and syncs: how long it waits."""

    name = "snapshot-100k-extents"
    contenders = list(SNAPSHOT_WAYS)

    @contextmanager
    def opened(self, bench: Bench) -> Iterator[Once]:
        program = tools.load("bench-snapshot")
        with ExitStack() as stack:
            state = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=bench.folder)))
            stack.callback(pool.close, state)
            folder = pool.ensure(state, 64 << 30)
            volume = VolumeStore(folder / "volumes").create("bench", 2 << 30, "ext4")
            at = folder / "at"
            at.mkdir()
            mounted = volume.mount(at)
            stack.callback(mounted.unmount)
            program.fill(mounted.at / "data", EXTENTS)

            def once(contender: str) -> Metrics:
                way = SNAPSHOT_WAYS[contender]
                frozen, gap, took, other, _ = program.once(volume, mounted, folder / "clone", way, 0.0)
                return {"frozen_ms": frozen, "pause_ms": gap, "total_ms": took, "quiet_gap_ms": other}

            yield once


class DiskTracker:
    """Random writes of 4 KiB to a volume, with the write tracker and without."""

    name = "tracker-disk"
    contenders = [ON, OFF]

    @contextmanager
    def opened(self, bench: Bench) -> Iterator[Once]:
        program = tools.load("bench-tracker")
        load = program.LOADS["4 KiB random writes"]
        with tempfile.TemporaryDirectory(dir=bench.folder) as folder, ExitStack() as stack:
            device, at = program.volume(Path(folder), stack)
            program.fio(at, load, 1)

            def once(contender: str) -> Metrics:
                if contender == OFF:
                    return {"per_s": program.fio(at, load, 1)}
                with program.tracking(device):
                    return {"per_s": program.fio(at, load, 1)}

            yield once


class MemoryTracker:
    """A program that writes pages at random as fast as it can, with the memory tracker and without."""

    name = "tracker-memory"
    contenders = [ON, OFF]

    @contextmanager
    def opened(self, bench: Bench) -> Iterator[Once]:
        words = ["--port", str(TRACKER_PORT), "--memory", str(TRACKER_MIB), "--rate", "100000", "--share", "25"]
        program = subprocess.Popen([str(bench.programs.workload), *words])
        try:
            _pages(10.0)

            def once(contender: str) -> Metrics:
                if contender == OFF:
                    return {"per_s": _pages_per_s(lambda: None)}
                method, _ = choosing.choose()
                tracker = choosing.make(lambda: [program.pid], method)
                try:
                    tracker.start()
                    return {"per_s": _pages_per_s(lambda: tracker.collect() and None)}
                finally:
                    tracker.close()

            yield once
        finally:
            program.kill()
            program.wait()


def _pages_per_s(collect: Callable[[], object], seconds: float = 1.0) -> float:
    began_s, began = time.monotonic(), _pages()
    while time.monotonic() < began_s + seconds:
        time.sleep(COLLECT_EVERY_S)
        collect()
    return (_pages() - began) / (time.monotonic() - began_s)


def _pages(within_s: float = 2.0) -> int:
    """How many the program has written so far."""
    deadline = time.monotonic() + within_s
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as out:
        out.settimeout(0.2)
        while time.monotonic() < deadline:
            out.sendto(struct.pack("=QQ", 1, 0), ("127.0.0.1", TRACKER_PORT))
            try:
                return int(struct.unpack("=QQQ", out.recv(24))[1])
            except (TimeoutError, ConnectionRefusedError):
                time.sleep(0.05)
    raise BenchError("the page writer does not answer")
