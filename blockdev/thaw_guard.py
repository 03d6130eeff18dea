"""A process that thaws file systems if the one that froze them dies: a frozen file system outlives its freezer.

It is started before the freeze with everything open, and reads a pipe. A line means that there is nothing to do any
more; the end of the pipe without one means that the freezer is dead.

    python -m blockdev.thaw_guard MOUNT_POINT...
"""

import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from blockdev import filesystem
from blockdev.errors import BlockError

READY = b"ready\n"


@contextmanager
def guarding(mount_points: Sequence[Path]) -> Iterator[None]:
    """Freeze these only while the block runs, and thaw them before it ends. Raises BlockError if the guard fails."""
    process = subprocess.Popen(
        [sys.executable, "-m", "blockdev.thaw_guard", *map(str, mount_points)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    with process.stdin as pipe, process.stdout as answers:
        if answers.readline() != READY:
            process.kill()
            process.wait()
            raise BlockError("the process that thaws file systems if this one dies did not start")
        try:
            yield
        finally:
            try:
                pipe.write(b"done\n")
                pipe.flush()
            except BrokenPipeError:
                pass  # it is dead: there is nobody to stand down
            # A late thaw of its would undo somebody else's freeze.
            process.wait()


def main(mount_points: Sequence[str]) -> int:
    """Wait for the freezer's word or its death."""
    sys.stdout.buffer.write(READY)
    sys.stdout.buffer.flush()
    if sys.stdin.buffer.readline():
        return 0
    failed = 0
    for at in mount_points:
        try:
            filesystem.thaw(Path(at))
        except OSError as error:
            print(f"thaw guard: {error}", file=sys.stderr)
            failed = 1
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
