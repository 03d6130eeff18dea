"""Which addresses of a process still wait for which bytes of the page store. Pure: what the kernel reports is applied
here.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterable
from typing import NamedTuple


class Segment(NamedTuple):
    """Addresses from `start` to `end` hold, or are to hold, what the store has from `source` on."""

    start: int
    end: int
    source: int


class Space:
    """The memory of one process that is left to the fill. `owner` names the file of the store that it comes from.

    What is not in a segment has no content of its own: it reads as zeros when it is first touched.
    """

    def __init__(self, owner: int, segments: Iterable[Segment] = ()) -> None:
        self.owner = owner
        self._segments = sorted(segments)

    def __bool__(self) -> bool:
        return bool(self._segments)

    @property
    def segments(self) -> list[Segment]:
        """In order of address, without overlaps."""
        return list(self._segments)

    @property
    def first(self) -> Segment:
        """The lowest that is left."""
        return self._segments[0]

    def find(self, address: int) -> Segment | None:
        """The one that holds an address, from that address on."""
        at = bisect_right(self._segments, address, key=_start) - 1
        if at < 0 or self._segments[at].end <= address:
            return None
        start, end, source = self._segments[at]
        return Segment(address, end, source + address - start)

    def segments_between(self, start: int, end: int) -> list[Segment]:
        """What is left in a range."""
        low, high = self._touched(start, end)
        touched = self._segments[low:high]
        return [_cut(segment, max(start, segment.start), min(end, segment.end)) for segment in touched]

    def forked(self) -> "Space":
        """That of a child which this process has just forked."""
        child = Space(self.owner)
        child._segments = list(self._segments)
        return child

    def remove(self, start: int, end: int) -> list[Segment]:
        """Take a range out: it was filled, unmapped or thrown away. Gives what was in it."""
        low, high = self._touched(start, end)
        touched = self._segments[low:high]
        if not touched:
            return []
        left: list[Segment] = []
        if touched[0].start < start:
            left.append(Segment(touched[0].start, start, touched[0].source))
        if touched[-1].end > end:
            left.append(_cut(touched[-1], end, touched[-1].end))
        self._segments[low:high] = left
        return [_cut(segment, max(start, segment.start), min(end, segment.end)) for segment in touched]

    def move(self, start: int, to: int, length: int) -> None:
        """A range was moved by mremap; what was at its new place is gone."""
        moved = self.remove(start, start + length)
        self.remove(to, to + length)
        offset = to - start
        shifted = [Segment(segment.start + offset, segment.end + offset, segment.source) for segment in moved]
        at = bisect_left(self._segments, to, key=_start)
        self._segments[at:at] = shifted

    def _touched(self, start: int, end: int) -> tuple[int, int]:
        low = bisect_right(self._segments, start, key=_start) - 1
        if low < 0 or self._segments[low].end <= start:
            low += 1
        return low, bisect_left(self._segments, end, lo=low, key=_start)


def _start(segment: Segment) -> int:
    return segment.start


def _cut(segment: Segment, start: int, end: int) -> Segment:
    return Segment(start, end, segment.source + start - segment.start)
