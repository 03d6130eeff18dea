"""Clones of volumes that are in use, all as they were at one moment, with a freeze that does not grow with them.

A clone costs per extent, and what writes to the volume waits for it. So most of it is made before the freeze, in short
steps: a first pass over everything, then rounds over what a write tracker has seen since. The freeze pays for the last
of these only. Without a tracker it repeats the whole clone, at a tenth of the price where nothing was written.
"""

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from blockdev import extents, fiemap, filesystem, reflink, thaw_guard
from blockdev.extents import Range
from blockdev.tracker import WriteTracker
from blockdev.volume import MountedVolume

# A step of the clone: at the most 64 extents of 4 KiB, for which writes wait a millisecond.
STEP_BYTES = 256 << 10
# While it is written to, this part of a step's time is left to the writes after it. What one of them syncs has to wait
# for all that the clones have put into the file system's log, so that is written out by ourselves after so many steps.
PAUSE = 0.5
LONG_STEP_S = 0.0002
STEPS_PER_SYNC = 64
# Rounds end when one took no longer than this, or no less than this part of the one before.
SHORT_S = 0.004
SHRINK = 0.7
MAX_ROUNDS = 8


@dataclass(frozen=True)
class Source:
    """A mounted volume's image file, and the file to make that its clone will be; both in one file system."""

    image: Path
    mounted: MountedVolume
    target: Path


def clone(
    sources: Sequence[Source],
    track: Callable[[Path], WriteTracker] | None,
    check: Callable[[], None] = lambda: None,
) -> float:
    """Make the targets, durable and all of the same moment. Returns the seconds that the longest freeze took.

    `track` makes a tracker for a loop device; None where there is none. `check` is called before each step but for
    those in the freeze; what it raises ends it all. The targets are the caller's to delete if this fails.
    """
    with ExitStack() as stack:
        copies = [_Copy(source, track, stack) for source in sources]
        points = [source.mounted.at for source in sources]
        for copy in copies:
            copy.run_beside(copy.allocated(), check)
        _rounds(copies, points, check)
        with thaw_guard.guarding(points):
            # The guard took its time to start.
            _rounds(copies, points, check)
            # A first freeze waits for what is dirty and for grace periods of the kernel; one soon after it does not.
            # Two short ones are better for those who wait than one that does everything.
            _sync(points)
            with _frozen(points, stood_still_s := [0.0]):
                pass
            for copy in copies:
                copy.run_beside(copy.dirty(), check)
            with _frozen(points, stood_still_s):
                for copy in copies:
                    copy.run(copy.dirty())
        for copy in copies:
            os.fsync(copy.target)
    return max(stood_still_s)


class _Copy:
    """One volume while it is cloned."""

    def __init__(self, source: Source, track: Callable[[Path], WriteTracker] | None, stack: ExitStack) -> None:
        self._source = os.open(source.image, os.O_RDONLY | os.O_CLOEXEC)
        stack.callback(os.close, self._source)
        self.target = os.open(source.target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        stack.callback(os.close, self.target)
        self._size_bytes = os.fstat(self._source).st_size
        os.truncate(self.target, self._size_bytes)
        self._tracker = None if track is None else track(source.mounted.device.path)
        if self._tracker is not None:
            stack.callback(self._tracker.close)
            self._tracker.start()

    def allocated(self) -> Iterable[Range]:
        """What a first pass has to clone into the empty target."""
        return fiemap.allocated(self._source, self._size_bytes)

    def dirty(self) -> Iterable[Range]:
        """What may have been written since it was asked last: all of it if nobody knows."""
        return [Range(0, self._size_bytes)] if self._tracker is None else self._tracker.collect()

    def run(self, ranges: Iterable[Range]) -> None:
        """Clone these ranges while nothing writes."""
        for part in ranges:
            reflink.clone_range(self._source, self.target, part)

    def run_beside(self, ranges: Iterable[Range], check: Callable[[], None]) -> None:
        """Clone these ranges, and let what writes to the volume through."""
        for number, step in enumerate(self._steps(ranges), 1):
            check()
            began = time.monotonic()
            reflink.clone_range(self._source, self.target, step)
            if number % STEPS_PER_SYNC == 0:
                os.fdatasync(self.target)
            elif (took_s := time.monotonic() - began) > LONG_STEP_S:
                time.sleep(PAUSE * took_s)

    def _steps(self, ranges: Iterable[Range]) -> Iterator[Range]:
        """Short ones, but a hole in one piece: most of a disk that is looked at as a whole is holes."""
        for part in ranges:
            if part.length <= STEP_BYTES:
                yield part
                continue
            at = part.start
            for data in fiemap.allocated(self._source, part.end, part.start):
                if at < data.start:
                    yield Range(at, data.start)
                yield from extents.pieces([data], STEP_BYTES)
                at = data.end
            if at < part.end:
                yield Range(at, part.end)


def _rounds(copies: Sequence[_Copy], points: Sequence[Path], check: Callable[[], None]) -> None:
    """Over what was written meanwhile, as long as that gets less; what is dirty in memory is flushed each time."""
    before_s = float("inf")
    for _ in range(MAX_ROUNDS):
        _sync(points)
        began = time.monotonic()
        for copy in copies:
            copy.run_beside(copy.dirty(), check)
        took_s = time.monotonic() - began
        if took_s <= SHORT_S or took_s > SHRINK * before_s:
            return
        before_s = took_s


def _sync(points: Sequence[Path]) -> None:
    for at in points:
        filesystem.sync(at)


@contextmanager
def _frozen(points: Sequence[Path], lengths_s: list[float]) -> Iterator[None]:
    """In the given order, which makes one moment of it: who waits at the first one writes nothing to the second.

    Appends how long that was.
    """
    began = time.monotonic()
    try:
        with ExitStack() as stack:
            for at in points:
                stack.callback(filesystem.thaw, at)
                filesystem.freeze(at)
            yield
    finally:
        lengths_s.append(time.monotonic() - began)
