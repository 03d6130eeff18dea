"""Failures on request, for tests of what is left when an agent dies in the middle. Off unless the environment asks.

MIGRATOR_FAULTS names a file that is read whenever the code comes by a `point`; each line of it is a point and what is
to happen there:

    source.final kill           this process dies at once, as by kill -9
    destination.restore fail    an ExecutionError
    source.precopy hang         it waits until the line is gone from the file

The name of each point that struck is appended to the file with `.reached` behind its name.
"""

import os
import signal
import time
from pathlib import Path

from migrator.errors import ExecutionError

HANG_POLL_S = 0.002
HANG_TIMEOUT_S = 60.0

_file = os.environ.get("MIGRATOR_FAULTS", "")


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
    deadline = time.monotonic() + HANG_TIMEOUT_S
    while _asked(file, name) and time.monotonic() < deadline:
        time.sleep(HANG_POLL_S)


def _asked(file: Path, name: str) -> str:
    try:
        lines = [line.split() for line in file.read_text().splitlines()]
    except FileNotFoundError:
        return ""
    return next((words[1] for words in lines if len(words) == 2 and words[0] == name), "")
