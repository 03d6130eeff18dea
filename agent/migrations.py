"""Migrations away from this host: started, watched, cancelled, and carried on after a restart of the agent."""

import secrets
import shutil
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import partial
from itertools import chain

import structlog

from agent.container_records import Record, State
from agent.database import Database
from agent.departure import Departing
from agent.journal import Outgoings
from agent.lending import FrozenCopy
from agent.managers import Managers
from agent.peers import RemotePeer, UnknownPeer
from agent.places import Places
from agent.turns import Turn
from migrator import convergence, postcopy, recovery
from migrator.convergence import OnNoConverge
from migrator.errors import (
    Busy,
    Cancelled,
    ExecutionError,
    InvalidArgument,
    MigratorError,
    NotFound,
    Precondition,
    TimedOut,
)
from migrator.handover import Outgoing
from migrator.options import Options
from migrator.ports import Decider, Peer
from migrator.progress import Progress
from migrator.source import Departure, Here
from migrator.stream import Digests, Sender
from migrator.v1 import migration_pb2, peer_pb2

SCHEMA = """
CREATE TABLE IF NOT EXISTS migrations (
    name TEXT PRIMARY KEY,
    create_time_ms INTEGER NOT NULL,
    migration BLOB NOT NULL
) STRICT
"""
DROP = migration_pb2.SNAPSHOT_HANDLING_DROP
KEPT = 1000
WATCH_INTERVAL_S = 0.25
SETTLE_TIMEOUT_S = 5.0
RETRY_S = 1.0

log = structlog.get_logger()


class Migrations:
    """All migrations that this host is the source of; thread-safe. Call `recover` once before use."""

    def __init__(
        self, managers: Managers, here: Here, paused_for_room: Callable[[], Collection[str]] = frozenset
    ) -> None:
        self._managers = managers
        self._paused_for_room = paused_for_room
        self._here = here
        self._outgoings = Outgoings(managers.database)
        self._store = _Store(managers.database)
        self._running: dict[str, Progress] = {}
        self._claimed: dict[str, ExitStack] = {}
        self._kept: list[ExitStack] = []
        self._places = Places(managers.config.max_migrations)
        self._closing = threading.Event()
        self._threads: set[threading.Thread] = set()
        self._lock = threading.Lock()

    def create(self, request: migration_pb2.CreateMigrationRequest) -> migration_pb2.Migration:
        """Start one. Raises NotFound, Busy, Precondition, InvalidArgument."""
        host = self._here.host
        if request.destination == host:
            raise InvalidArgument(f"{request.container} is at {host} already", reason="SAME_HOST")
        if min(request.timeout_ms, request.bandwidth_bytes_per_second, request.max_downtime_ms) < 0:
            raise InvalidArgument("a timeout, a bandwidth or a downtime below zero")
        options = _options(request)
        with ExitStack() as stack:
            name = f"m-{secrets.token_hex(4)}"
            self._managers.containers.record(request.container)
            migration = migration_pb2.Migration(
                name=name,
                container=request.container,
                source=host,
                destination=request.destination,
                where_running=host,
            )
            migration.create_time.FromMilliseconds(time.time_ns() // 1_000_000)
            progress = Progress(migration, request.timeout_ms, request.bandwidth_bytes_per_second)
            turn = Turn(name, request.container, self._managers.containers, self._places, host, progress)
            stack.callback(turn.close)
            turn.take_container()
            if (other := self.of(request.container)) and not options.check_only:
                raise Busy(f"container {request.container} is busy: migration {other} waits for its turn")
            self._ready(request.container)
            peer = stack.enter_context(RemotePeer(self._managers.config, request.destination))
            self._store.save(migration)

            def depart() -> Departure:
                departing = self._departing(self._ready(request.container), name, request.snapshots)
                return Departure(name, self._here, departing, peer, self._outgoings, progress, options)

            turn.join(at_once=options.check_only)
            self._begin(name, progress, lambda: self._in_turn(turn, peer, progress, depart), stack.pop_all())
        return progress.snapshot()

    def get(self, name: str) -> migration_pb2.Migration:
        """As it is now; raises NotFound."""
        with self._lock:
            progress = self._running.get(name)
        return progress.snapshot() if progress else self._store.get(name)

    def list(self) -> list[migration_pb2.Migration]:
        """The newest first."""
        return [self.get(name) for name in self._store.names()]

    def of(self, container: str) -> str:
        """The running migration of a container; empty if there is none."""
        with self._lock:
            running = [(name, progress.snapshot()) for name, progress in self._running.items()]
        return next((name for name, migration in running if migration.container == container), "")

    def cancel(self, name: str) -> None:
        """Ask it to roll back. Raises NotFound, or Precondition if it is over or committed."""
        with self._lock:
            progress = self._running.get(name)
        if progress is None:
            self._store.get(name)
            raise Precondition(f"migration {name} has ended already", reason="ALREADY_ENDED")
        if not progress.cancel():
            raise Precondition(
                f"migration {name} is committed: it cannot be cancelled and finishes", reason="COMMITTED"
            )

    def cancel_of(self, container: str) -> None:
        """As `cancel`, of the container's running one if there is one that can be cancelled."""
        with suppress(NotFound, Precondition):
            self.cancel(self.of(container))

    def watch(self, name: str, wanted: Callable[[], bool]) -> Iterator[migration_pb2.Migration]:
        """It as it is now and at each change, until it has an outcome or nobody wants to know any more."""
        with self._lock:
            progress = self._running.get(name)
        if progress is None:
            yield self._store.get(name)
            return
        version = 0
        while wanted():
            version, migration = progress.wait(version, WATCH_INTERVAL_S)
            if migration.outcome:
                self._wait_settled(name, migration)
                yield migration
                return
            yield migration

    def decision(self, name: str, epoch: int, asker: str) -> peer_pb2.Decision:
        """What is decided, for the destination. One that nobody works on and that is undecided is aborted first."""
        record = self._asked(name, epoch, asker)
        with self._lock:
            working = name in self._running
        return recovery.decision(self._outgoings, record, is_worked_on=working)

    def lend(self, asker: str, requests: postcopy.Requests) -> postcopy.Responses:
        """Memory that a container was handed over without, for the destination: see `migrator.postcopy`."""
        first = next(requests, None)
        if first is None:
            return
        asked = partial(self._asked, first.migration, first.epoch, asker)
        record = asked()
        with self._lock:
            progress = self._running.get(record.migration, Progress(migration_pb2.Migration()))
        copy = FrozenCopy(self._here.host, self._managers.runtime.cgroup(record.container), asked)
        sender = Sender(record.migration, record.epoch, Digests(), progress.meter, progress.sent)
        yield from postcopy.lend(chain([first], requests), copy.read, sender)

    def _asked(self, name: str, epoch: int, asker: str) -> Outgoing:
        record = self._outgoings.get(name)
        if record is None or record.epoch != epoch or record.destination != asker:
            raise NotFound(f"no migration {name} with epoch {epoch} to {asker} here", reason="MIGRATION_NOT_FOUND")
        return record

    def claim(self) -> None:
        """Before the containers are reconciled: hold those whose migration is not finished. Their ends mean nothing."""
        for record in self._outgoings.unfinished():
            stack = ExitStack()
            what = f"migration {record.migration} is being finished"
            try:
                stack.enter_context(self._managers.containers.hold(record.container, what))
            except Busy:
                log.warning("two unfinished migrations of one container", container=record.container)
            self._claimed[record.migration] = stack

    def recover(self) -> None:
        """After `claim`: end what a former life had begun, by its records."""
        for record in self._outgoings.unfinished():
            migration = migration_pb2.Migration(
                name=record.migration,
                container=record.container,
                source=self._here.host,
                destination=record.destination,
            )
            with suppress(NotFound):
                migration = self._store.get(record.migration)
            progress = Progress(migration)
            self._begin(record.migration, progress, lambda: None, self._claimed.pop(record.migration))
        for name in self._store.unfinished():
            with self._lock:
                if name in self._running:
                    continue
            # It never came as far as a promise, or only its outcome was not stored.
            progress = Progress(self._store.get(name))
            ended = self._outgoings.get(name)
            if ended is not None and ended.may_destroy:
                progress.end(migration_pb2.OUTCOME_MIGRATED, ended.destination)
            else:
                progress.end(migration_pb2.OUTCOME_ROLLED_BACK, self._here.host, recovery.restarted(self._here.host))
            self._store.save(progress.snapshot())

    def close(self, timeout_s: float = 10.0) -> None:
        """Cancel what can be cancelled and wait for it; what is committed goes on after the next start."""
        self._closing.set()
        with self._lock:
            running, threads = list(self._running.values()), list(self._threads)
        for progress in running:
            progress.cancel()
        deadline = time.monotonic() + timeout_s
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    # -- inside -----------------------------------------------------------------------------------------------------

    def _in_turn(self, turn: Turn, peer: Peer, progress: Progress, depart: Callable[[], Departure]) -> None:
        try:
            turn.wait_here()
            while not depart().run():
                turn.wait_there(peer)
        except Cancelled as error:
            progress.end(migration_pb2.OUTCOME_CANCELLED, self._here.host, error)
        except TimedOut as error:
            progress.end(migration_pb2.OUTCOME_TIMED_OUT, self._here.host, error)
        except MigratorError as error:  # of the waiting: nothing has been touched
            progress.end(migration_pb2.OUTCOME_REFUSED, self._here.host, error)

    def _ready(self, container: str) -> Record:
        """As it is to be moved, with its lease taken. Raises NotFound, Busy, and what settling its snapshots meets."""
        self._managers.containers.record(container).refuse("move", State.ARRIVING)
        record = self._managers.snapshots.settle(container)
        if record.state is State.PAUSED and record.name in self._paused_for_room():
            record = replace(record, state=State.RUNNING)  # there is room where it goes
        return record

    def _departing(self, record: Record, migration: str, snapshots: migration_pb2.SnapshotHandling = DROP) -> Departing:
        return Departing(self._managers, record, self._managers.migration_folder(migration), snapshots)

    def _wait_settled(self, name: str, migration: migration_pb2.Migration) -> None:
        """Who hears of the end may start the next thing at once: the container's lease is given back by then."""
        deadline = time.monotonic() + SETTLE_TIMEOUT_S
        while migration.outcome != migration_pb2.OUTCOME_UNCERTAIN and time.monotonic() < deadline:
            with self._lock:
                if name not in self._running:
                    return
            time.sleep(0.002)

    def _begin(self, name: str, progress: Progress, work: Callable[[], None], resources: ExitStack) -> None:
        """Run the work in a thread of its own, which gives the resources back and stores the end."""

        def run() -> None:
            failure: MigratorError | None = None
            try:
                with resources:
                    try:
                        work()
                    except Exception as error:
                        # A bug, whatever its kind: the container may stand still, and what is on record comes next.
                        log.exception("migration", migration=name)
                        failure = ExecutionError(f"unexpected {type(error).__name__}: {error}")
                    if not self._finish(name, progress):
                        # The agent stops: the container stays held until the process is gone.
                        self._kept.append(resources.pop_all())
                    elif not progress.snapshot().outcome:
                        progress.end(migration_pb2.OUTCOME_REFUSED, self._here.host, failure)
            except Exception:
                # Nobody is above this thread, and its end has still to be stored.
                log.exception("migration", migration=name)
            finally:
                self._store.save(progress.snapshot())
                with self._lock:
                    self._running.pop(name, None)
                    self._threads.discard(threading.current_thread())

        thread = threading.Thread(target=run, name=f"migration {name}", daemon=True)
        with self._lock:
            self._running[name] = progress
            self._threads.add(thread)
        thread.start()

    def _finish(self, name: str, progress: Progress) -> bool:
        """Until the record is finished, however long that takes; False if the agent stops before."""
        while (record := self._outgoings.get(name)) is not None and not record.finished:
            try:
                self._carry_on(record, progress)
            except Exception as error:
                # Whatever it is, a frozen container waits: it is tried again.
                log.warning("finishing a migration", migration=name, reason=f"{type(error).__name__}: {error}")
                if self._closing.wait(RETRY_S):
                    return False
        return True

    def _carry_on(self, record: Outgoing, progress: Progress) -> None:
        try:
            departing = self._departing(self._managers.containers.record(record.container), record.migration)
        except NotFound:
            departing = None  # removed already; only the record was not finished
        with ExitStack() as connection:
            peer: Decider
            try:
                peer = connection.enter_context(RemotePeer(self._managers.config, record.destination))
            except NotFound as error:
                peer = UnknownPeer(record.destination, error)
            recovery.carry_on(record.migration, self._here.host, departing, peer, self._outgoings, progress)
        # CRIU's images, if the agent died between making and removing them.
        shutil.rmtree(self._managers.migration_folder(record.migration), ignore_errors=True)


class _Store:
    """The table of migrations: each as it was when it began, and as it ended."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def save(self, migration: migration_pb2.Migration) -> None:
        with self._database.transaction() as cursor:
            cursor.execute(
                "INSERT OR REPLACE INTO migrations VALUES (?, ?, ?)",
                (migration.name, migration.create_time.ToMilliseconds(), migration.SerializeToString()),
            )
            cursor.execute(
                "DELETE FROM migrations WHERE name NOT IN "
                "(SELECT name FROM migrations ORDER BY create_time_ms DESC LIMIT ?)",
                (KEPT,),
            )

    def get(self, name: str) -> migration_pb2.Migration:
        rows = self._database.rows("SELECT migration FROM migrations WHERE name = ?", name)
        if not rows:
            raise NotFound(f"there is no migration {name} on this host", reason="MIGRATION_NOT_FOUND")
        return migration_pb2.Migration.FromString(rows[0]["migration"])

    def names(self) -> list[str]:
        rows = self._database.rows("SELECT name FROM migrations ORDER BY create_time_ms DESC, name")
        return [row["name"] for row in rows]

    def unfinished(self) -> list[str]:
        ended = (migration_pb2.OUTCOME_UNSPECIFIED, migration_pb2.OUTCOME_UNCERTAIN)
        return [name for name in self.names() if self.get(name).outcome in ended]


def _options(request: migration_pb2.CreateMigrationRequest) -> Options:
    on_no_converge = {
        migration_pb2.ON_NO_CONVERGE_UNSPECIFIED: OnNoConverge.FREEZE,
        migration_pb2.ON_NO_CONVERGE_FREEZE: OnNoConverge.FREEZE,
        migration_pb2.ON_NO_CONVERGE_ABORT: OnNoConverge.ABORT,
        migration_pb2.ON_NO_CONVERGE_THROTTLE: OnNoConverge.THROTTLE,
        migration_pb2.ON_NO_CONVERGE_POSTCOPY: OnNoConverge.POSTCOPY,
    }.get(request.on_no_converge)
    if on_no_converge is None:
        raise InvalidArgument(f"on_no_converge {request.on_no_converge} is unknown to this version")
    return Options(
        request.check_only,
        request.verify,
        request.max_downtime_ms / 1000 or convergence.DEFAULT_DOWNTIME_S,
        on_no_converge,
    )
