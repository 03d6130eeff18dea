"""Something that is done every so often, in a thread of its own, whatever became of it the last time."""

import threading
from collections.abc import Callable

import structlog

log = structlog.get_logger()


class Periodic:
    """Runs `work` every `interval_s` seconds from now on, until closed. What it raises is logged."""

    def __init__(self, name: str, interval_s: float, work: Callable[[], None]) -> None:
        self._name = name
        self._interval_s = interval_s
        self._work = work
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def close(self, timeout_s: float = 5.0) -> None:
        """Let it end what it is doing and not begin again."""
        self._stopping.set()
        self._thread.join(timeout_s)

    def _run(self) -> None:
        while not self._stopping.wait(self._interval_s):
            try:
                self._work()
            except Exception:
                # Whatever it is: a thread that ended here would leave its work undone from now on, and say nothing.
                log.exception("periodic work failed", what=self._name)
