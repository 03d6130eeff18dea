"""What /proc says of a process, apart from its memory (proc(5))."""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from migrator.memory.errors import ProcessGone

# Their default action is to be ignored (signal(7)): CHLD, CONT, URG, WINCH.
_IGNORED_BY_DEFAULT = 1 << 16 | 1 << 17 | 1 << 22 | 1 << 27


class ProcessKey(NamedTuple):
    """A process, not to be mistaken for a later one with the same pid: `started` is in clock ticks since boot."""

    pid: int
    started: int


@dataclass(frozen=True)
class Signals:
    """Signal sets of a thread as bit masks, bit 0 for signal 1."""

    pending: int
    blocked: int
    ignored: int
    caught: int

    def deliverable(self) -> bool:
        """Whether a signal waits that would end a system call."""
        ignored = self.ignored | (_IGNORED_BY_DEFAULT & ~self.caught)
        return bool(self.pending & ~self.blocked & ~ignored)


@dataclass(frozen=True)
class Thread:
    """State letter as in ps(1), the pid of a tracer or 0, whether seccomp confines it, its signals."""

    tid: int
    state: str
    tracer: int
    seccomp: bool
    signals: Signals


def key(pid: int) -> ProcessKey:
    """Raises ProcessGone if there is no such process or nothing but a zombie."""
    return ProcessKey(pid, int(_stat(pid)[19]))


def is_alive(process: ProcessKey) -> bool:
    """Whether it still runs: a zombie does not."""
    try:
        fields = _stat(process.pid)
    except ProcessGone:
        return False
    return int(fields[19]) == process.started


def name(pid: int) -> str:
    """The command's name, for messages; empty if the process is gone."""
    try:
        return Path(f"/proc/{pid}/comm").read_text(errors="replace").strip()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def threads(pid: int) -> list[int]:
    """Thread ids, the first thread's first; empty if the process is gone."""
    try:
        return sorted(int(entry.name) for entry in Path(f"/proc/{pid}/task").iterdir())
    except (FileNotFoundError, ProcessLookupError):
        return []


def thread(pid: int, tid: int) -> Thread:
    """Raises ProcessGone if there is no such thread."""
    try:
        text = Path(f"/proc/{pid}/task/{tid}/status").read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError) as error:
        raise ProcessGone(f"thread {tid} of process {pid} is gone") from error
    return parse_status(tid, text)


def parse_status(tid: int, text: str) -> Thread:
    """From the text of /proc/PID/status."""
    fields = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)

    def mask(field: str) -> int:
        return int(fields.get(field, "0"), 16)

    return Thread(
        tid,
        fields["State"].split()[0],
        int(fields["TracerPid"]),
        int(fields.get("Seccomp", "0")) != 0,
        Signals(mask("SigPnd") | mask("ShdPnd"), mask("SigBlk"), mask("SigIgn"), mask("SigCgt")),
    )


def _stat(pid: int) -> list[str]:
    """Fields of /proc/PID/stat from the state (the third) on. A leader that is a zombie may have living threads."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError) as error:
        raise ProcessGone(f"process {pid} is gone") from error
    # The name, in parentheses, may itself have some.
    fields = text[text.rindex(")") + 2 :].split()
    if fields[0] in "ZX" and len(threads(pid)) <= 1:
        raise ProcessGone(f"process {pid} has ended")
    return fields
