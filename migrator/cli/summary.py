"""A migration's end, for people and as JSON."""

import sys

from migrator.cli import output
from migrator.errors import Exit
from migrator.units import format_duration, format_size
from migrator.v1 import migration_pb2

# Where the agent gave no exit code of its own.
BY_OUTCOME = {
    migration_pb2.OUTCOME_MIGRATED: Exit.DONE,
    migration_pb2.OUTCOME_CHECKED: Exit.DONE,
    migration_pb2.OUTCOME_ROLLED_BACK: Exit.ROLLED_BACK,
    migration_pb2.OUTCOME_REFUSED: Exit.PREFLIGHT,
    migration_pb2.OUTCOME_CANCELLED: Exit.CANCELLED,
    migration_pb2.OUTCOME_CONTAINER_ENDED: Exit.ROLLED_BACK,
    migration_pb2.OUTCOME_UNCERTAIN: Exit.UNCERTAIN,
    migration_pb2.OUTCOME_TIMED_OUT: Exit.TIMEOUT,
}
GOOD = (migration_pb2.OUTCOME_MIGRATED, migration_pb2.OUTCOME_CHECKED)


def exit_code(migration: migration_pb2.Migration) -> int:
    """The exit code that an ended migration stands for; 0 only for one that did what was asked."""
    if migration.outcome in GOOD:
        return int(Exit.DONE)
    return migration.exit_code or int(BY_OUTCOME.get(migration.outcome, Exit.UNCERTAIN))


def outcome_name(migration: migration_pb2.Migration) -> str:
    """migrated, rolled_back and so on; running while it has not ended, queued while it has not begun."""
    if migration.outcome == migration_pb2.OUTCOME_UNSPECIFIED:
        return "queued" if migration.queue_position else "running"
    return output.enum_name(migration_pb2.Outcome, migration.outcome)


def migration_object(migration: migration_pb2.Migration) -> dict[str, object]:
    """A migration as `migrate -o json` shows it."""
    failed = bool(migration.error or migration.reason)
    return {
        "migration": migration.name,
        "container": migration.container,
        "source": migration.source,
        "destination": migration.destination,
        "outcome": outcome_name(migration),
        "queue_position": migration.queue_position or None,
        "queue_host": migration.queue_host or None,
        "missing_bytes": migration.missing_bytes,
        "downtime_ms": round(migration.downtime_ms, 3),
        "total_ms": round(migration.total_ms, 3),
        "bytes": {"memory": migration.bytes.memory, "disk": migration.bytes.disk, "wire": migration.bytes.wire},
        "phases": [
            {
                "name": phase.name,
                "start_ms": round(phase.start_ms, 3),
                "duration_ms": round(phase.duration_ms, 3),
                "steps": [{"name": step.name, "duration_ms": round(step.duration_ms, 3)} for step in phase.steps],
            }
            for phase in migration.phases
        ],
        "notes": [*migration.notes],
        "where_running": migration.where_running or None,
        "error": output.error_object(migration.reason, migration.error, exit_code(migration)) if failed else None,
    }


def write_summary(migration: migration_pb2.Migration) -> None:
    """How it ended: the result on standard output, what went wrong on standard error."""
    if migration.outcome == migration_pb2.OUTCOME_MIGRATED:
        print(f"{migration.container} moved from {migration.source} to {migration.destination}")
        print(f"  downtime  {format_duration(migration.downtime_ms)} of {format_duration(migration.total_ms)} in all")
        sizes = migration.bytes
        print(
            f"  moved     {format_size(sizes.memory)} of memory, {format_size(sizes.disk)} of disk; "
            f"{format_size(sizes.wire)} on the wire"
        )
        print(f"  is at     {migration.where_running or migration.destination}")
        return
    if migration.outcome == migration_pb2.OUTCOME_CHECKED:
        print(f"{migration.container} can be moved to {migration.destination}")
        return
    what = outcome_name(migration).replace("_", " ")
    text = f"migrate: {migration.container} to {migration.destination}: {what}"
    if migration.error:
        text += f": {output.printable(migration.error)}"
    print(text, file=sys.stderr)
    if migration.where_running:
        print(f"migrate: {migration.container} is at {migration.where_running}", file=sys.stderr)
    elif migration.outcome == migration_pb2.OUTCOME_UNCERTAIN:
        hint = f"do not start it by hand; `migrator migrations show {migration.name}` when the agents answer again"
        print(f"migrate: where {migration.container} is, is not known; {hint}", file=sys.stderr)
