"""Calls into the kernel that may hang in a way that nothing can interrupt: each has a deadline, and is then left alone.

One that was left alone may still come to its end, and change something that nobody expects any more. So it is undone
then, and until that has happened nothing else is called for the same file system.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from blockdev import stuck
from blockdev.errors import BlockError

# How long a call waits for one before it that was left alone and that undoes itself.
PENDING_S = 1.0


class Overdue(BlockError):
    """The call has not come back; the text names the tasks that hang in the kernel."""


@dataclass
class _Call:
    name: str
    ended: threading.Event = field(default_factory=threading.Event)
    answer: bool = False
    failure: BaseException | None = None
    is_given_up: bool = False


_hanging: dict[Path, _Call] = {}
_lock = threading.Lock()


def call(at: Path, name: str, work: Callable[[], bool], timeout_s: float, undo: Callable[[], object]) -> bool:
    """The answer of `work`, or what it raises. Raises Overdue; `undo` is called if it comes to an end after that.

    `name` is the call's and `at` the mount point's, for the message.
    """
    _wait_for_earlier(at, name)
    made = _Call(name)

    def run() -> None:
        try:
            made.answer = work()
        except BaseException as error:
            made.failure = error
        with _lock:
            made.ended.set()
            if not made.is_given_up:
                return
        try:
            if made.failure is None and made.answer:
                undo()
        finally:
            with _lock:
                del _hanging[at]

    threading.Thread(target=run, name=f"{name} {at}", daemon=True).start()
    if not made.ended.wait(timeout_s):
        with _lock:
            if not made.ended.is_set():
                made.is_given_up = True
                _hanging[at] = made
        if made.is_given_up:
            raise Overdue(f"{name} of {at} has not come back within {timeout_s:g} s; {stuck.words()}")
    if made.failure is not None:
        raise made.failure
    return made.answer


def _wait_for_earlier(at: Path, name: str) -> None:
    with _lock:
        earlier = _hanging.get(at)
    if earlier is None:
        return
    earlier.ended.wait(PENDING_S)
    with _lock:
        still = _hanging.get(at)
    if still is not None:
        raise Overdue(f"{name} of {at}: an earlier {still.name} has still not come back; {stuck.words()}")
