"""Processor time for what is done beside running containers: theirs comes first."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

# A third of the weight of a container's task where both want the same processor (sched(7)).
NICENESS = 10


@contextmanager
def behind_containers() -> Iterator[None]:
    """For this thread alone, and threads and processes that it starts, to the end of the block.

    Its priority before can be had again by who has CAP_SYS_NICE, as the agent has.
    """
    before = os.getpriority(os.PRIO_PROCESS, 0)
    os.setpriority(os.PRIO_PROCESS, 0, max(before, NICENESS))
    try:
        yield
    finally:
        os.setpriority(os.PRIO_PROCESS, 0, before)
