"""Processor time for what is done beside running containers: theirs comes first."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress

# A tenth of the weight of a container's task where both want the same processor (sched(7)).
NICENESS = 10


@contextmanager
def behind_containers() -> Iterator[None]:
    """For this thread alone, and what it starts, to the end of the block.

    The way back needs CAP_SYS_NICE, which the agent has. Who has it not stays behind, and is slower for it.
    """
    before = os.getpriority(os.PRIO_PROCESS, 0)
    os.setpriority(os.PRIO_PROCESS, 0, max(before, NICENESS))
    try:
        yield
    finally:
        with suppress(PermissionError):
            os.setpriority(os.PRIO_PROCESS, 0, before)
