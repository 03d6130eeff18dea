"""Tasks that the kernel does not let go: who waits uninterruptibly, and in what, for people who have to know why."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

# Where tasks are that a freezer or a tracer has stopped: these wait for nothing.
FROZEN = ("__refrigerator", "do_freezer_trap", "get_signal", "ptrace_stop")
MOST_TOLD = 5
STACK_DEPTH = 4


@dataclass(frozen=True)
class Stuck:
    """A task in an uninterruptible wait. `stack` is the innermost first, and empty where the kernel does not tell."""

    pid: int
    name: str
    waits_in: str
    stack: tuple[str, ...]

    def __str__(self) -> str:
        way = " < ".join(self.stack) or self.waits_in or "an unknown place"
        return f"{self.pid} ({self.name}) waits in {way}"


def find(pids: Iterable[int] | None = None) -> list[Stuck]:
    """Of these processes, or of all that are to be seen, the tasks in state D that no freezer has stopped."""
    found = []
    for folder in _tasks(pids):
        try:
            name, _, rest = (folder / "stat").read_text(errors="replace").partition("(")[2].rpartition(")")
            waits_in = _text(folder / "wchan").strip("0")
            if rest.split()[0] == "D" and not waits_in.startswith(FROZEN):
                found.append(Stuck(int(folder.name), name, waits_in, _stack(folder)))
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has ended
    return found


def words(pids: Iterable[int] | None = None) -> str:
    """`find` in a sentence."""
    found = find(pids)
    if not found:
        return "no task is in an uninterruptible wait by now"
    more = f", and {len(found) - MOST_TOLD} more" if len(found) > MOST_TOLD else ""
    return "in an uninterruptible wait: " + "; ".join(map(str, found[:MOST_TOLD])) + more


def _tasks(pids: Iterable[int] | None) -> Iterator[Path]:
    proc = Path("/proc")
    names = [entry.name for entry in proc.iterdir() if entry.name.isdecimal()] if pids is None else map(str, pids)
    for name in names:
        try:
            yield from (proc / name / "task").iterdir()
        except (FileNotFoundError, ProcessLookupError):
            continue


def _stack(folder: Path) -> tuple[str, ...]:
    """Lines are `[<0>] function+0x1/0x2`."""
    lines = [line.split() for line in _text(folder / "stack").splitlines()]
    return tuple(line[1].partition("+")[0] for line in lines[:STACK_DEPTH] if len(line) > 1)


def _text(path: Path) -> str:
    """Empty where only others may read it, or the kernel has none."""
    try:
        return path.read_text()
    except (PermissionError, FileNotFoundError):
        return ""
