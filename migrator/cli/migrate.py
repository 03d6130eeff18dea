"""`migrate CT HOST`: start a migration, show it as it happens, and tell how it ended."""

import click

from migrator.cli import output
from migrator.cli.amounts import RATE, TIME_LIMIT_MS
from migrator.cli.base import Command, settings
from migrator.cli.connection import READ_S, agent
from migrator.cli.follow import follow
from migrator.cli.names import CONTAINER, HOST
from migrator.cli.summary import exit_code, migration_object, write_summary
from migrator.v1 import migration_pb2
from migrator.v1.migration_pb2_grpc import MigrationServiceStub

SNAPSHOTS = {
    None: migration_pb2.SNAPSHOT_HANDLING_UNSPECIFIED,
    True: migration_pb2.SNAPSHOT_HANDLING_MOVE,
    False: migration_pb2.SNAPSHOT_HANDLING_DROP,
}


@click.command("migrate", cls=Command)
@click.option("--check-only", is_flag=True, help="Only ask whether it could be moved; nothing is touched.")
@click.option(
    "--timeout", type=TIME_LIMIT_MS, metavar="DURATION", help="Roll back if it takes longer, for example 60s."
)
@click.option("--bandwidth", type=RATE, metavar="RATE", help="Limit on all that is sent, for example 2Gbit/s.")
@click.option(
    "--max-downtime",
    type=TIME_LIMIT_MS,
    metavar="DURATION",
    help="Stop the container when it would stand still for less; 100ms if not given.",
)
@click.option(
    "--on-no-converge",
    type=click.Choice(["freeze", "abort", "throttle", "postcopy"]),
    default="freeze",
    show_default=True,
    help="If it writes faster than it can be sent: stop it all the same, roll back, slow it down, or let it run there "
    "and pull the rest of its memory from here (it is lost if either host is, meanwhile).",
)
@click.option("--verify", is_flag=True, help="Compare whole volumes while it stands still; roll back if they differ.")
@click.option(
    "--with-snapshots/--without-snapshots",
    "snapshots",
    default=None,
    help="Take its snapshots along, or delete them with the copy here. One of the two is needed if there are any.",
)
@click.option("-v", "--verbose", is_flag=True, help="Say also how memory is tracked and what each round left.")
@click.option("--detach", is_flag=True, help="Return at once; `migrator migrations watch` shows the rest.")
@click.argument("container", type=CONTAINER)
@click.argument("host", type=HOST)
def command(
    *,
    container: str,
    host: str,
    check_only: bool,
    timeout: int | None,
    bandwidth: int | None,
    max_downtime: int | None,
    on_no_converge: str,
    verify: bool,
    snapshots: bool | None,
    verbose: bool,
    detach: bool,
) -> int:
    """Move a container from this host to another, live; one that is stopped or paused stays so.

    \b
    migrate ct101 host-b
    migrate ct101 host-b --check-only
    migrate ct101 host-b --timeout 60s --bandwidth 2Gbit/s -o json

    Ctrl-C cancels: the container goes on at the source, unless it was handed over already.

    With -o json: one object with migration, container, source, destination, outcome (migrated, rolled_back, refused,
    cancelled, container_ended, uncertain, checked, timed_out; running or queued before its end), queue_position,
    queue_host, missing_bytes, downtime_ms, total_ms, bytes {memory, disk, wire}, phases [{name, start_ms, duration_ms,
    steps}], notes, where_running, and error {reason, message, exit_code} or null.
    downtime_ms is the time from the source's freeze to the first task running at the destination: each clock's own
    share and the exchange between.

    \b
    Exit codes: 0 done, 1 internal, 2 usage, 3 preflight refused, 4 unreachable or not authorised,
    5 did not converge, 6 failed and rolled back, 7 uncertain: look at both hosts, 9 busy,
    124 timeout (rolled back), 130 cancelled (rolled back).
    """
    request = migration_pb2.CreateMigrationRequest(
        container=container,
        destination=host,
        check_only=check_only,
        timeout_ms=timeout or 0,
        bandwidth_bytes_per_second=bandwidth or 0,
        verify=verify,
        max_downtime_ms=max_downtime or 0,
        on_no_converge=f"ON_NO_CONVERGE_{on_no_converge.upper()}",
        snapshots=SNAPSHOTS[snapshots],
    )
    if detach:
        with agent() as channel:
            made = MigrationServiceStub(channel).CreateMigration(request, timeout=READ_S).migration
        if settings().json:
            output.write_json(migration_object(made))
        else:
            print(made.name)
        return 0
    ended = follow(request, verbose=verbose)
    if settings().json:
        output.write_json(migration_object(ended))
    else:
        write_summary(ended)
    return exit_code(ended)
