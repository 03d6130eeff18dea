"""One operation at a time per container. Leases live in memory: they end with the agent."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from migrator.errors import Busy

WAIT_S = 60.0


class Leases:
    """Exclusive holds on names, each with the operation that it is for."""

    def __init__(self) -> None:
        self._held: dict[str, tuple[str, bool]] = {}
        self._changed = threading.Condition()

    @contextmanager
    def hold(self, name: str, operation: str, *, wait_s: float = 0.0, brief: bool = False) -> Iterator[None]:
        """Hold the name while the block runs.

        A name that is held for another operation raises Busy after `wait_s` seconds, at once by default. An operation
        that is `brief` (the agent's own, such as noting a container's end) is always waited for.
        """
        deadline = time.monotonic() + wait_s
        brief_deadline = time.monotonic() + WAIT_S
        with self._changed:
            while (held := self._held.get(name)) is not None:
                left = (brief_deadline if held[1] else deadline) - time.monotonic()
                if left <= 0:
                    raise Busy(f"container {name} is busy: {held[0]}; try again when that is done")
                self._changed.wait(min(left, WAIT_S))
            self._held[name] = (operation, brief)
        try:
            yield
        finally:
            with self._changed:
                del self._held[name]
                self._changed.notify_all()

    def operation(self, name: str) -> str | None:
        """What the name is held for; None if it is free."""
        with self._changed:
            held = self._held.get(name)
        return None if held is None else held[0]
