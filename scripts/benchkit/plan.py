"""What a benchmark consists of: which tasks, in which order, how often, and what cannot be run here."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from benchkit.contenders.base import Contender
from benchkit.contenders.criu import Criu, CriuLazy, DiskCopy
from benchkit.contenders.ours import Ours
from benchkit.contenders.podman import Podman
from benchkit.contenders.qemu import Qemu
from benchkit.contenders.runc import LazyPages, Runc
from benchkit.results import OURS
from benchkit.rows import ROWS
from benchkit.tasks import Ceilings, DiskTracker, MemoryTracker, Move, Snapshots, Task
from benchkit.together import COUNTS, Together
from benchkit.workloads import WORKLOADS

MOVERS: list[Contender] = [Ours(), Runc(), Criu(), CriuLazy(), LazyPages(), Podman(), DiskCopy(), Qemu()]
# Rows first, so that a benchmark that runs out of time has them.
ROW_TASKS = list(dict.fromkeys(task for row in ROWS for task in row.tasks))
LARGE = ("idle-4g", "write-50mbs-4g")
# A few seconds each: more of them, where all else is run once.
CHEAP, CHEAP_RUNS = ("tracker-memory", "tracker-disk"), 3
# In a quick benchmark, when everything has been run once: ours again, as often as time allows.
QUICK_RUNS = 3
# Who takes part in every workload; a quick benchmark has the others only with the small one, a full one where rows
# need it.
QUICK_MOVERS = {"idle-16m": tuple(mover.name for mover in MOVERS)}
OTHERS = (OURS, "runc + copy", "CRIU lazy pages", "runc lazy pages", DiskCopy.name)
# The peer that is to be beaten, the first of these that takes a workload: a quick benchmark begins with it, and has the
# others when everything else has been run once.
BEST = (CriuLazy.name, DiskCopy.name, LazyPages.name, Runc.name)
BEST_AT = dict.fromkeys(("postgres", "tree-256", "idle-1g"), Runc.name)


@dataclass(frozen=True)
class Extent:
    """How much is run: `runs` for a row's tasks, `large_runs` for those of 4 GiB, `other_runs` beside the rows."""

    name: str
    runs: int
    large_runs: int
    other_runs: int
    limit_s: float


QUICK = Extent("quick", runs=1, large_runs=1, other_runs=0, limit_s=440.0)
FULL = Extent("full", runs=5, large_runs=3, other_runs=1, limit_s=3420.0)


@dataclass(frozen=True)
class Part:
    """One task, who takes part and how often."""

    task: Task
    contenders: tuple[str, ...]
    runs: int


def parts(extent: Extent, only: Iterable[str], available: Iterable[Contender], runs: int | None = None) -> list[Part]:
    """In the order to run them. With names of rows in `only`, just what these need. With `runs`, so many of each.

    But for a quick one the workloads take turns: what goes on beside it slows all of them down."""
    chosen = [row for row in ROWS if not only or row.name in only]
    wanted = list(dict.fromkeys(task for row in chosen for task in row.tasks))
    if extent.other_runs and not only:
        wanted += [name for name in WORKLOADS if name not in wanted]
    if extent is QUICK:
        wanted.sort(key=LARGE.__contains__)  # what takes a minute each comes when the rest has been run
    movers = list(available)
    found = [Part(Ceilings(), ("machine",), 1)]
    for name in wanted:
        task = _task(name, movers)
        who = tuple(task.contenders)
        if extent is QUICK and name in WORKLOADS:
            who = tuple(one for one in who if one in QUICK_MOVERS.get(name, OTHERS))
        elif extent is FULL and name in WORKLOADS and name not in ROW_TASKS:
            who = tuple(one for one in who if one in OTHERS)
        planned = extent.large_runs if name in LARGE else extent.runs if name in ROW_TASKS else extent.other_runs
        if name in CHEAP:
            planned = max(CHEAP_RUNS, planned)
        found.append(Part(task, who, runs or planned))
    if extent.other_runs and not only:
        found += [Part(Together(count), (OURS,), extent.other_runs) for count in COUNTS]
    if extent is QUICK and runs is None:
        again = [Part(part.task, (OURS,), QUICK_RUNS) for part in found if OURS in part.contenders]
        return [*(replace(part, contenders=_first(part)) for part in found), *found, *again]
    # All of it once before any of it twice: what time runs out for is repetitions.
    turns = range(max(part.runs for part in found))
    return [found[0], *(replace(part, runs=turn + 1) for turn in turns for part in found[1:] if turn < part.runs)]


def _first(part: Part) -> tuple[str, ...]:
    """Of those that take part, ours and the one that is to be beaten; of 4 GiB, which take a minute each, ours."""
    peers = [BEST_AT.get(part.task.name, ""), *BEST]
    best = next((peer for peer in peers if peer in part.contenders), None)
    if best is None:
        return part.contenders
    return (OURS,) if part.task.name in LARGE else (OURS, best)


def _task(name: str, movers: list[Contender]) -> Task:
    special: dict[str, type[Snapshots] | type[DiskTracker] | type[MemoryTracker]] = {
        "snapshot-100k-extents": Snapshots,
        "tracker-disk": DiskTracker,
        "tracker-memory": MemoryTracker,
    }
    return special[name]() if name in special else Move(WORKLOADS[name], movers)


def never_here() -> dict[str, str]:
    """Contenders that this machine rules out, with the reason; asked of the kernel where that is possible."""
    found: dict[str, str] = {}
    if not soft_dirty():
        found["podman with --pre-checkpoint, runc with --pre-dump, P.Haul"] = (
            "the kernel has no soft-dirty bits (CONFIG_MEM_SOFT_DIRTY), without which CRIU cannot pre-dump"
        )
    return found


def soft_dirty() -> bool:
    """Whether pages of this process can be marked: a write after a clear sets bit 55 of its pagemap entry."""
    try:
        Path("/proc/self/clear_refs").write_text("4")
    except OSError:
        return False
    return "sd" in Path("/proc/self/smaps").read_text().split("VmFlags:", 1)[1].splitlines()[0].split()
