"""What the client saw of one flow: when each answer came, and what can be told from that. Pure functions of samples."""

import statistics
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass

FIELDS = 4
UNIT_BYTES = 4096  # of pages and of blocks
BIN_S = 0.05
STEADY_BINS = 3


@dataclass(frozen=True)
class Window:
    """From and to, in seconds of CLOCK_MONOTONIC."""

    began_s: float
    ended_s: float


class Trace:
    """The answers of one flow in the order they came.

    came_ns and took_ns are of CLOCK_MONOTONIC; pages and blocks count what the workload has written so far.
    """

    def __init__(self, samples: Sequence[tuple[int, int, int, int]], error: str = "", unanswered: int = 0) -> None:
        self.came_ns = [sample[0] for sample in samples]
        self.took_ns = [sample[1] for sample in samples]
        self.pages = [sample[2] for sample in samples]
        self.blocks = [sample[3] for sample in samples]
        self.error = error
        self.unanswered = unanswered

    @classmethod
    def read(cls, data: bytes, error: str = "", unanswered: int = 0) -> "Trace":
        """From the file that the probe writes: four u64 for each answer, in the machine's byte order."""
        numbers = array("Q")
        numbers.frombytes(data[: len(data) // (8 * FIELDS) * 8 * FIELDS])
        columns = (numbers[column::FIELDS] for column in range(FIELDS))
        return cls(list(zip(*columns, strict=True)), error, unanswered)

    def __len__(self) -> int:
        return len(self.came_ns)

    def typical_gap_ms(self) -> float:
        """The median time between two answers."""
        gaps = [after - before for before, after in zip(self.came_ns, self.came_ns[1:], strict=False)]
        return statistics.median(gaps) / 1e6 if gaps else 0.0

    def longest_gap_ms(self, window: Window) -> float:
        """The longest time between two answers of which a part lies in the window, less the typical one."""
        gap = self.longest_gap(window)
        return max(0.0, (gap.ended_s - gap.began_s) * 1000 - self.typical_gap_ms()) if gap else 0.0

    def longest_gap(self, window: Window) -> Window | None:
        """That gap itself; None if there were no two answers around the window."""
        first = max(bisect_right(self.came_ns, window.began_s * 1e9) - 1, 0)
        last = min(bisect_left(self.came_ns, window.ended_s * 1e9), len(self.came_ns) - 1)
        if last <= first:
            return None
        longest = max(range(first, last), key=lambda index: self.came_ns[index + 1] - self.came_ns[index])
        return Window(self.came_ns[longest] / 1e9, self.came_ns[longest + 1] / 1e9)

    def latency_ms(self, window: Window, share: float) -> float:
        """The latency that this share of the answers in the window did not exceed."""
        first, last = self._indices(window)
        return percentile([ns / 1e6 for ns in self.took_ns[first:last]], share)

    def pages_per_s(self, window: Window) -> float:
        """How fast the workload wrote, from the first to the last answer in the window; 0 if there are none."""
        return self._per_second(self.pages, window)

    def written_bytes(self, window: Window) -> int:
        """What the workload wrote of memory and disk, from the first to the last answer in the window."""
        first, last = self._indices(window)
        if last - first < 2:
            return 0
        units = self.pages[last - 1] - self.pages[first] + self.blocks[last - 1] - self.blocks[first]
        return units * UNIT_BYTES

    def answers_per_s(self, window: Window) -> float:
        """How many answers came each second."""
        first, last = self._indices(window)
        return (last - first) / (window.ended_s - window.began_s)

    def recovery_ms(self, gap: Window, speed: Callable[[Window], float], enough: float) -> float | None:
        """From the end of a gap until a speed, one of the two above, is enough for 150 ms; None if it never is."""
        start = gap.ended_s
        end = self.came_ns[-1] / 1e9
        good = 0
        number = 0
        while start + (number + 1) * BIN_S <= end:
            at = start + number * BIN_S
            good = good + 1 if speed(Window(at, at + BIN_S)) >= enough else 0
            number += 1
            if good == STEADY_BINS:
                return (number - STEADY_BINS) * BIN_S * 1000
        return None

    def _per_second(self, counter: Sequence[int], window: Window) -> float:
        first, last = self._indices(window)
        if last - first < 2:
            return 0.0
        return (counter[last - 1] - counter[first]) / (window.ended_s - window.began_s)

    def _indices(self, window: Window) -> tuple[int, int]:
        return bisect_left(self.came_ns, window.began_s * 1e9), bisect_right(self.came_ns, window.ended_s * 1e9)


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest of the values that this share of them does not exceed (nearest rank); 0 for none."""
    if not values:
        return 0.0
    ordered = sorted(values)
    rank = max(0, -(-len(ordered) * share // 1) - 1)
    return ordered[int(rank)]
