"""Killing everything in control groups (cgroups(7))."""

import contextlib
import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path

_PATIENCE_S = 5.0


def kill_all(groups: Sequence[Path]) -> list[int]:
    """Kill all processes of groups and of those below them, and wait until they are gone. Gives those that stay."""
    deadline = time.monotonic() + _PATIENCE_S
    for group in groups:
        if (switch := group / "cgroup.kill").exists():  # cgroup v2, Linux 5.14
            switch.write_text("1")
    while True:
        left = [pid for group in groups for pid in _processes(group)]
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(0.002)


def end_lost(groups: Sequence[Path], reason: str) -> str:
    """Kill a container whose memory is lost. Gives the reason, with what became of it."""
    left = kill_all(groups)
    return f"{reason}; the container was killed" + (f", but for processes {left}" if left else "")


def _processes(group: Path) -> list[int]:
    try:
        lists = [path.read_text() for path in group.rglob("cgroup.procs")]
    except FileNotFoundError:
        return _processes(group) if group.exists() else []
    # 0 is a process that this pid namespace does not see.
    return [int(pid) for text in lists for pid in text.split() if pid != "0"]
