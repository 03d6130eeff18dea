"""Waits for the end of processes that are not our children, by pidfd, in one thread."""

import os
import select
import threading
from collections.abc import Callable

from agent.processes import Process


class ExitWatcher:
    """Calls back, each time in a thread of its own, when a watched process has ended."""

    def __init__(self) -> None:
        self._poll = select.epoll()
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._poll.register(self._wake, select.EPOLLIN)
        self._callbacks: dict[int, Callable[[], None]] = {}
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="exit-watcher", daemon=True)
        self._thread.start()

    def watch(self, process: Process, callback: Callable[[], None]) -> None:
        """Call `callback` once when the process has ended; soon, if it has already."""
        descriptor = process.open()
        if descriptor is None:
            threading.Thread(target=callback, daemon=True).start()
            return
        with self._lock:
            self._callbacks[descriptor] = callback
            self._poll.register(descriptor, select.EPOLLIN)

    def close(self) -> None:
        """Stop watching; nothing is called any more."""
        os.eventfd_write(self._wake, 1)
        self._thread.join()
        with self._lock:
            for descriptor in self._callbacks:
                os.close(descriptor)
            self._callbacks.clear()
        self._poll.close()
        os.close(self._wake)

    def _run(self) -> None:
        while True:
            for descriptor, _ in self._poll.poll():
                if descriptor == self._wake:
                    return
                with self._lock:
                    callback = self._callbacks.pop(descriptor)
                    self._poll.unregister(descriptor)
                    os.close(descriptor)
                threading.Thread(target=callback, daemon=True).start()
