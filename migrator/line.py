"""The line of the migrations that wait to come to a host: who has asked first comes first, who stops asking has left.

It lives in memory. After a restart of the agent the sources ask on, and say for how long they have waited.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

from migrator.errors import Busy, InvalidArgument

FEATURE = "queue-v1"
# A source asks more often than once a second.
KEPT_S = 15.0
# Of one source; agent.config lets none have more on their way.
MOST_OF_ONE = 64
LONGEST_WAIT_S = 30 * 86400.0


@dataclass
class _Waiting:
    since: float
    asked_at: float


class Line:
    """For `count` places. Not thread-safe. `taken` is how many of the places are in use at that moment."""

    def __init__(self, count: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._count = count
        self._clock = clock
        self._line: dict[tuple[str, str], _Waiting] = {}

    def ask(self, source: str, migration: str, waited_s: float, taken: int) -> int:
        """Join the line, or stay in it. 0 for one that has a place, which is kept for it; 1 for the one that gets the
        next. Raises InvalidArgument, and Busy if too many of this source wait."""
        if not 0 <= waited_s <= LONGEST_WAIT_S:
            raise InvalidArgument(f"a migration that has waited for {waited_s:g} s")
        now = self._clock()
        self._forget_silent(now)
        waiting = self._line.get((source, migration))
        if waiting is None:
            if sum(name == source for name, _ in self._line) >= MOST_OF_ONE:
                raise Busy(f"{MOST_OF_ONE} migrations from {source} wait here already", reason="LINE_FULL")
            waiting = self._line[source, migration] = _Waiting(now - waited_s, now)
        waiting.asked_at = now
        return self._position((source, migration), taken)

    def leave(self, source: str, migration: str) -> None:
        """Give up the place, or the waiting for one; repeatable."""
        self._line.pop((source, migration), None)

    def has_place(self, source: str, migration: str, taken: int) -> bool:
        """Whether it may come now: also one that has never asked, if nobody would have to wait for that."""
        self._forget_silent(self._clock())
        if (source, migration) in self._line:
            return self._position((source, migration), taken) == 0
        return len(self._line) < self._count - taken

    def _position(self, key: tuple[str, str], taken: int) -> int:
        order = sorted(self._line, key=lambda other: self._line[other].since)
        return max(0, order.index(key) + 1 - max(0, self._count - taken))

    def _forget_silent(self, now: float) -> None:
        for key in [key for key, waiting in self._line.items() if now - waiting.asked_at > KEPT_S]:
            del self._line[key]
