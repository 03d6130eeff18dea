"""Processor time for what is done beside running containers: theirs comes first."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

# A tenth of the weight of a container's task where both want the same processor and are of one group (sched(7)).
NICENESS = 10
_CAP_SYS_NICE = 23  # linux/capability.h


@contextmanager
def behind_containers() -> Iterator[None]:
    """For this thread alone, and what it starts, to the end of the block. Nothing where there would be no way back."""
    if not _may_come_back():
        yield
        return
    before = os.getpriority(os.PRIO_PROCESS, 0)
    os.setpriority(os.PRIO_PROCESS, 0, max(before, NICENESS))
    try:
        yield
    finally:
        os.setpriority(os.PRIO_PROCESS, 0, before)


@cache
def _may_come_back() -> bool:
    """Whether this process may raise its priority: proc_pid_status(5), capabilities(7)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    effective = next(line.split()[1] for line in lines if line.startswith("CapEff:"))
    return bool(int(effective, 16) >> _CAP_SYS_NICE & 1)
