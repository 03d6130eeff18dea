"""How far the fill is: a small JSON file, replaced as a whole."""

import enum
import json
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
