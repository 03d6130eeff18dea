"""Which way to see writes this kernel has."""

from migrator.memory import soft_dirty, write_protect
from migrator.memory.errors import Untrackable
from migrator.memory.everything import NoTracking
from migrator.memory.follower import Follower
from migrator.memory.soft_dirty import SoftDirty
from migrator.memory.tracker import MemoryTracker, Pids
from migrator.memory.watching import Method
from migrator.memory.write_protect import WriteProtect

# In order of preference.
_METHODS: dict[str, type[WriteProtect] | type[SoftDirty] | type[NoTracking]] = {
    "write-protect": WriteProtect,
    "soft-dirty": SoftDirty,
    "none": NoTracking,
}
METHODS = tuple(_METHODS)


def probe() -> dict[str, str | None]:
    """For each method, in order of preference, None if it works here, else why not, in words for people."""
    return {"write-protect": write_protect.probe(), "soft-dirty": soft_dirty.probe(), "none": None}


def choose(wanted: str | None = None) -> tuple[str, str]:
    """The method to use and why, in words for people: the best that works, or the one `wanted`.

    Raises Untrackable if that one does not work here, or there is none of that name.
    """
    if wanted is not None and wanted not in _METHODS:
        raise Untrackable(f"there is no memory tracker {wanted!r}: choose one of {', '.join(METHODS)}")
    reasons = probe()
    if wanted is not None:
        if reason := reasons[wanted]:
            works = ", ".join(name for name, reason in reasons.items() if not reason)
            raise Untrackable(f"memory cannot be tracked by {wanted} here: {reason}. What works: {works}")
        return wanted, "as asked for"
    chosen = next(name for name in METHODS if not reasons[name])
    better = METHODS[: METHODS.index(chosen)]
    return chosen, "; ".join(f"{name}: {reasons[name]}" for name in better) or "the best there is"


def make(pids: Pids, method: str) -> MemoryTracker:
    """A tracker by a method that `choose` gave. It does nothing before `start` or the first `collect`."""
    chosen: Method = _METHODS[method]()
    return Follower(pids, chosen)
