"""Programs that look after file systems, run to their end."""

import subprocess
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from blockdev.errors import BlockError

TIMEOUT_S = 1800.0
LAST_WORDS = 400

# Around a program while it runs: lets somebody else end it.
Running = Callable[["subprocess.Popen[str]"], AbstractContextManager[Any]]


class ProgramFailed(BlockError):
    """A program ended with a code that says no; the text quotes its last words."""


def run(command: list[str], doing: str, good_codes: Collection[int] = (0,), running: Running | None = None) -> int:
    """The exit code, if it is one of the good ones. Raises ProgramFailed, BlockError."""
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
    except FileNotFoundError as error:
        raise BlockError(f"{doing}: {command[0]} is not installed: run scripts/setup") from error
    with process, (running or (lambda _: nullcontext()))(process):
        try:
            output, _ = process.communicate(timeout=TIMEOUT_S)
        except BaseException as error:
            process.kill()
            if isinstance(error, subprocess.TimeoutExpired):
                raise BlockError(f"{doing}: {command[0]} took longer than {TIMEOUT_S:g} s") from error
            raise
    if process.returncode not in good_codes:
        words = " / ".join(line.strip() for line in output.splitlines() if line.strip())
        raise ProgramFailed(f"{doing}: {command[0]} exited with code {process.returncode}: {words[-LAST_WORDS:]}")
    return process.returncode
