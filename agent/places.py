"""Places for so many at once, given in the order in which they were asked for."""

import threading
from collections.abc import Callable

POLL_S = 0.05


class Places:
    """A line of names: the first `count` of them have a place. Thread-safe."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._line: list[str] = []
        self._changed = threading.Condition()

    def join(self, name: str) -> None:
        """Stand at the end of the line."""
        with self._changed:
            self._line.append(name)

    def leave(self, name: str) -> None:
        """Give up the place, or the waiting for one; repeatable."""
        with self._changed:
            if name in self._line:
                self._line.remove(name)
                self._changed.notify_all()

    def position(self, name: str) -> int:
        """0 for one that has a place, 1 for the one that gets the next. ValueError for one that is not in the line."""
        with self._changed:
            return self._position(name)

    def wait(self, name: str, check: Callable[[], None], tell: Callable[[int], None]) -> None:
        """Until it has a place. `tell` hears of each new position; `check` is called now and then, and what it raises
        ends the waiting: `leave` has still to be called."""
        told = 0
        while True:
            with self._changed:
                position = self._position(name)
                if position and position == told:
                    self._changed.wait(POLL_S)
                    position = self._position(name)
            if position != told:
                tell(position)
                told = position
            if not position:
                return
            check()

    def _position(self, name: str) -> int:
        return max(0, self._line.index(name) - self._count + 1)
