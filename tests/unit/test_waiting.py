"""Whether a process that is to end still does something."""

import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager

from migrator.waiting import finishes


@contextmanager
def running(*command: str) -> "Iterator[subprocess.Popen[bytes]]":
    with subprocess.Popen(command) as process:
        try:
            yield process
        finally:
            process.kill()


def test_one_that_ends() -> None:
    with running("sleep", "0.3") as process:
        assert finishes(process.pid, 5, 10)
        assert process.wait() == 0
        assert finishes(process.pid, 5, 10)


def test_one_that_is_busy_is_waited_for() -> None:
    with running("sh", "-c", "while :; do :; done") as process:
        began = time.monotonic()
        assert not finishes(process.pid, 0.2, 0.7)
        assert time.monotonic() - began >= 0.7


def test_one_that_does_nothing_is_not() -> None:
    with running("sleep", "60") as process:
        began = time.monotonic()
        assert not finishes(process.pid, 0.2, 30)
        assert time.monotonic() - began < 5
