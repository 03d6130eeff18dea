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
from contextlib import ExitStack
from pathlib import Path

from agent.cgroup import Cgroup
from agent.processes import Process
from agent.restorer import CRIU, GIVEN_UP, GO, HOLDING, INHERIT, MOUNTED, RESTORER, RUNC, SAID, VERDICT, Orders
from agent.runtime import Launch
from migrator import faults
from migrator.errors import ExecutionError
from migrator.images import last_errors
from migrator.shm.images import Amended
from migrator.waiting import readable

# Before the freeze: there is time.
WARM_TIMEOUT_S = 120.0
HELD_TIMEOUT_S = 60.0
RUN_TIMEOUT_S = 30.0
TELL_TIMEOUT_S = 1.0
_OVER = "over"

# runc moves what it has started into the control groups of the container. The restorer must not be frozen with it,
# nor its memory count as the container's.
# Its standard streams are those that the container will have.
_STAND_IN = """\
#!/bin/sh
trap 'exit 0' USR1
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
    """The folder of one restore, on a tmpfs, with the pipes to the restorer, and that of CRIU's images.

    The stand-in is in `programs`, on a file system from which programs may be started: /run is often not one.
    """

    def __init__(self, folder: Path, images: Path, programs: Path) -> None:
        self.images = images
        self.programs = programs
        self.configuration = folder / "criu.conf"
        self._folder = folder
        self._said = -1

    def prepare(self, orders: Orders, stdio: Sequence[str], *, lazy: bool) -> None:
        """Write everything. `lazy`: a fill (`migrator.fill`) waits in the work directory."""
        for folder in (self.images, self.programs):
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
            (self._folder / INHERIT).write_text(amended.listed())

    def wait_warm(self, launch: Launch) -> None:
        """Wait until runc waits."""
        self._wait("warm", launch, WARM_TIMEOUT_S)

    def expect_waiting(self) -> None:
        """Raises ExecutionError if one of those who wait has ended."""
        for name, what in ((RUNC, "runc"), (RESTORER, "the restorer"), (CRIU, "CRIU")):
            process = Process.noted(self._folder / name)
            if process is None or not process.is_alive():
                raise ExecutionError(f"{what}, which waited to restore it, has ended or was killed")

    def read_ahead(self) -> None:
        """The volumes are mounted, and the images are there: have it read what will be needed of them."""
        _tell(self._folder / GO, MOUNTED, must_be_heard=False)

    def restore(self, launch: Launch, log: Path) -> None:
        """Let runc and CRIU go on, until every task is restored and held. `log` is CRIU's."""
        self.expect_waiting()
        _tell(self._folder / GO, "go")
        faults.point("destination.restoring")
        try:
            self._wait("held", launch, HELD_TIMEOUT_S)
        except ExecutionError as error:
            raise ExecutionError(f"{error}{last_errors(log)}", reason="RESTORE_FAILED") from error

    def is_held(self) -> bool:
        """Whether the restorer waits for its verdict, also one of an earlier agent's."""
        restorer = Process.noted(self._folder / HOLDING)
        return restorer is not None and restorer.is_alive()

    def let_go(self, launch: Launch | None) -> None:
        """Have CRIU let go of the tasks, which the freezer takes over; their sockets are back on return."""
        if not self.is_held():
            raise ExecutionError("what was to let the restored tasks go has ended")
        if self._said < 0:
            self._open()
        _tell(self._folder / VERDICT, "go")
        self._wait("resumed", launch, RUN_TIMEOUT_S)

    @property
    def is_over(self) -> bool:
        """Whether `end` was called, also by an earlier agent since the host was booted."""
        return (self._folder / _OVER).exists()

    def end(self) -> None:
        """CRIU and runc have ended, and the tasks are complete without them."""
        (self._folder / _OVER).touch()

    def give_up(self) -> None:
        """Have whoever waits end without running anything. Repeatable."""
        if self._folder.is_dir():
            (self._folder / GIVEN_UP).touch()  # for one that has not come as far as to listen
        for name in (GO, VERDICT):
            _tell(self._folder / name, "give-up", must_be_heard=False)
        # They may be in the middle of the restore.
        for name in (RESTORER, CRIU):
            process = Process.noted(self._folder / name)
            if process is not None:
                process.signal(signal.SIGKILL)

    def close(self) -> None:
        """Close the pipe; the folder stays."""
        if self._said >= 0:
            os.close(self._said)
            self._said = -1

    def _open(self) -> None:
        self._said = os.open(self._folder / SAID, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)

    def _wait(self, word: str, launch: Launch | None, timeout_s: float) -> None:
        """Wait for a word from the restorer, or for runc to fail; where an earlier agent has started it, for the end of
        the restorer."""
        deadline = time.monotonic() + timeout_s
        heard = b""
        with ExitStack() as stack:
            ended = self._restorer(stack) if launch is None else launch.fileno()
            while not heard.endswith(b"\n"):
                ready = readable([self._said, ended], deadline - time.monotonic())
                if not ready:
                    raise ExecutionError(f"the restore did not come to {word!r} within {timeout_s:g} s")
                if self._said in ready:
                    heard += os.read(self._said, 1)
                elif launch is not None:
                    launch.result()  # raises: nothing has been restored yet
                    raise ExecutionError(f"runc ended before it said {word!r}")
                else:
                    raise ExecutionError(f"the restorer ended before it said {word!r}")
        if heard.decode().strip() != word:
            raise ExecutionError(f"the restore said {heard.decode().strip()!r} instead of {word!r}")

    def _restorer(self, stack: ExitStack) -> int:
        process = Process.noted(self._folder / HOLDING)
        descriptor = None if process is None else process.open()
        if descriptor is None:
            raise ExecutionError("the restorer that was to let the tasks go has ended")
        stack.callback(os.close, descriptor)
        return descriptor


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
