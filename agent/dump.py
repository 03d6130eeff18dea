"""CRIU's dump of a container that leaves, with what was prepared for it before the freeze."""

import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from agent import shm_folder
from agent.cgroup import Cgroup
from agent.processes import pid_inside
from migrator.criu import Criu, DumpRequest
from migrator.memory import ProcessGone
from migrator.pageless import Pageless, write_parent
from migrator.shm import left_out
from migrator.smaps import SmapsFolder

SMAPS, LEFT_OUT = "smaps", "left-out"
"""What CRIU reads in place of the kernel's answers, in the folder of the migration."""
TIMEOUT_S = 120.0


class Dump:
    """CRIU lets the control group go while it works: it is frozen again before anything else happens."""

    def __init__(
        self,
        criu: Criu,
        request: DumpRequest,
        cgroup: Cgroup,
        shm: Path,
        pageless: Pageless | None,
        smaps: SmapsFolder | None,
    ) -> None:
        self._criu = criu
        self._request = request
        self._cgroup = cgroup
        self._shm = shm
        self._pageless = pageless
        self._smaps = smaps

    def rehearse(self) -> None:
        """Of the processes that there are now, which will be there mostly as they are."""
        pids = self._cgroup.pids()
        for pid in pids:
            if self._request.parent is not None:
                with suppress(ProcessGone):
                    write_parent(self._request.parent, [pid_inside(pid)])
        if self._smaps is not None:
            self._smaps.write(pids)

    def prepare(self, sent: Sequence[os.stat_result]) -> None:
        """See `migrator.ports.Checkpoint`."""
        pids = self._cgroup.pids()
        if self._request.parent is not None and self._pageless is not None:
            self._pageless.prepare(self._request.parent, {pid: pid_inside(pid) for pid in pids})
        if self._smaps is not None:
            self._smaps.write(pids)
        left_out.write(self._request.work / LEFT_OUT, sent)

    def dump(self, check: Callable[[], None]) -> None:
        """Write the images; on return the tasks are stopped by CRIU and by the control group."""
        self._criu.dump(self._request, TIMEOUT_S, check)
        self._cgroup.freeze()
        shm_folder.pack(self._shm, self._request.images)
