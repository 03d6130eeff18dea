"""How far the fill is: a small JSON file, replaced as a whole."""

import enum
import fcntl
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

_GOING_ON, _FINISHED = b"0", b"1"


class State(enum.StrEnum):
    """In this order; the last two are ends."""

    STARTING = "starting"
    READY = "ready"  # CRIU may start
    RESTORING = "restoring"
    FILLING = "filling"
    DONE = "done"
    FAILED = "failed"  # `reason` says what became of the container


@dataclass(frozen=True)
class Status:
    """`left_bytes` is what the store still holds, `restarts` how often the worker had to be started again."""

    state: State
    left_bytes: int = 0
    restarts: int = 0
    reason: str = ""

    def write(self, path: Path) -> None:
        """Replace the file."""
        new = path.with_name(path.name + ".new")
        new.write_text(json.dumps(asdict(self)))
        new.replace(path)

    @classmethod
    def read(cls, path: Path) -> "Status":
        """What the file says; STARTING as long as there is none."""
        try:
            values = json.loads(path.read_text())
        except FileNotFoundError:
            return cls(State.STARTING)
        return cls(State(values["state"]), values["left_bytes"], values["restarts"], values["reason"])


class Hold:
    """A lock beside the status, of this process and of all that are forked from it; and one word that needs no room."""

    def __init__(self, path: Path) -> None:
        self._lock = os.open(_beside(path), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        os.pwrite(self._lock, _GOING_ON, 0)

    def finish(self) -> None:
        """Note that everything was filled: that counts even if nobody can write the status any more."""
        os.pwrite(self._lock, _FINISHED, 0)


def is_held(path: Path) -> bool:
    """Whether somebody is left who may still write the status."""
    try:
        lock = os.open(_beside(path), os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(lock)
    return False


def has_finished(path: Path) -> bool:
    """Whether one that has ended had filled everything."""
    try:
        return _beside(path).read_bytes() == _FINISHED
    except FileNotFoundError:
        return False


def _beside(path: Path) -> Path:
    return path.with_name(path.name + ".lock")
