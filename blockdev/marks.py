"""Marks of what was written to a device, which BPF programs set and this process clears: a byte for each piece of it.

Three kinds of them, so that the marks of a device of any size take little memory and little time to look at:

- a block, which is 64 KiB: one byte each, 16 MiB of marks for 1 TiB
- a unit, a sixteenth of a block, for regions of 1024 blocks that have a page: 1024 pages, 16 MiB, at the most. A device
  of up to 64 GiB has one for each of its regions; in a larger one those get pages in which short writes were seen, and
  keep them, since a program may be about to mark one.
- a region as a whole, for a long request such as a discard by fstrim

Marks are bytes because they are cleared one by one without a lock: a byte that is set again before it is cleared was
seen, and is read afterwards.
"""

from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path

from blockdev.block_device import BLOCK_BYTES
from blockdev.bpf import ByteMap
from blockdev.bpf_program import COUNTER_BYTES, PAGE_UNITS, REGION_BLOCKS, UNIT_SHIFT, Layout
from blockdev.extents import Range, merge

# A device of more than 16 TiB has larger blocks instead of more of them.
MAX_BLOCKS = 1 << 28
MAX_PAGES = 1 << 10

# Marks are copied out in parts of this before they are searched: they fit the processor's cache.
_SCAN_BYTES = 1 << 18
_ZEROS = bytes(_SCAN_BYTES)
_POSSIBLE = Path("/sys/devices/system/cpu/possible")


class Marks:
    """The maps for a device of that size, with nothing marked. Raises OSError."""

    def __init__(self, size_bytes: int) -> None:
        self.size_bytes = size_bytes
        self._block_bytes = BLOCK_BYTES
        while size_bytes > MAX_BLOCKS * self._block_bytes:
            self._block_bytes *= 2
        self._regions = max(1, -(-size_bytes // self._region_bytes))
        self._processors = 1 + int(_POSSIBLE.read_text().strip().replace("-", ",").rpartition(",")[2])
        self._resources = ExitStack()
        with self._resources as undo:
            # Many values, because a single one may not be longer than 4 MiB on older kernels.
            self._blocks = undo.enter_context(closing(ByteMap(REGION_BLOCKS, self._regions)))
            self._pages = undo.enter_context(closing(ByteMap(PAGE_UNITS, min(self._regions, MAX_PAGES))))
            # For each region one more than the number of its page, and 0 where it has none.
            self._table = undo.enter_context(closing(ByteMap(4 * self._regions)))
            # The last byte is for what fits nowhere: what was written then is not known.
            self._whole = undo.enter_context(closing(ByteMap(self._regions + 1)))
            self._counters = undo.enter_context(closing(ByteMap(2 * self._processors * COUNTER_BYTES)))
            self._numbers = undo.enter_context(memoryview(self._table.bytes).cast("I"))
            self._counts = undo.enter_context(memoryview(self._counters.bytes).cast("Q"))
            # In order; and how many pages are given away.
            self._paged: list[tuple[int, int]] = []
            self._taken = 0
            if self._regions <= MAX_PAGES:
                self._give_pages([Range(0, size_bytes)])
            self._resources = undo.pop_all()

    @property
    def layout(self) -> Layout:
        """What the programs have to know."""
        return Layout(
            blocks=self._blocks.descriptor,
            whole=self._whole.descriptor,
            pages=self._pages.descriptor,
            table=self._table.descriptor,
            counters=self._counters.descriptor,
            block_bytes=self._block_bytes,
            regions=self._regions,
            processors=self._processors,
        )

    def take(self) -> list[Range]:
        """What is marked; clears it."""
        found: list[Range] = []
        for part in _parts(self._regions):
            _clear(self._whole, part, part.start * self._region_bytes, self._region_bytes, found)
        whole = len(found)
        for part in _parts(len(self._blocks.bytes)):
            _clear(self._blocks, part, part.start * self._block_bytes, self._block_bytes, found)
        coarse = len(found)
        unit_bytes = self._block_bytes >> UNIT_SHIFT
        for region, page in self._paged:
            part = Range(page * PAGE_UNITS, (page + 1) * PAGE_UNITS)
            _clear(self._pages, part, region * self._region_bytes, unit_bytes, found)
        self._give_pages(found[whole:coarse])
        is_sorted = whole in (0, len(found)) and coarse in (0, len(found))
        return self._within(found if is_sorted else merge(found))

    def overflowed(self) -> bool:
        """Whether something was written that could not be marked; clears that, too."""
        is_set = self._whole.bytes[self._regions] != 0
        self._whole.bytes[self._regions] = 0
        return is_set

    def counts(self) -> tuple[int, int]:
        """Sectors of completed and of issued requests."""
        step = COUNTER_BYTES // 8
        per_processor = self._counts[::step].tolist()
        return sum(per_processor[: self._processors]), sum(per_processor[self._processors :])

    def close(self) -> None:
        """Give the memory back, once no program uses it."""
        self._resources.close()

    @property
    def _region_bytes(self) -> int:
        return self._block_bytes * REGION_BLOCKS

    def _within(self, found: list[Range]) -> list[Range]:
        """The device may end within what a mark stands for."""
        while found and found[-1].start >= self.size_bytes:
            found.pop()
        if found:
            found[-1] = Range(found[-1].start, min(found[-1].end, self.size_bytes))
        return found

    def _give_pages(self, written: list[Range]) -> None:
        """To the regions of these ranges, as long as there are any."""
        most = len(self._pages.bytes) // PAGE_UNITS
        if self._taken == most:
            return
        for start, end in written:
            for region in range(start // self._region_bytes, -(-end // self._region_bytes)):
                if self._taken < most and not self._numbers[region]:
                    self._paged.append((region, self._taken))
                    self._taken += 1
                    self._numbers[region] = self._taken
        self._paged.sort()


def _parts(count: int) -> Iterator[Range]:
    return (Range(at, min(at + _SCAN_BYTES, count)) for at in range(0, count, _SCAN_BYTES))


def _clear(marks: ByteMap, part: Range, start: int, bytes_per_mark: int, found: list[Range]) -> None:
    """Clear some of the marks, of which the first stands for what is at `start`, and add what they stand for.

    Ten thousand of them are not to take ten milliseconds: hence the tuples, and the names for what is in the loop.
    """
    # With an end that stops each run.
    seen = marks.bytes[part.start : part.end] + b"\0"
    at = seen.find(1)
    if at < 0:
        return
    view, base, new, find, add = marks.bytes, part.start, tuple.__new__, seen.find, found.append
    if at == 0 and found and found[-1][1] == start:
        stop = find(0)
        view[base : base + stop] = _ZEROS[:stop]
        found[-1] = Range(found[-1][0], start + stop * bytes_per_mark)
        at = find(1, stop)
    while at >= 0:
        stop = at + 1
        if seen[stop]:
            stop = find(0, stop)
            view[base + at : base + stop] = _ZEROS[: stop - at]
        else:
            view[base + at] = 0
        add(new(Range, (start + at * bytes_per_mark, start + stop * bytes_per_mark)))
        at = find(1, stop)
