"""Starting the fill, and following it: what the destination of a migration uses."""

import os
import subprocess
import sys
import time
from collections.abc import Callable

from migrator.errors import ExecutionError
from migrator.fill.keeper import Places
from migrator.fill.status import State, Status

LOG = "fill.log"


def launch(
    places: Places, started: Callable[[int], None] = lambda _: None, timeout_s: float = 120.0
) -> "subprocess.Popen[bytes]":
    """Start the fill and return it once `criu restore --lazy-pages` may start with the same work directory.

    It is in a session of its own and outlives this process. It takes about 0.2 s: before the freeze. The images need
    not be there yet. `started` is told its pid at once. SIGTERM ends it as long as no restore has begun. Raises
    ExecutionError if it does not come up.
    """
    places.status.unlink(missing_ok=True)
    log = os.open(places.work / LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    arguments = [f"--{name}={getattr(places, name)}" for name in ("images", "store", "work", "status")]
    try:
        process = subprocess.Popen(
            [sys.executable, "-m", "migrator.fill", *arguments, *(f"--cgroup={group}" for group in places.cgroups)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    finally:
        os.close(log)
    started(process.pid)
    deadline = time.monotonic() + timeout_s
    while Status.read(places.status).state == State.STARTING:
        ended = process.poll() is not None
        if ended or time.monotonic() > deadline:
            process.kill()
            process.wait()
            # The log goes when the arrival is undone.
            said = " / ".join((places.work / LOG).read_text(errors="replace").splitlines()[-3:])
            why = f"it ended with code {process.returncode}" if ended else f"it was not ready within {timeout_s:g} s"
            raise ExecutionError(f"the memory fill did not start: {why}{said and f'; it said: {said}'}")
        time.sleep(0.002)
    return process
