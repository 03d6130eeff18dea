"""The terminal that a command runs on: its size, raw mode, and that it is always put back as it was."""

import os
import signal
import sys
import termios
import tty
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


def size() -> tuple[int, int]:
    """Rows and columns of the first standard stream that is a terminal; 24 and 80 if none is."""
    for descriptor in (0, 1, 2):
        try:
            columns, rows = os.get_terminal_size(descriptor)
        except OSError:
            continue
        if rows and columns:
            return rows, columns
    return 24, 80


@contextmanager
def passed_through(*, raw: bool, resized: Callable[[], None] | None) -> Iterator[None]:
    """Standard input in raw mode, `resized` called at each SIGWINCH; undone at the end, also at a signal."""
    saved = termios.tcgetattr(0) if raw else None
    handlers = {}
    try:
        for number in (signal.SIGTERM, signal.SIGHUP):
            handlers[number] = signal.signal(number, _leave)
        if resized:
            handlers[signal.SIGWINCH] = signal.signal(signal.SIGWINCH, lambda number, frame: resized())
        if raw:
            tty.setraw(0, termios.TCSADRAIN)
        yield
    finally:
        if saved is not None:
            _restore(saved)
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _restore(saved: list[object]) -> None:
    try:
        termios.tcsetattr(0, termios.TCSADRAIN, saved)  # type: ignore[arg-type]
    except termios.error as error:
        # The terminal is gone: nothing to put back.
        print(f"migrator: the terminal's mode could not be restored: {error}", file=sys.stderr)


def _leave(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)
