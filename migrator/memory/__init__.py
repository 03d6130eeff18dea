"""Memory of a container's processes: which of it was written since the last look, and what is in it.

    tracker = make(pids, choose()[0])
    with closing(tracker):
        tracker.start()
        collected = tracker.collect()
        for change in collected.processes:
            for batch in tracker.read(change.process, change.written): ...

docs/design.md says how it is done.
"""

from migrator.memory.choosing import METHODS, choose, make, probe
from migrator.memory.errors import NotNow, ProcessGone, Untrackable
from migrator.memory.processes import ProcessKey
from migrator.memory.shared import ObjectKey
from migrator.memory.tracker import Collected, MemoryTracker, Moment, ProcessChange, SharedChange

__all__ = [
    "METHODS",
    "Collected",
    "MemoryTracker",
    "Moment",
    "NotNow",
    "ObjectKey",
    "ProcessChange",
    "ProcessGone",
    "ProcessKey",
    "SharedChange",
    "Untrackable",
    "choose",
    "make",
    "probe",
]
