"""Programs that look after file systems, run to their end."""

import subprocess
from collections.abc import Collection

from blockdev.errors import BlockError

TIMEOUT_S = 1800.0
LAST_WORDS = 400


class ProgramFailed(BlockError):
    """A program ended with a code that says no; the text quotes its last words."""


def run(command: list[str], doing: str, good_codes: Collection[int] = (0,)) -> int:
    """The exit code, if it is one of the good ones. Raises ProgramFailed, BlockError."""
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=TIMEOUT_S,
            check=False,
            text=True,
            errors="replace",
        )
    except FileNotFoundError as error:
        raise BlockError(f"{doing}: {command[0]} is not installed: run scripts/setup") from error
    except subprocess.TimeoutExpired as error:
        raise BlockError(f"{doing}: {command[0]} took longer than {TIMEOUT_S:g} s") from error
    if done.returncode not in good_codes:
        words = " / ".join(line.strip() for line in done.stdout.splitlines() if line.strip())
        raise ProgramFailed(f"{doing}: {command[0]} exited with code {done.returncode}: {words[-LAST_WORDS:]}")
    return done.returncode
