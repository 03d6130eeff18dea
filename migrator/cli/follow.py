"""Following a migration to its end: through interrupts, and through an agent that goes away and comes back."""

import queue
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import grpc

from migrator.cli import drawing
from migrator.cli.base import settings
from migrator.cli.connection import READ_S, explain, is_lost, open_channel
from migrator.cli.settings import Endpoint, endpoint
from migrator.errors import MigratorError, Uncertain
from migrator.status import from_rpc
from migrator.units import format_size
from migrator.v1 import migration_pb2
from migrator.v1.migration_pb2_grpc import MigrationServiceStub

# An agent that is started again by systemd is back well within this.
RECONNECT_S = 15.0
RETRY_S = 0.5
CANCEL_S = 5.0

INTERRUPT = object()
Event = migration_pb2.Migration | MigratorError | object


def follow(request: migration_pb2.CreateMigrationRequest, *, verbose: bool) -> migration_pb2.Migration:
    """Start a migration and show it until it has ended; returns it as it ended."""
    target = endpoint(settings())
    events: queue.SimpleQueue[Event] = queue.SimpleQueue()
    with _interrupts(events):
        with open_channel(target) as channel:
            try:
                made = MigrationServiceStub(channel).CreateMigration(request, timeout=READ_S).migration
            except grpc.RpcError as error:
                raise explain(error, target) from error
        return _follow(made, target, events, verbose)


def watch(name: str) -> migration_pb2.Migration:
    """Show a migration that runs until it has ended. An interrupt only stops the watching."""
    target = endpoint(settings())
    with open_channel(target) as channel:
        request = migration_pb2.GetMigrationRequest(name=name)
        try:
            found = MigrationServiceStub(channel).GetMigration(request, timeout=READ_S).migration
        except grpc.RpcError as error:
            raise explain(error, target) from error
    return _follow(found, target, queue.SimpleQueue(), verbose=False)


def _follow(
    migration: migration_pb2.Migration, target: Endpoint, events: "queue.SimpleQueue[Event]", verbose: bool
) -> migration_pb2.Migration:
    watcher = threading.Thread(target=_watch, args=(migration.name, target, events), daemon=True, name="watch")
    watcher.start()
    interrupts = noted = 0
    turn = (0, "")
    pulls = False
    with drawing.picture() as picture:
        picture.show(migration)
        while not migration.outcome:
            event = events.get()
            if isinstance(event, migration_pb2.Migration):
                migration = event
                picture.show(migration)
                if (migration.queue_position, migration.queue_host) != turn:
                    turn = (migration.queue_position, migration.queue_host)
                    picture.note(_turn(migration))
                if migration.missing_bytes and not pulls:
                    pulls = True
                    picture.note(_pulls(migration))
                if verbose:
                    for note in migration.notes[noted:]:
                        picture.note(note)
                    noted = len(migration.notes)
            elif isinstance(event, MigratorError):
                return _lost(migration, event)
            else:
                interrupts += 1
                if interrupts > 1:
                    raise Uncertain(
                        f"no longer watching; the migration goes on: migrator migrations watch {migration.name}"
                    )
                picture.note(_cancel(migration, target))
    return migration


def _turn(migration: migration_pb2.Migration) -> str:
    if not migration.queue_position:
        return "its turn has come"
    whose = migration.queue_host or migration.source
    return f"queued: number {migration.queue_position} of those that wait for a place at {whose}"


def _pulls(migration: migration_pb2.Migration) -> str:
    return (
        f"{migration.container} runs at {migration.destination}; {format_size(migration.missing_bytes)} of its memory "
        f"is still at {migration.source}: until it is pulled, the container needs both hosts"
    )


def _cancel(migration: migration_pb2.Migration, target: Endpoint) -> str:
    """Ask for the end of it; returns what to tell the operator."""
    with open_channel(target) as channel:
        try:
            MigrationServiceStub(channel).CancelMigration(
                migration_pb2.CancelMigrationRequest(name=migration.name), timeout=CANCEL_S
            )
        except grpc.RpcError as error:
            failure = from_rpc(error)
            if failure.reason == "COMMITTED":
                return f"too late to cancel: {migration.container} was handed over; waiting for the rest"
            return f"cancelling failed: {failure}; again Ctrl-C to stop watching"
    return f"cancelling: {migration.container} stays at {migration.source}; waiting for the rollback"


def _lost(migration: migration_pb2.Migration, error: MigratorError) -> migration_pb2.Migration:
    """What is known when the agent did not come back."""
    known = migration_pb2.Migration()
    known.CopyFrom(migration)
    phase = migration.phases[-1].name if migration.phases else "the beginning"
    known.outcome = migration_pb2.OUTCOME_UNCERTAIN
    known.where_running = ""
    known.reason, known.exit_code = Uncertain.reason, int(Uncertain.exit_code)
    known.error = (
        f"the agent of {migration.source or 'the source'} went away during {phase} and did not come back ({error}); "
        f"start it, it finishes the migration"
    )
    return known


def _watch(name: str, target: Endpoint, events: "queue.SimpleQueue[Event]") -> None:
    """Puts the migration at each change, or a MigratorError if it cannot be known any more. Runs in a thread."""
    last_heard = time.monotonic()
    failure: MigratorError = Uncertain("the connection ended")
    while time.monotonic() - last_heard < RECONNECT_S:
        try:
            with open_channel(target) as channel:
                request = migration_pb2.WatchMigrationRequest(name=name)
                for response in MigrationServiceStub(channel).WatchMigration(request):
                    last_heard = time.monotonic()
                    events.put(response.migration)
                    if response.migration.outcome:
                        return
            failure = Uncertain("the agent ended the stream")
        except grpc.RpcError as error:
            failure = from_rpc(error)
            if not is_lost(error):
                break
        time.sleep(RETRY_S)
    events.put(failure)


@contextmanager
def _interrupts(events: "queue.SimpleQueue[Event]") -> Iterator[None]:
    """SIGINT and SIGTERM as events, also while the migration is being created and has no name yet."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {
        number: signal.signal(number, lambda *_: events.put(INTERRUPT)) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        sys.stderr.flush()
        for number, handler in before.items():
            signal.signal(number, handler)
