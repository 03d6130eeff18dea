"""The process that keeps the userfaultfds, so that no death loses a page.

If the last descriptor of a userfaultfd is closed, the kernel lets missing pages read as zeros. So three processes have
each: the worker, which may do something wrong; the keeper, which starts it again; and the guard, which only waits for
the keeper's end. When both of the others are lost, the guard kills the container, and lets go of the descriptors after
that.
"""

import contextlib
import os
import select
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from migrator.fill import criu_socket, messages
from migrator.fill import store as page_store
from migrator.fill.cgroups import end_lost
from migrator.fill.journal import Journal
from migrator.fill.messages import Kind, Packet
from migrator.fill.status import Hold, State, Status, has_finished
from migrator.fill.worker import LostChild, Worker
from migrator.waiting import readable

MOST_RESTARTS = 10
_STATUS_S = 0.1
_LOST = 3  # exit code of a worker that cannot be replaced


@dataclass(frozen=True)
class Places:
    """What the fill works on. `cgroups` hold all processes of the container, and nothing else."""

    images: Path
    store: Path
    work: Path
    status: Path
    cgroups: Sequence[Path]


class Keeper:
    """The main process of the fill."""

    def __init__(self, places: Places) -> None:
        self._places = places
        self._hold = Hold(places.status)
        self._journal = Journal()
        self._tasks: dict[int, int | None] = {}
        self._descriptors: dict[int, int] = {}
        self._restored = False
        self._restarts = 0
        self._poll = select.epoll()
        self._handlers: dict[int, Callable[[], None]] = {}
        self._connection: socket.socket | None = None
        self._ended: Status | None = None

    def run(self) -> int:
        """Returns the exit code: 0 when all is filled, 1 when it cannot be; the container is killed then."""
        signal.signal(signal.SIGTERM, self._terminate)
        self._listening = criu_socket.listen(self._places.work)
        self._watch(self._listening.fileno(), self._accept)
        self._start_guard()
        self._start_worker()
        Status(State.READY).write(self._places.status)
        next_status = 0.0
        while self._ended is None:
            for descriptor, _ in self._poll.poll(_STATUS_S if self._tasks else None):
                if descriptor in self._handlers:
                    self._handlers[descriptor]()
            now = time.monotonic()
            if self._tasks and now >= next_status and self._ended is None:
                self._tell_status(State.FILLING if self._restored else State.RESTORING)
                next_status = now + _STATUS_S
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        # First: whoever dies in between leaves the guard, which then says it once more.
        self._ended.write(self._places.status)
        messages.send(self._guard, Packet(Kind.END))
        return 0 if self._ended.state == State.DONE else 1

    # CRIU

    def _accept(self) -> None:
        self._connection, _ = self._listening.accept()
        self._unwatch(self._listening.fileno())
        self._watch(self._connection.fileno(), self._receive)

    def _receive(self) -> None:
        assert self._connection is not None
        try:
            task = criu_socket.receive(self._connection)
        except EOFError as error:
            self._end(State.FAILED, str(error))
            return
        if task is None:
            self._restored = True
            self._unwatch(self._connection.fileno())
            messages.send(self._worker, Packet(Kind.RESTORED))
            return
        packet = Packet(Kind.TASK, len(self._tasks), task.pid, task.descriptor)
        self._tasks[packet.space] = task.pid
        self._descriptors[packet.space] = task.descriptor
        messages.send(self._guard, packet)
        messages.send(self._worker, packet)

    # The worker

    def _start_worker(self) -> None:
        self._worker, theirs = messages.pair()
        pid = os.fork()
        if pid == 0:
            _in_child(lambda: self._be_worker(theirs))
        theirs.close()
        self._worker_pid = pid
        self._worker_process = os.pidfd_open(pid)
        self._watch(self._worker.fileno(), self._hear_worker)
        self._watch(self._worker_process, self._worker_ended)
        messages.send(self._guard, Packet(Kind.WORKER, 0, pid))

    def _be_worker(self, keeper: socket.socket) -> int:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        self._let_go()
        with contextlib.suppress(PermissionError):
            os.setpriority(os.PRIO_PROCESS, 0, -20)
        try:
            Worker(
                self._places.images, self._places.store, self._journal, keeper, self._tasks, self._descriptors,
                restored=self._restored,
            ).run()  # fmt: skip
            # In this order: who hears of the end may rely on it.
            self._hold.finish()
            messages.send(keeper, Packet(Kind.END))
        except LostChild:
            return _LOST
        return 0

    def _hear_worker(self) -> None:
        packet = messages.receive(self._worker)
        if packet is None:
            self._unwatch(self._worker.fileno())
        elif packet.kind == Kind.FORKED and packet.descriptor is not None:
            self._tasks[packet.space] = None
            self._descriptors[packet.space] = packet.descriptor
            messages.send(self._guard, packet)
            messages.send(self._worker, Packet(Kind.TAKEN))
        elif packet.kind == Kind.CLOSED:
            messages.send(self._guard, packet)
            os.close(self._descriptors.pop(packet.space))
        elif packet.kind == Kind.END:
            self._end(State.DONE)

    def _worker_ended(self) -> None:
        # What it said last counts.
        while self._worker.fileno() in self._handlers and self._ended is None:
            self._hear_worker()
        if self._ended is not None:
            return
        _, status = os.waitpid(self._worker_pid, 0)
        code = os.waitstatus_to_exitcode(status)
        self._unwatch(self._worker_process)
        os.close(self._worker_process)
        self._worker.close()
        self._restarts += 1
        if code == _LOST or self._restarts > MOST_RESTARTS:
            self._kill(f"the fill was lost: its worker ended {self._restarts} times, last with {code}")
        else:
            self._start_worker()

    # The guard

    def _start_guard(self) -> None:
        self._guard, theirs = messages.pair()
        pid = os.fork()
        if pid == 0:
            _in_child(lambda: self._be_guard(theirs))
        theirs.close()
        self._guard_pid = pid
        self._watch(self._guard.fileno(), self._guard_ended)

    def _guard_ended(self) -> None:
        self._unwatch(self._guard.fileno())
        self._guard.close()
        os.waitpid(self._guard_pid, 0)
        self._start_guard()
        messages.send(self._guard, Packet(Kind.WORKER, 0, self._worker_pid))

    def _be_guard(self, keeper: socket.socket) -> int:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        self._let_go()
        worker: int | None = None
        while (packet := messages.receive(keeper)) is not None:
            if packet.kind == Kind.END:
                return 0
            if packet.kind == Kind.WORKER:
                if worker is not None:
                    os.close(worker)
                with contextlib.suppress(ProcessLookupError):
                    worker = os.pidfd_open(packet.number)
            elif packet.kind == Kind.CLOSED:
                os.close(self._descriptors.pop(packet.space))
            elif packet.descriptor is not None:
                self._descriptors[packet.space] = packet.descriptor
        if worker is not None:
            readable([worker])
        if has_finished(self._places.status):
            Status(State.DONE).write(self._places.status)
        elif self._descriptors:
            self._kill("the fill was lost: its keeper and its worker ended")
            assert self._ended is not None
            self._ended.write(self._places.status)
        return 0

    # All of them

    def _let_go(self) -> None:
        """Close in a child what is the keeper's."""
        self._poll.close()
        self._listening.close()
        for name in ("_connection", "_worker", "_guard"):
            if (held := getattr(self, name, None)) is not None:
                held.close()

    def _kill(self, reason: str) -> None:
        self._end(State.FAILED, end_lost(self._places.cgroups, reason))

    def _end(self, state: State, reason: str = "") -> None:
        self._ended = Status(state, 0 if state == State.DONE else self._left(), self._restarts, reason)

    def _terminate(self, *_: object) -> None:
        """Only as long as nothing depends on it."""
        if not self._tasks:
            sys.exit(128 + signal.SIGTERM)

    def _tell_status(self, state: State) -> None:
        # For who looks on: a full file system is no reason to end.
        with contextlib.suppress(OSError):
            Status(state, self._left(), self._restarts).write(self._places.status)

    def _left(self) -> int:
        return page_store.all_held_bytes(self._places.store)

    def _watch(self, descriptor: int, handler: Callable[[], None]) -> None:
        self._poll.register(descriptor, select.EPOLLIN)
        self._handlers[descriptor] = handler

    def _unwatch(self, descriptor: int) -> None:
        self._poll.unregister(descriptor)
        del self._handlers[descriptor]


def _in_child(work: Callable[[], int]) -> None:
    code = 1
    try:
        code = work()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)
