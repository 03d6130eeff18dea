"""`migrator migrations …`: those that run and those of the past."""

import click

from migrator.cli import output
from migrator.cli.base import Group, settings
from migrator.cli.connection import READ_S, agent
from migrator.cli.follow import watch as watch_migration
from migrator.cli.summary import exit_code, migration_object, outcome_name, write_summary
from migrator.units import format_duration
from migrator.v1 import migration_pb2
from migrator.v1.migration_pb2_grpc import MigrationServiceStub


@click.group("migrations", cls=Group)
def group() -> None:
    """Migrations away from this host, running and past."""


@group.command("ls")
def ls() -> None:
    """List them, the objects of -o json as `migrate` has them."""
    with agent() as channel:
        request = migration_pb2.ListMigrationsRequest()
        found = MigrationServiceStub(channel).ListMigrations(request, timeout=READ_S).migrations
    if settings().json:
        output.write_json([migration_object(migration) for migration in found])
        return
    rows = [
        [
            migration.name,
            migration.container,
            migration.destination,
            outcome_name(migration) + _place(migration),
            format_duration(migration.downtime_ms) if migration.downtime_ms else "-",
            format_duration(migration.total_ms) if migration.total_ms else "-",
            output.iso(migration.create_time) or "-",
        ]
        for migration in found
    ]
    output.write_table(["MIGRATION", "CONTAINER", "TO", "OUTCOME", "DOWNTIME", "TOTAL", "BEGAN"], rows)


def _place(migration: migration_pb2.Migration) -> str:
    if not migration.queue_position:
        return ""
    return f" ({migration.queue_position} at {migration.queue_host or migration.source})"


@group.command("show")
@click.argument("name", metavar="ID")
def show(name: str) -> None:
    """Show one with its phases."""
    with agent() as channel:
        request = migration_pb2.GetMigrationRequest(name=name)
        found = migration_object(MigrationServiceStub(channel).GetMigration(request, timeout=READ_S).migration)
    if settings().json:
        output.write_json(found)
    else:
        output.write_fields(found)


@group.command("cancel")
@click.argument("name", metavar="ID")
def cancel(name: str) -> None:
    """Roll one back, if the handover was not reached."""
    with agent() as channel:
        request = migration_pb2.CancelMigrationRequest(name=name)
        MigrationServiceStub(channel).CancelMigration(request, timeout=READ_S)
    if settings().json:
        output.write_json({"migration": name})
    else:
        print(name)


@group.command("watch")
@click.argument("name", metavar="ID")
def watch(name: str) -> int:
    """Show one until it has ended, with the exit code of `migrate`. Ctrl-C only stops the watching."""
    ended = watch_migration(name)
    if settings().json:
        output.write_json(migration_object(ended))
    else:
        write_summary(ended)
    return exit_code(ended)
