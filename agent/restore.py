"""A restore in two steps: runc starts before the freeze and waits, CRIU restores and waits with every task held.

runc restores with the `criu` that it finds on its PATH. A stand-in there lets runc's first question (CRIU's version)
pass and then keeps it until `go`, so that runc's start costs nothing inside the freeze. CRIU reads a configuration file
that names an action script (criu.org/Action_scripts); at post-restore, before any task has run, the script says `held`
and waits for its verdict. Anything but `run` makes CRIU kill what it has restored.

The script keeps its end of the pipes open by itself: it survives the agent, and the next one can speak to it.
"""

import errno
import json
import os
import select
import shlex
import signal
import time
from collections.abc import Sequence
from pathlib import Path

from agent.processes import Process, command
from agent.runtime import Launch
from migrator.errors import ExecutionError
from migrator.images import last_errors
from migrator.shm.images import Amended

WARM_TIMEOUT_S = 20.0
HELD_TIMEOUT_S = 20.0
RUN_TIMEOUT_S = 30.0
TELL_TIMEOUT_S = 1.0

_STAND_IN = """\
#!/bin/sh
cd {folder} || exit 1
if mkdir asked 2>/dev/null; then
    echo $$ >asked/pid
    {criu} "$@"
    status=$?
    echo warm >said
    read -r word <go
    [ "$word" = go ] || exit 1
    exit $status
fi
[ -e inherit ] && exec bash ./inherit {criu} "$@"
exec {criu} "$@"
"""

_HOOK = """\
#!/bin/sh
cd {folder} || exit 1
case $CRTOOLS_SCRIPT_ACTION in
post-restore)
    echo $$ >hook.pid
    exec 3<>verdict 4<>said
    echo held >&4
    read -r word <&3
    [ "$word" = run ]
    ;;
pre-resume)
    {freeze}
    exec 4<>said
    echo resuming >&4
    ;;
post-resume)
    exec 4<>said
    echo running >&4
    ;;
esac
"""

_CRIU_CONFIGURATION = """\
action-script {hook}
file-locks
file-validation filesize
ghost-limit 1G
link-remap
manage-cgroups=ignore
network-lock skip
tcp-established
"""


class HeldRestore:
    """The folder of one restore, on a tmpfs: CRIU's images, and the pipes to the stand-in and the script.

    These are in `programs`, on a file system from which programs may be started: /run is often not one.
    """

    def __init__(self, folder: Path, programs: Path) -> None:
        self.images = folder / "images"
        self.programs = programs
        self.configuration = folder / "criu.conf"
        self._folder = folder
        self._said = -1

    def prepare(self, criu: str, stdio: Sequence[str], freeze: str, *, lazy: bool) -> None:
        """Write everything. `freeze` is a shell command for the moment before the tasks run, `:` for none.

        `lazy`: a fill (`migrator.fill`) waits in the work directory.
        """
        for folder in (self._folder, self.images, self.programs):
            folder.mkdir(parents=True, mode=0o700)
        quoted = shlex.quote(str(self._folder))
        hook = self.programs / "hook"
        _write_script(self.programs / "criu", _STAND_IN.format(folder=quoted, criu=shlex.quote(criu)))
        _write_script(hook, _HOOK.format(folder=quoted, freeze=freeze))
        lines = _CRIU_CONFIGURATION.format(hook=hook) + ("lazy-pages\n" if lazy else "")
        self.configuration.write_text(lines)
        (self.images / "descriptors.json").write_text(json.dumps(list(stdio)))
        for name in ("said", "go", "verdict"):
            os.mkfifo(self._folder / name, 0o600)
        self._said = os.open(self._folder / "said", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)

    def inherit(self, amended: Amended) -> None:
        """Have CRIU inherit these, which this process holds open until every task is restored."""
        if amended.inherited:
            with self.configuration.open("a") as configuration:
                configuration.write(amended.options())
            (self._folder / "inherit").write_text(amended.script())

    def wait_warm(self, launch: Launch) -> None:
        """Wait until runc waits."""
        self._wait("warm", launch, WARM_TIMEOUT_S)

    def restore(self, launch: Launch, log: Path) -> None:
        """Let runc and CRIU go on, until every task is restored and held. `log` is CRIU's."""
        _tell(self._folder / "go", "go")
        try:
            self._wait("held", launch, HELD_TIMEOUT_S)
        except ExecutionError as error:
            raise ExecutionError(f"{error}{last_errors(log)}", reason="RESTORE_FAILED") from error

    def is_held(self) -> bool:
        """Whether the script waits for its verdict, also one that an earlier agent has started."""
        return self._process("hook.pid", self.programs / "hook") is not None

    def _process(self, pid_file: str, script: Path) -> Process | None:
        """The process that has noted its pid there, if it still runs that script."""
        try:
            pid = int((self._folder / pid_file).read_text())
        except (FileNotFoundError, ValueError):
            return None
        return Process.find(pid) if str(script) in command(pid) else None

    def resume(self, launch: Launch | None) -> None:
        """Let the tasks go on; returns when their sockets are back, just before the first of them runs."""
        if self._said < 0:
            self._said = os.open(self._folder / "said", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        _tell(self._folder / "verdict", "run")
        self._wait("resuming", launch, RUN_TIMEOUT_S)

    def wait_running(self, launch: Launch | None) -> None:
        """Wait until CRIU has let go of every task."""
        self._wait("running", launch, RUN_TIMEOUT_S)

    def give_up(self) -> None:
        """Have whoever waits end without running anything. Repeatable."""
        for name in ("go", "verdict"):
            _tell(self._folder / name, "give-up", must_be_heard=False)
        # The stand-in may not have come as far as to listen.
        stand_in = self._process("asked/pid", self.programs / "criu")
        if stand_in is not None:
            stand_in.signal(signal.SIGKILL)

    def close(self) -> None:
        """Close the pipe; the folder stays."""
        if self._said >= 0:
            os.close(self._said)
            self._said = -1

    def _wait(self, word: str, launch: Launch | None, timeout_s: float) -> None:
        """Wait for a word from the scripts, or for runc to fail."""
        deadline = time.monotonic() + timeout_s
        heard = b""
        watched = [self._said] if launch is None else [self._said, launch.fileno()]
        while not heard.endswith(b"\n"):
            ready = select.select(watched, [], [], max(0.0, deadline - time.monotonic()))[0]
            if self._said in ready:
                heard += os.read(self._said, 1)
            elif launch is not None and ready:
                launch.result()  # raises: nothing has been restored yet
                raise ExecutionError(f"runc ended before it said {word!r}")
            else:
                raise ExecutionError(f"the restore did not come to {word!r} within {timeout_s:g} s")
        if heard.decode().strip() != word:
            raise ExecutionError(f"the restore said {heard.decode().strip()!r} instead of {word!r}")


def _write_script(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o700)


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
