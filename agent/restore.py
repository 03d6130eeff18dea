"""A restore in two steps: runc has started before the freeze and waits, CRIU restores and waits with every task held.

runc restores with the `criu` that it finds on its PATH. There is a stand-in, the start of `agent.restorer`.
"""

import errno
import json
import os
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from agent.cgroup import Cgroup
from agent.processes import Process
from agent.restorer import GIVEN_UP, GO, HOLDING, INHERIT, RESTORER, RESTORING, SAID, VERDICT, Orders
from agent.runtime import Launch
from migrator.errors import ExecutionError
from migrator.images import last_errors
from migrator.shm.images import Amended
from migrator.waiting import readable

# Before the freeze: there is time.
WARM_TIMEOUT_S = 120.0
HELD_TIMEOUT_S = 20.0
RUN_TIMEOUT_S = 30.0
TELL_TIMEOUT_S = 1.0

# runc moves what it has started into the control groups of the container. The restorer must not be frozen with it,
# nor its memory count as the container's.
_STAND_IN = """\
#!/bin/sh
(
    {leave}
    exec {python} -I -m agent.restorer {folder} "$@"
) &
wait $!
"""

_CRIU_CONFIGURATION = """\
file-locks
file-validation filesize
ghost-limit 1G
link-remap
manage-cgroups=ignore
network-lock skip
tcp-established
"""


class HeldRestore:
    """The folder of one restore, on a tmpfs: CRIU's images, and the pipes to the restorer.

    The stand-in is in `programs`, on a file system from which programs may be started: /run is often not one.
    """

    def __init__(self, folder: Path, programs: Path) -> None:
        self.images = folder / "images"
        self.programs = programs
        self.configuration = folder / "criu.conf"
        self._folder = folder
        self._said = -1

    def prepare(self, orders: Orders, stdio: Sequence[str], *, lazy: bool) -> None:
        """Write everything. `lazy`: a fill (`migrator.fill`) waits in the work directory."""
        for folder in (self._folder, self.images, self.programs):
            folder.mkdir(parents=True, mode=0o700)
        orders.write(self._folder)
        stand_in = self.programs / "criu"
        stand_in.write_text(
            _STAND_IN.format(
                leave="\n    ".join(f"echo 0 >{shlex.quote(str(path))}" for path in Cgroup(orders.watchers).doors()),
                python=shlex.quote(sys.executable),
                folder=shlex.quote(str(self._folder)),
            )
        )
        stand_in.chmod(0o700)
        self.configuration.write_text(_CRIU_CONFIGURATION + ("lazy-pages\n" if lazy else ""))
        (self.images / "descriptors.json").write_text(json.dumps(list(stdio)))
        for name in (SAID, GO, VERDICT):
            os.mkfifo(self._folder / name, 0o600)
        self._open()

    def inherit(self, amended: Amended) -> None:
        """Have CRIU inherit these, which this process holds open until every task is restored."""
        if amended.inherited:
            with self.configuration.open("a") as configuration:
                configuration.write(amended.options())
            (self._folder / INHERIT).write_text(amended.script())

    def wait_warm(self, launch: Launch) -> None:
        """Wait until runc waits."""
        self._wait("warm", launch, WARM_TIMEOUT_S)

    def restore(self, launch: Launch, log: Path) -> None:
        """Let runc and CRIU go on, until every task is restored and held. `log` is CRIU's."""
        _tell(self._folder / GO, "go")
        try:
            self._wait("held", launch, HELD_TIMEOUT_S)
        except ExecutionError as error:
            raise ExecutionError(f"{error}{last_errors(log)}", reason="RESTORE_FAILED") from error

    def is_held(self) -> bool:
        """Whether the restorer waits for its verdict, also one of an earlier agent's, and CRIU with it.

        If CRIU alone is dead the restorer waits on, and so do the tasks, but nobody would ever let them go.
        """
        noted = [Process.noted(self._folder / name) for name in (HOLDING, RESTORING)]
        return all(process is not None and process.is_alive() for process in noted)

    def resume(self, launch: Launch | None) -> None:
        """Let the tasks go on; returns when their sockets are back, just before the first of them runs."""
        if self._said < 0:
            self._open()
        _tell(self._folder / VERDICT, "run")
        self._wait("resuming", launch, RUN_TIMEOUT_S)

    def give_up(self) -> None:
        """Have whoever waits end without running anything. Repeatable."""
        if self._folder.is_dir():
            (self._folder / GIVEN_UP).touch()  # for one that has not come as far as to listen
        for name in (GO, VERDICT):
            _tell(self._folder / name, "give-up", must_be_heard=False)
        # It may be in the middle of the restore.
        restorer = Process.noted(self._folder / RESTORER)
        if restorer is not None:
            restorer.signal(signal.SIGKILL)

    def close(self) -> None:
        """Close the pipe; the folder stays."""
        if self._said >= 0:
            os.close(self._said)
            self._said = -1

    def _open(self) -> None:
        self._said = os.open(self._folder / SAID, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)

    def _wait(self, word: str, launch: Launch | None, timeout_s: float) -> None:
        """Wait for a word from the restorer, or for runc to fail."""
        deadline = time.monotonic() + timeout_s
        heard = b""
        watched = [self._said] if launch is None else [self._said, launch.fileno()]
        while not heard.endswith(b"\n"):
            ready = readable(watched, deadline - time.monotonic())
            if self._said in ready:
                heard += os.read(self._said, 1)
            elif launch is not None and ready:
                launch.result()  # raises: nothing has been restored yet
                raise ExecutionError(f"runc ended before it said {word!r}")
            else:
                raise ExecutionError(f"the restore did not come to {word!r} within {timeout_s:g} s")
        if heard.decode().strip() != word:
            raise ExecutionError(f"the restore said {heard.decode().strip()!r} instead of {word!r}")


def _tell(pipe: Path, word: str, *, must_be_heard: bool = True) -> None:
    deadline = time.monotonic() + (TELL_TIMEOUT_S if must_be_heard else 0)
    while True:
        try:
            descriptor = os.open(pipe, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            break
        except OSError as error:
            # ENXIO: the reader has said that it will wait, and is about to open its end.
            if must_be_heard and error.errno == errno.ENXIO and time.monotonic() < deadline:
                time.sleep(0.001)
                continue
            if must_be_heard:
                raise ExecutionError(f"nobody waits for {word!r} at {pipe.name}: {error.strerror}") from error
            return
    try:
        os.write(descriptor, f"{word}\n".encode())
    finally:
        os.close(descriptor)
