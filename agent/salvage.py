"""What a start of the agent cannot clear away is told and left for the next one: it keeps nobody else from working."""

from collections.abc import Iterator
from contextlib import contextmanager

import structlog

from migrator.destination import FAILURES

log = structlog.get_logger()


@contextmanager
def tried(what: str) -> Iterator[None]:
    """Log what fails in the block, and go on behind it. `what` is for the log."""
    try:
        yield
    except FAILURES as error:
        log.error("left for the next start of the agent", what=what, reason=str(error))
