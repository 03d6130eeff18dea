"""Every failure an operator can meet, with the reason that clients match on and the exit code that scripts see.

Reasons are stable API (google.rpc.ErrorInfo.reason); messages are for people and may change.
"""

from enum import IntEnum


class Exit(IntEnum):
    """Exit codes of the command line."""

    DONE = 0
    INTERNAL = 1
    USAGE = 2
    PREFLIGHT = 3
    UNREACHABLE = 4
    NOT_CONVERGED = 5
    ROLLED_BACK = 6
    UNCERTAIN = 7
    DRAIN_PARTLY = 8
    BUSY = 9
    TIMEOUT = 124
    CANCELLED = 130


class MigratorError(Exception):
    """Base of all errors that reach a user. `reason` is UPPER_SNAKE and stable."""

    reason = "INTERNAL"
    exit_code = Exit.INTERNAL

    def __init__(self, message: str, *, reason: str | None = None) -> None:
        super().__init__(message)
        if reason is not None:
            self.reason = reason


class InvalidArgument(MigratorError):
    """What was asked for is malformed: a name, a size, an address."""

    reason = "INVALID_ARGUMENT"
    exit_code = Exit.USAGE


class NotFound(MigratorError):
    """The named container, image, migration or host does not exist here."""

    reason = "NOT_FOUND"
    exit_code = Exit.USAGE


class AlreadyExists(MigratorError):
    """The name is taken."""

    reason = "ALREADY_EXISTS"
    exit_code = Exit.USAGE


class Precondition(MigratorError):
    """Nothing was done: the state of the container or of a host forbids it."""

    reason = "FAILED_PRECONDITION"
    exit_code = Exit.PREFLIGHT


class Busy(MigratorError):
    """Another operation holds the container."""

    reason = "BUSY"
    exit_code = Exit.BUSY


class Unreachable(MigratorError):
    """A host or its agent does not answer, or its identity is not accepted."""

    reason = "UNREACHABLE"
    exit_code = Exit.UNREACHABLE


class PermissionDenied(MigratorError):
    """The caller's certificate does not carry the role that this method asks for."""

    reason = "PERMISSION_DENIED"
    exit_code = Exit.UNREACHABLE


class RolledBack(MigratorError):
    """The migration failed before the handover; the container runs at the source as before."""

    reason = "ROLLED_BACK"
    exit_code = Exit.ROLLED_BACK


class NotConverged(RolledBack):
    """The container writes faster than it can be sent, and may not stand still for as long as that would take."""

    reason = "NOT_CONVERGED"
    exit_code = Exit.NOT_CONVERGED


class Uncertain(MigratorError):
    """The handover was begun and the other end does not answer: an operator has to look."""

    reason = "UNCERTAIN"
    exit_code = Exit.UNCERTAIN


class Cancelled(MigratorError):
    """The operator cancelled; the container runs at the source as before."""

    reason = "CANCELLED"
    exit_code = Exit.CANCELLED


class TimedOut(MigratorError):
    """A deadline passed before the handover; the container runs at the source as before."""

    reason = "DEADLINE_EXCEEDED"
    exit_code = Exit.TIMEOUT


class ExecutionError(MigratorError):
    """A program or a kernel call that should have worked failed; the text names it and quotes its last words."""

    reason = "EXECUTION_FAILED"


class PeerError(MigratorError):
    """The other end sent something that it must not send, or answered with a failure of its own."""

    reason = "PEER_FAILED"
