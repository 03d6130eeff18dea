"""When a migration may go: with a place among those that leave this host, one at its destination, and its container.

While it waits for a place it does not hold the container, which can be used, stopped and removed until then.
"""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from typing import Protocol

import structlog

from agent.places import Places
from migrator.errors import Busy, MigratorError, Unreachable
from migrator.ports import Peer
from migrator.progress import Progress

ASK_S = 0.5
CHECK_S = 0.02
# How long a destination may be gone before the waiting for it ends, and how long the container may be busy.
SILENCE_S = 30.0
BUSY_S = 60.0

log = structlog.get_logger()


class Holding(Protocol):
    """Of `agent.containers.Containers`."""

    def hold(self, name: str, operation: str, *, wait_s: float) -> AbstractContextManager[None]: ...


class Turn:
    """Of one migration. Close it at the end: it gives back all that it has."""

    def __init__(
        self, migration: str, container: str, containers: Holding, places: Places, here: str, progress: Progress
    ) -> None:
        self._migration = migration
        self._container = container
        self._containers = containers
        self._places = places
        self._here = here
        self._progress = progress
        self._lease = ExitStack()
        self._is_in_line = False

    def take_container(self, wait_s: float = 0.0) -> None:
        """Raises Busy if another operation has it all that time."""
        name = self._migration
        what = f"migration {name} to another host is under way (migrator migrations cancel {name})"
        self._lease.enter_context(self._containers.hold(self._container, what, wait_s=wait_s))

    def join(self, *, at_once: bool = False) -> None:
        """Stand in the line of those that leave this host; `at_once`: do not wait for a place."""
        if at_once:
            return
        self._is_in_line = True
        self._places.join(self._migration)
        self._progress.queued(self._places.position(self._migration), self._here)

    def close(self) -> None:
        """Repeatable."""
        self._places.leave(self._migration)
        self._lease.close()

    def wait_here(self) -> None:
        """Until it has a place among those that leave. Raises Cancelled, TimedOut, Busy."""
        if not self._is_in_line or not self._places.position(self._migration):
            return
        self._lease.close()
        self._places.wait(
            self._migration, self._progress.check, lambda position: self._progress.queued(position, self._here)
        )
        self._retake_container(lambda: None)

    def wait_there(self, peer: Peer) -> None:
        """Until it has a place at its destination. Raises Cancelled, TimedOut, Busy, Unreachable."""
        self._lease.close()
        began = answered = time.monotonic()
        try:
            while True:
                try:
                    position = peer.queue(self._migration, time.monotonic() - began)
                    answered = time.monotonic()
                    self._progress.queued(position, peer.host)
                    if not position:
                        break
                except Unreachable as error:
                    if time.monotonic() - answered > SILENCE_S:
                        raise
                    log.warning("waiting for a place", migration=self._migration, reason=str(error))
                self._sleep(ASK_S)
            self._retake_container(lambda: self._keep(peer, time.monotonic() - began))
        except BaseException:
            self._leave(peer)
            raise

    def _retake_container(self, keep: Callable[[], None]) -> None:
        deadline = time.monotonic() + BUSY_S
        while True:
            try:
                self.take_container(wait_s=ASK_S)
                return
            except Busy:
                if time.monotonic() > deadline:
                    raise
            self._progress.check()
            keep()

    def _keep(self, peer: Peer, waited_s: float) -> None:
        try:
            peer.queue(self._migration, waited_s)
        except Unreachable as error:
            log.warning("keeping a place", migration=self._migration, reason=str(error))

    def _leave(self, peer: Peer) -> None:
        """Of no consequence if it fails: who does not ask any more loses the place."""
        try:
            peer.queue(self._migration, 0.0, leave=True)
        except MigratorError as error:
            log.info("leaving the line", migration=self._migration, reason=str(error))

    def _sleep(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            self._progress.check()
            time.sleep(CHECK_S)
