"""What may go wrong in a run, as against a mistake of ours."""


class BenchError(Exception):
    """The benchmark cannot go on, or this run of it has failed; the message is for the report."""


class CannotRunError(BenchError):
    """This machine or its packages do not allow it; the message is the reason that the report gives."""
