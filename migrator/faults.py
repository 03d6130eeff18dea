"""Failures on request, for tests of what is left when something dies in the middle. Off unless the environment asks.

MIGRATOR_FAULTS names a file that is read whenever the code comes by a `point`; each line of it is a point, what is to
happen there, and perhaps how often, every time unless that is said:

    source.final kill           this process dies at once, as by kill -9
    source.dump kill:criu       a process of that program of this host does (`PROGRAMS`)
    destination.restore fail    an ExecutionError
    journal.release io 1        an OSError as of a disk that fails (EIO), once
    destination.piece full      the same as of a disk that is full (ENOSPC)
    source.precopy hang         it waits until the line is gone from the file
    destination.hold delay      it waits for a quarter of a second

The name of each point that struck is appended to the file with `.reached` behind its name.
"""

import errno
import os
import signal
import time
from collections import Counter
from pathlib import Path

from migrator.errors import ExecutionError

HANG_POLL_S = 0.002
HANG_TIMEOUT_S = 60.0
DELAY_S = 0.25
# What a program is known by: the end of its command's first word, and what is in some of its words. The stand-in and
# the restorer are between runc and CRIU (`agent.restorer`).
PROGRAMS = {
    "conmon": ("conmon", ()),
    "criu": ("", ("/criu", "swrk")),
    "fill": ("", ("migrator.fill",)),
    "guard": ("", ("agent.guard",)),
    "restorer": ("", ("agent.restorer",)),
    "runc": ("runc", ()),
    "stand-in": ("sh", ("/programs/criu",)),
}
# CRIU, once it knows what it is to do, calls itself so.
WORKING_CRIU = "criu: "
# The newest of a program's processes, but of these the oldest: what they start looks like them, or is the container.
OLDEST = ("criu", "restorer")
ERRORS = {"io": errno.EIO, "full": errno.ENOSPC}

_file = os.environ.get("MIGRATOR_FAULTS", "")
_struck: Counter[tuple[str, int]] = Counter()


def point(name: str) -> None:
    """A moment at which a test may have something go wrong. Costs nothing where no test has asked."""
    if _file:
        _strike(Path(_file), name)


def _strike(file: Path, name: str) -> None:
    action = _asked(file, name)
    if not action:
        return
    with file.with_name(file.name + ".reached").open("a") as reached:
        reached.write(f"{name}\n")
    if action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if action == "fail":
        raise ExecutionError(f"{name} fails as {file} asks for")
    if action in ERRORS:
        raise OSError(ERRORS[action], f"{os.strerror(ERRORS[action])}, as {file} asks for", name)
    if action.startswith("kill:"):
        _kill(action.removeprefix("kill:"))
    if action == "delay":
        time.sleep(DELAY_S)
    if action == "hang":
        deadline = time.monotonic() + HANG_TIMEOUT_S
        while _asked(file, name, counts=False) and time.monotonic() < deadline:
            time.sleep(HANG_POLL_S)


def _asked(file: Path, name: str, *, counts: bool = True) -> str:
    """What is to happen there now."""
    try:
        asked_at = file.stat().st_mtime_ns
        lines = [line.split() for line in file.read_text().splitlines()]
    except FileNotFoundError:
        return ""
    found = next((words for words in lines if len(words) in (2, 3) and words[0] == name), None)
    if found is None:
        return ""
    if counts:
        key = (" ".join(found), asked_at)
        _struck[key] += 1
        if len(found) == 3 and _struck[key] > int(found[2]):
            return ""
    return found[1]


def _kill(program: str) -> None:
    """One process of a program; none is no failure."""
    ages: list[tuple[int, int]] = []
    for folder in Path("/proc").iterdir():
        if not folder.name.isdecimal():
            continue
        try:
            words = (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")
            began = int((folder / "stat").read_text().rpartition(")")[2].split()[19])
        except (FileNotFoundError, ProcessLookupError):
            continue
        if _is(program, words) and not (program == "criu" and _is("stand-in", words)):
            ages.append((began, int(folder.name)))
    if ages:
        _, victim = min(ages) if program in OLDEST else max(ages)
        os.kill(victim, signal.SIGKILL)


def _is(program: str, words: list[str]) -> bool:
    first, parts = PROGRAMS[program]
    if program == "criu" and any(WORKING_CRIU in word for word in words):
        return True
    return words[0].endswith(first) and all(any(part in word for word in words) for part in parts)
