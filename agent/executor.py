"""Commands in running containers, by `runc exec`.

runc stays in the foreground: it passes the command's output and its exit code on. A terminal is a pair made here, of
which runc gets one end as its own terminal; it makes the other, inside the container, and copies between the two.
"""

import errno
import fcntl
import json
import os
import signal
import struct
import subprocess
import tempfile
import termios
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from agent.processes import Process
from agent.runtime import Runtime, environment, last_error
from migrator.errors import ExecutionError

CHUNK_BYTES = 64 << 10
HANGUP_S = 1.0
CANNOT_RUN = 126
NOT_FOUND = 127

Sink = Callable[[bytes, bool], None]


class Execution:
    """One command at work; a context manager, whose end ends the command too."""

    def __init__(self, runtime: Runtime, name: str, process: Mapping[str, Any]) -> None:
        """`process` is an OCI process (agent.oci.process). Raises ExecutionError."""
        self._terminal: int | None = None
        self._error_output: int | None = None
        self._write_lock = threading.Lock()
        run = runtime.paths(name).run
        self._folder = tempfile.TemporaryDirectory(prefix="exec-", dir=run)
        folder = Path(self._folder.name)
        self._log, self._pid_file = folder / "log", folder / "pid"
        (folder / "process.json").write_text(json.dumps(process))
        command = ["runc", "--root", str(runtime.root), "--log", str(self._log), "--log-format", "json", "exec"]
        command += ["--process", str(folder / "process.json"), "--pid-file", str(self._pid_file), name]
        try:
            if process.get("terminal"):
                size = process.get("consoleSize", {})
                self._start_on_terminal(command, environment(), size.get("height", 24), size.get("width", 80))
            else:
                self._start_on_pipes(command, environment())
        except OSError as error:
            self._folder.cleanup()
            raise ExecutionError(f"start runc exec: {error}") from error

    def _start_on_pipes(self, command: list[str], environment: Mapping[str, str]) -> None:
        self._process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
            bufsize=0,
        )
        assert self._process.stdin and self._process.stdout and self._process.stderr
        self._input: int | None = self._process.stdin.fileno()
        self._output = self._process.stdout.fileno()
        self._error_output = self._process.stderr.fileno()

    def _start_on_terminal(self, command: list[str], environment: Mapping[str, str], rows: int, columns: int) -> None:
        ours, theirs = os.openpty()
        try:
            _set_size(ours, rows, columns)
            self._process = subprocess.Popen(
                command, env=environment, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True
            )
        except BaseException:
            os.close(ours)
            raise
        finally:
            os.close(theirs)
        self._terminal = self._input = self._output = ours

    def __enter__(self) -> "Execution":
        return self

    def __exit__(self, *_: object) -> None:
        self.hang_up()
        self._folder.cleanup()

    def write(self, data: bytes) -> None:
        """Bytes for the command's standard input; dropped once it has closed that or ended."""
        with self._write_lock:
            view = memoryview(data)
            while view and self._input is not None:
                try:
                    view = view[os.write(self._input, view) :]
                except OSError as error:
                    if error.errno not in (errno.EPIPE, errno.EIO, errno.EBADF):
                        raise
                    return

    def end_input(self) -> None:
        """End of the command's standard input; on a terminal, what its user's ^D is."""
        if self._terminal is not None:
            self.write(b"\x04")
            return
        with self._write_lock:
            if self._process.stdin is not None and self._input is not None:
                self._input = None
                self._process.stdin.close()

    def resize(self, rows: int, columns: int) -> None:
        """Tell the terminal its size; without one, nothing happens."""
        if self._terminal is None or not 0 < rows < 1 << 16 or not 0 < columns < 1 << 16:
            return
        _set_size(self._terminal, rows, columns)
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGWINCH)

    def run(self, sink: Sink) -> int:
        """Pass all output to `sink(data, is_error_output)`, one call at a time, until the command ends.

        Returns its exit code: 128 + signal if it was killed, 126 or 127 if it could not be run.
        """
        lock = threading.Lock()

        def safe_sink(data: bytes, is_error_output: bool) -> None:
            with lock:
                sink(data, is_error_output)

        readers = [threading.Thread(target=_copy, args=(self._output, False, safe_sink), daemon=True)]
        if self._error_output is not None:
            readers.append(threading.Thread(target=_copy, args=(self._error_output, True, safe_sink), daemon=True))
        for reader in readers:
            reader.start()
        code = self._process.wait()
        for reader in readers:
            # A process that it left in the background may hold the pipe open for ever.
            reader.join(HANGUP_S)
        words = last_error(self._log)
        if code != 0 and words and not self._pid_file.exists():
            return NOT_FOUND if "not found" in words or "no such file" in words else CANNOT_RUN
        return 128 - code if code < 0 else code

    def hang_up(self) -> None:
        """End the command and what is in its process group: SIGHUP, after a second SIGKILL. Repeatable."""
        leader = self._leader()
        if self._process.poll() is None:
            if leader is not None:
                _signal_group(leader, signal.SIGHUP)
            try:
                self._process.wait(HANGUP_S)
            except subprocess.TimeoutExpired:
                if leader is not None:
                    _signal_group(leader, signal.SIGKILL)
                self._process.kill()
        self._process.wait()
        with self._write_lock:
            self._input = None
        for stream in (self._process.stdin, self._process.stdout, self._process.stderr):
            if stream is not None:
                stream.close()
        if self._terminal is not None:
            os.close(self._terminal)
            self._terminal = None

    def _leader(self) -> Process | None:
        """The command's first process, of which runc has made a session; waits for runc to have done so."""
        deadline = time.monotonic() + HANGUP_S
        while self._process.poll() is None and time.monotonic() < deadline:
            try:
                text = self._pid_file.read_text()
            except FileNotFoundError:
                text = ""
            if text.isdecimal():
                return Process.find(int(text))
            time.sleep(0.01)
        return None


def _copy(descriptor: int, is_error_output: bool, sink: Sink) -> None:
    while True:
        try:
            data = os.read(descriptor, CHUNK_BYTES)
        except OSError as error:
            # EIO: the last user of the terminal's other end is gone.
            if error.errno in (errno.EIO, errno.EBADF):
                return
            raise
        if not data:
            return
        sink(data, is_error_output)


def _signal_group(leader: Process, number: int) -> None:
    if not leader.is_alive():
        return
    try:
        os.killpg(leader.pid, number)
    except (ProcessLookupError, PermissionError):
        leader.signal(number)


def _set_size(terminal: int, rows: int, columns: int) -> None:
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
