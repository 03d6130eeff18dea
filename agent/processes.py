"""Processes that are not our children: known by pid and start time, so that a reused pid is never taken for them."""

import errno
import os
import signal
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from migrator.memory import ProcessGone
from migrator.waiting import readable


@dataclass(frozen=True)
class Process:
    """A process as the host sees it. `start_ticks` is field 22 of /proc/PID/stat (proc(5)): clock ticks since boot."""

    pid: int
    start_ticks: int

    @classmethod
    def find(cls, pid: int) -> "Process | None":
        """The process that has this pid now; None if there is none or it is a zombie."""
        fields = _stat(pid)
        return None if fields is None or fields[0] in "ZX" else cls(pid, int(fields[19]))

    @classmethod
    def noted(cls, path: Path) -> "Process | None":
        """The process that `note` has written there, which may be gone by now; None if there is no such file."""
        try:
            pid, start_ticks = path.read_text().split()
        except FileNotFoundError:
            return None
        return cls(int(pid), int(start_ticks))

    def note(self, path: Path) -> None:
        """Write it to a file, for a later life of the agent; the file is replaced as a whole."""
        temporary = path.with_name(f"{path.name}.new")
        temporary.write_text(f"{self.pid} {self.start_ticks}")
        temporary.rename(path)

    def is_alive(self) -> bool:
        return Process.find(self.pid) == self

    def open(self) -> int | None:
        """A pidfd (Linux 5.3) readable once the process has ended; None if it is gone. The caller closes it."""
        try:
            descriptor = os.pidfd_open(self.pid)
        except OSError as error:
            if error.errno in (errno.ESRCH, errno.EINVAL):
                return None
            raise
        # Looked at after the descriptor is ours: the pid cannot be given to another one in between unseen.
        if not self.is_alive():
            os.close(descriptor)
            return None
        return descriptor

    def signal(self, number: int) -> bool:
        """Send a signal; False if the process is gone."""
        descriptor = self.open()
        if descriptor is None:
            return False
        try:
            signal.pidfd_send_signal(descriptor, number)
        except ProcessLookupError:
            return False
        finally:
            os.close(descriptor)
        return True

    def wait(self, timeout_s: float) -> bool:
        """Wait for the end; False if the process still lives after `timeout_s` seconds."""
        descriptor = self.open()
        if descriptor is None:
            return True
        try:
            return bool(readable([descriptor], timeout_s))
        finally:
            os.close(descriptor)


def parent(pid: int) -> int:
    """The parent's pid, 0 if the process is gone or its parent is outside our pid namespace."""
    fields = _stat(pid)
    return 0 if fields is None else int(fields[1])


def note(pid: int, path: Path) -> None:
    """Write down the process that has this pid, if there is one, for `Process.noted`."""
    if (process := Process.find(pid)) is not None:
        process.note(path)


def pid_inside(pid: int) -> int:
    """The pid that a process has in the innermost of its pid namespaces. Raises ProcessGone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError) as error:
        raise ProcessGone(f"process {pid} has ended") from error
    return int(next(line for line in status.splitlines() if line.startswith("NSpid:")).split()[-1])


def command(pid: int) -> str:
    """The command line for people; the name in brackets where there is none, empty if the process is gone."""
    try:
        line = Path(f"/proc/{pid}/cmdline").read_bytes().rstrip(b"\0").replace(b"\0", b" ").decode(errors="replace")
        return line or f"[{Path(f'/proc/{pid}/comm').read_text().strip()}]"
    except (FileNotFoundError, ProcessLookupError):
        return ""


def strangers(init: int, pids: Iterable[int]) -> list[tuple[int, str]]:
    """(pid, command) of those that are not descendants of `init`."""
    known, found = {init}, []
    for pid in pids:
        line = [pid]
        while line[-1] not in known and (above := parent(line[-1])) > 1 and above not in line:
            line.append(above)
        if line[-1] in known:
            known.update(line)
        elif text := command(pid):
            found.append((pid, text))
    return found


def _stat(pid: int) -> list[str] | None:
    """Fields of /proc/PID/stat from the third on (state); the name before it may hold anything."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    return text[text.rindex(")") + 2 :].split()
