"""What every contender does for a run: have the workload at the source, move it, and leave nothing."""

from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from benchkit.hosts import Lab
from benchkit.native import Programs
from benchkit.workloads import Workload

MAC = "02:77:03:00:00:01"


@dataclass(frozen=True)
class Bench:
    """What a contender may use. `folder` is seen by every host; `hosts_folder` is a host's own, by the same name."""

    lab: Lab
    programs: Programs
    folder: Path


@dataclass(frozen=True)
class Moved:
    """What a contender tells of a move: its phases, and other metrics."""

    phases_ms: dict[str, float] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)


class Session(Protocol):
    """A workload that runs at the source, and answers soon."""

    address: str

    def move(self) -> Moved:
        """To the destination. Returns when the contender is done. Raises BenchError if it failed."""


class Contender(Protocol):
    """One way to move a container."""

    name: str
    note: str

    def check(self, bench: Bench) -> None:
        """Raises CannotRunError with the reason if this cannot be done here; called once, before any run."""

    def takes(self, workload: Workload) -> str:
        """Empty, or why not this workload."""

    def session(self, bench: Bench, workload: Workload) -> AbstractContextManager[Session]:
        """The workload at the source; all of it is gone afterwards, wherever it was."""
