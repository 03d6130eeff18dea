"""How long writes stand still while a volume is snapshotted, seen by a program that writes to it.

    .venv/bin/python scripts/bench_snapshot.py [--extents N] [--kind ext4|xfs|btrfs] [--rate MB/S] [--runs N]

Makes an XFS pool file in the folder, a volume of which N extents are written at random in it, and a writer that appends
and syncs every 2 ms, and writes at random at the given rate besides. Needs root.

Three ways are compared, in turn, each `--runs` times: `naive` freezes and clones; `tracker` and `plain` are
`blockdev.live_clone` with and without the eBPF tracker. Printed for each: the freeze as the snapshot reports it, the
longest gap between two syncs of the writer while the snapshot was taken, and the longest at other times.
"""

import argparse
import json
import mmap
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from blockdev import filesystem, live_clone, pool, reflink
from blockdev.bpf_tracker import BpfTracker
from blockdev.live_clone import Source
from blockdev.volume import MountedVolume, Volume, VolumeStore

BLOCK = 4096
WRITER = """
import json, os, random, signal, sys, time
at, rate = sys.argv[1], float(sys.argv[2])
log = os.open(at + "/log", os.O_RDWR | os.O_CREAT | os.O_APPEND)
data = os.open(at + "/data", os.O_RDWR)
blocks, block = os.fstat(data).st_size // 4096, os.urandom(4096)
gaps, stopped = [], []
signal.signal(signal.SIGTERM, lambda *_: stopped.append(1))
print("ready", flush=True)
began = last = time.monotonic()
written = 0
while not stopped:
    now = time.monotonic()
    # What could not be written in time is not made up for.
    for _ in range(min(64, int(rate * 1e6 * (now - last) / 4096) + 1) if rate else 0):
        os.pwrite(data, block, random.randrange(blocks) * 4096)
        written += 4096
    os.write(log, b"x" * 100)
    os.fsync(log)
    now = time.monotonic()
    gaps.append((now - last, now))
    last = now
    time.sleep(0.002)
print(json.dumps({"gaps": gaps, "written": written / (time.monotonic() - began)}))
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--extents", type=int, default=100_000)
    parser.add_argument("--kind", choices=filesystem.KINDS, default="ext4")
    parser.add_argument("--rate", type=float, default=0.0, help="MB/s of random writes of 4 KiB")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path("/var/tmp"))
    parser.add_argument(
        "--ways", nargs="+", choices=["naive", "plain", "tracker"], default=["naive", "plain", "tracker"]
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        state = Path(folder)
        try:
            measure(pool.ensure(state, 64 << 30), options)
        finally:
            pool.close(state)
    return 0


def measure(folder: Path, options: argparse.Namespace) -> None:
    size_bytes = max(2 << 30, 3 * options.extents * 2 * BLOCK)
    volume = VolumeStore(folder / "volumes").create("bench", size_bytes, options.kind)
    at = folder / "at"
    at.mkdir()
    mounted = volume.mount(at)
    try:
        fill(mounted.at / "data", options.extents)
        print(f"{options.kind}, {extents_of(volume)} extents, {options.rate:g} MB/s of random writes")
        rows: dict[str, list[tuple[float, ...]]] = {way: [] for way in options.ways}
        for _ in range(options.runs):
            for way in options.ways:
                rows[way].append(once(volume, mounted, folder / "clone", way, options.rate))
        for way, found in rows.items():
            frozen, gap, took, other, written = zip(*found, strict=True)
            print(
                f"{way:8} frozen {numbers(frozen)}; writer's longest gap {numbers(gap)}, at other times"
                f" {numbers(other)}; took {statistics.median(took):.0f} ms; {statistics.median(written) / 1e6:.1f} MB/s"
            )
    finally:
        mounted.unmount()


def once(volume: Volume, mounted: MountedVolume, target: Path, way: str, rate: float) -> tuple[float, ...]:
    """Milliseconds: frozen, the longest gap meanwhile, all of it, the longest gap otherwise; bytes a second."""
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, str(mounted.at), str(rate)], stdout=subprocess.PIPE, text=True
    ) as writer:
        assert writer.stdout is not None
        writer.stdout.readline()
        time.sleep(1)
        began = time.monotonic()
        frozen_s = WAYS[way](volume, mounted, target)
        ended = time.monotonic()
        time.sleep(0.5)
        writer.terminate()
        report = json.loads(writer.stdout.read())
    target.unlink()
    os.sync()
    time.sleep(2)  # XFS frees what was deleted in the background
    # A gap that ends a little later began meanwhile.
    during = [gap for gap, end in report["gaps"] if began <= end <= ended + gap]
    other = [gap for gap, end in report["gaps"] if not began <= end <= ended + gap]
    times = frozen_s, max(during), ended - began, max(other)
    return (*(seconds * 1000 for seconds in times), report["written"])


def naive(volume: Volume, mounted: MountedVolume, target: Path) -> float:
    filesystem.sync(mounted.at)
    began = time.monotonic()
    filesystem.freeze(mounted.at)
    try:
        reflink.clone(volume.path, target)
    finally:
        filesystem.thaw(mounted.at)
    return time.monotonic() - began


WAYS: dict[str, Callable[[Volume, MountedVolume, Path], float]] = {
    "naive": naive,
    "plain": lambda volume, mounted, target: live_clone.clone([Source(volume.path, mounted, target)], None),
    "tracker": lambda volume, mounted, target: live_clone.clone([Source(volume.path, mounted, target)], BpfTracker),
}


def fill(path: Path, extents: int) -> None:
    """Every other block, in random order, so that each lies for itself in the image."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_DIRECT, 0o600)
    try:
        os.posix_fallocate(descriptor, 0, max(extents, 256) * 2 * BLOCK)
        block = mmap.mmap(-1, BLOCK)
        block.write(os.urandom(BLOCK))
        for number in random.sample(range(extents), extents):
            os.pwritev(descriptor, [block], number * 2 * BLOCK)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def extents_of(volume: Volume) -> int:
    done = subprocess.run(["filefrag", str(volume.path)], capture_output=True, text=True, check=True)
    return int(done.stdout.rpartition(":")[2].split()[0])


def numbers(values: tuple[float, ...]) -> str:
    return f"{statistics.median(values):.1f} ms (worst {max(values):.1f})"


if __name__ == "__main__":
    sys.exit(main())
