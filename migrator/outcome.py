"""How a migration ended, for who has asked for it: by what its record says, whatever was met on the way."""

from migrator import answers
from migrator.destination import is_live
from migrator.errors import Cancelled, ExecutionError, MigratorError, RolledBack, TimedOut
from migrator.handover import Decision, Outgoing
from migrator.ports import LeavingContainer
from migrator.v1 import migration_pb2

Verdict = tuple[migration_pb2.Outcome, str, MigratorError | None]
"""The outcome, the host that has the container (empty where that is not known), and what went wrong."""


def verdict(record: Outgoing | None, error: MigratorError | None, container: LeavingContainer, here: str) -> Verdict:
    """`migrator.recovery` carries on what is not finished. `error` is None only where nothing went wrong."""
    if record is not None and record.may_destroy:
        return migration_pb2.OUTCOME_MIGRATED, record.destination, None
    assert error is not None
    if record is not None and record.decision is Decision.RELEASED and record.answer is None:
        return migration_pb2.OUTCOME_UNCERTAIN, "", answers.uncertain(record, here, str(error))
    if is_live(container.state) and container.has_ended():
        ended = RolledBack(f"{container.name} ended while it was moved: {error}", reason="CONTAINER_ENDED")
        return migration_pb2.OUTCOME_CONTAINER_ENDED, here, ended
    if isinstance(error, Cancelled):
        return migration_pb2.OUTCOME_CANCELLED, here, error
    if isinstance(error, TimedOut):
        return migration_pb2.OUTCOME_TIMED_OUT, here, error
    if isinstance(error, RolledBack):
        return migration_pb2.OUTCOME_ROLLED_BACK, here, error
    back = RolledBack(f"{error}. {container.name} goes on at {here} as before", reason=error.reason)
    return migration_pb2.OUTCOME_ROLLED_BACK, here, back


def as_migrator_error(error: BaseException) -> MigratorError:
    """Errors of the disk and of the kernel as those that clients know."""
    return error if isinstance(error, MigratorError) else ExecutionError(str(error))
