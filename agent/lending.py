"""The copy of a container that stands still here, read for the destination that pulls (`migrator.postcopy`)."""

from collections.abc import Callable, Iterator

from agent.cgroup import Cgroup
from agent.processes import pid_inside
from blockdev.blocks import Batch
from blockdev.extents import Range
from migrator.errors import Precondition
from migrator.handover import Outgoing
from migrator.memory import ProcessGone, ProcessKey
from migrator.memory.processes import key
from migrator.memory.reading import read_process
from migrator.postcopy import MemoryLost


class FrozenCopy:
    """The processes in a control group. `record` gives the migration's record as it is at each moment."""

    def __init__(self, host: str, cgroup: Cgroup, record: Callable[[], Outgoing]) -> None:
        self._host = host
        self._cgroup = cgroup
        self._record = record
        self._processes: dict[int, ProcessKey] = {}

    def read(self, pid: int, ranges: list[Range]) -> Iterator[Batch]:
        """What is in ranges of a process, by its pid in the container. Raises MemoryLost if it was given up, and
        Precondition (NOT_FROZEN)."""
        try:
            if not self._processes:
                self._processes = {pid_inside(each): key(each) for each in self._cgroup.pids()}
            if pid not in self._processes:
                raise MemoryLost(f"the container has no process {pid} at {self._host}")
            for batch in read_process(self._processes[pid], ranges, strict=True):
                self._check()  # it stood still while that was read
                yield batch
        except ProcessGone as error:
            raise MemoryLost(f"{error} at {self._host}") from error

    def _check(self) -> None:
        now = self._record()
        if now.may_thaw or now.may_destroy:
            raise MemoryLost(f"{self._host} keeps no copy of {now.container} to pull from")
        if not self._cgroup.is_frozen():
            raise Precondition(f"{now.container} does not stand still at {self._host}", reason="NOT_FROZEN")
