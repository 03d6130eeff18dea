"""What leaves the source on its link to the switch, counted by the kernel: the same for every contender."""

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from benchkit.hosts import SOURCE
from benchkit.trace import Window
from labkit.hosts import host_named

SAMPLE_S = 0.02
# The stream is between these parts of all that was sent: the beginning and the end are something else.
FIRST, LAST = 0.05, 0.95

Sample = tuple[float, int]


@dataclass(frozen=True)
class Sent:
    """Bytes that were sent, and how many a second while most of them were."""

    total: float
    per_s: float


class Meter:
    """Samples the link's counter during a block."""

    def __init__(self) -> None:
        self._counters = Path(f"/proc/{host_named(SOURCE).init_pid()}/net/dev")
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._sample)
        self.samples: list[Sample] = []

    def sent(self, quiet: Window, window: Window, answers_end_s: float) -> Sent:
        """In the window, less what the container's own answers made of it, which the quiet window tells."""
        answers_per_s = (at(self.samples, quiet.ended_s) - at(self.samples, quiet.began_s)) / (
            quiet.ended_s - quiet.began_s
        )
        return stream(self.samples, window, answers_per_s, answers_end_s)

    def _sample(self) -> None:
        while not self._end.wait(SAMPLE_S):
            self._look()

    def _look(self) -> None:
        for line in self._counters.read_text().splitlines():
            name, _, numbers = line.partition(":")
            if name.strip() == "eth0":
                self.samples.append((time.monotonic(), int(numbers.split()[8])))

    def __enter__(self) -> Self:
        self._look()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end.set()
        self._thread.join()
        self._look()


def at(samples: Sequence[Sample], moment_s: float) -> int:
    """The counter as it was last read until then."""
    return max((value for when_s, value in samples if when_s <= moment_s), default=samples[0][1])


def stream(samples: Sequence[Sample], window: Window, answers_per_s: float, answers_end_s: float) -> Sent:
    """What was sent in the window beside the answers, of which so many bytes a second come until their end."""
    began = at(samples, window.began_s)

    def own(when_s: float, value: int) -> float:
        return max(0.0, value - began - answers_per_s * (min(when_s, answers_end_s) - window.began_s))

    sums = [(when_s, own(when_s, value)) for when_s, value in samples if window.began_s <= when_s <= window.ended_s]
    if not sums or (total := sums[-1][1]) < 1:
        return Sent(0.0, 0.0)
    first = next(sample for sample in sums if sample[1] >= FIRST * total)
    last = next(sample for sample in sums if sample[1] >= LAST * total)
    seconds = max(last[0] - first[0], SAMPLE_S)
    return Sent(total, (last[1] - first[1]) / seconds)
