"""What tracking a process can fail with."""

from migrator.errors import ExecutionError, MigratorError, Precondition


class Untrackable(Precondition):
    """A process, or this kernel, cannot be tracked in the way asked for, and will not become so by waiting."""

    reason = "MEMORY_UNTRACKABLE"


class NotNow(ExecutionError):
    """A process could not be stopped for the moment that is needed; it may be possible later."""

    reason = "MEMORY_BUSY"


class ProcessGone(MigratorError):
    """The process ended, or its memory was replaced by exec, while it was looked at."""

    reason = "PROCESS_GONE"
