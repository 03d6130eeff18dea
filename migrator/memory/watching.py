"""What a tracker asks of one way to see writes: `Method` begins it for a process, `Watch` looks."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from blockdev.extents import Range, merge
from migrator.memory.mappings import Mapping
from migrator.memory.pagemap import PAGE_BYTES, WRITTEN, Pagemap, Region

# Ranges that are told as written, at the most where memory is not scattered: they take 140 bytes each.
MOST_WRITTEN = 1 << 18
_FAR_BYTES = 64 << 20


@dataclass
class Scan:
    """What was found in mappings, in order: what is populated, and the part of it that was written.

    Where that would be more than `most` ranges, what lies between two that are near to each other counts as written.
    """

    populated: list[Range] = field(default_factory=list)
    written: list[Range] = field(default_factory=list)
    most: int = MOST_WRITTEN
    _near_bytes: int = 0

    def add(self, regions: Iterable[Region], bit: int = WRITTEN, *, all_written: bool = False) -> None:
        """More of it, at higher addresses. Written is what has the bit."""
        populated, written = self.populated, self.written
        in_order = True
        for start, end, categories in regions:
            # What was looked at twice may have been written in between.
            in_order = in_order and not (populated and start < populated[-1].end)
            if populated and populated[-1].end == start:
                populated[-1] = Range(populated[-1].start, end)
            else:
                populated.append(Range(start, end))
            if all_written or categories & bit:
                # Nothing between them that is not populated.
                if (
                    written
                    and populated[-1].start <= written[-1].end
                    and 0 <= start - written[-1].end <= self._near_bytes
                ):
                    written[-1] = Range(written[-1].start, end)
                else:
                    written.append(Range(start, end))
                    if len(written) > self.most:
                        self._join_near()
        if not in_order:
            populated[:], written[:] = merge(populated), merge(written)

    def extend(self, more: "Scan") -> None:
        """What was found at higher addresses; that is of no use any more."""
        for ours, theirs in ((self.populated, more.populated), (self.written, more.written)):
            if ours and theirs and ours[-1].end == theirs[0].start:
                theirs[0] = Range(ours.pop().start, theirs[0].end)
            ours.extend(theirs)
        if len(self.written) > self.most:
            self._join_near()

    def _join_near(self) -> None:
        while len(self.written) > self.most:
            if self._near_bytes >= _FAR_BYTES:  # what is populated is scattered itself
                self.most *= 2
                return
            self._near_bytes = max(PAGE_BYTES, 2 * self._near_bytes)
            self.written[:] = _joined(self.written, self.populated, self._near_bytes)


def _joined(ranges: list[Range], whole: list[Range], near_bytes: int) -> list[Range]:
    """Those that are so near to each other together, if there is nothing between them but what is in `whole`."""
    rest = iter(merge(whole))
    last, joined = next(rest), list[Range]()
    for start, end in merge(ranges):
        while last.end < start:
            last = next(rest)
        if joined and last.start <= joined[-1].end and start - joined[-1].end <= near_bytes:
            joined[-1] = Range(joined[-1].start, end)
        else:
            joined.append(Range(start, end))
    return joined


class MemoryReplaced(Exception):
    """The process called exec: begin anew."""


class Watch(Protocol):
    """One process being watched. The scans tell what was written since they last looked; they raise ProcessGone, or
    MemoryReplaced."""

    def scan(self, pagemap: Pagemap, areas: Sequence[Mapping], populated: list[Range] | None = None) -> Scan:
        """Private mappings. All that is populated counts as written in those that are new since the last time.

        With `populated`, what was found the last time, what is gone since need not be told."""

    def scan_shared(self, pagemap: Pagemap, area: Mapping) -> list[Range]:
        """Addresses in a shared mapping that may have been written through it."""

    def finish(self) -> None:
        """All mappings have been looked at: what is written from now on belongs to the next time."""

    def close(self) -> None:
        """Leave the process as it was."""


class Method(Protocol):
    """A way to see writes."""

    name: str
    # What a look finds is complete only while the process does not run.
    needs_pause: bool
    # It tells all that is populated, of shared memory too.
    tells_all: bool

    def watch(self, pid: int, *, running: bool) -> Watch:
        """Begin with a process, which is `running` or else frozen. Raises Untrackable, NotNow, ProcessGone."""


def addresses(regions: Iterable[Region]) -> list[Range]:
    """Their addresses alone."""
    return [Range(region.start, region.end) for region in regions]
