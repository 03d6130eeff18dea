"""How far the fill is: a small JSON file, replaced as a whole."""

import enum
import fcntl
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path


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


def hold(path: Path) -> None:
    """Until this process and all that are forked from it have ended, `is_held` for the status that they write there."""
    fcntl.flock(_lock(path), fcntl.LOCK_EX)


def is_held(path: Path) -> bool:
    """Whether somebody is left who may still write the status."""
    lock = _lock(path)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(lock)
    return False


def _lock(path: Path) -> int:
    return os.open(path.with_name(path.name + ".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
