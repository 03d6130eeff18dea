"""What a tracker asks of one way to see writes: `Method` begins it for a process, `Watch` looks."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from blockdev.extents import Range, merge
from migrator.memory.mappings import Mapping
from migrator.memory.pagemap import WRITTEN, Pagemap, Region


@dataclass
class Scan:
    """What was found in mappings, in order: what is populated, and the part of it that was written."""

    populated: list[Range] = field(default_factory=list)
    written: list[Range] = field(default_factory=list)

    def add(self, regions: Sequence[Region], bit: int = WRITTEN, *, all_written: bool = False) -> None:
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
                if written and written[-1].end == start:
                    written[-1] = Range(written[-1].start, end)
                else:
                    written.append(Range(start, end))
        if not in_order:
            populated[:], written[:] = merge(populated), merge(written)


class MemoryReplaced(Exception):
    """The process called exec: begin anew."""


class Watch(Protocol):
    """One process being watched. The scans tell what was written since they last looked; they raise ProcessGone, or
    MemoryReplaced."""

    def scan(self, pagemap: Pagemap, areas: Sequence[Mapping]) -> Scan:
        """Private mappings. All that is populated counts as written in those that are new since the last time."""

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


def addresses(regions: Collection[Region]) -> list[Range]:
    """Their addresses alone."""
    return [Range(region.start, region.end) for region in regions]
