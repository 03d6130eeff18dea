"""Programs that are killed, disks that fail and a full one, at known moments of a migration between real agents.

Beside `test_crashes.py`, where the agents die and the link is cut. Each case ends the same: the container runs at
exactly one host, its client has lost nothing, nothing is left at the other, and the next migration works.
"""

import time

import pytest

from tests.lab.crash_kit import NAME, A, B, Crashes
from tests.lab.lab_kit import eventually

pytestmark = [pytest.mark.root, pytest.mark.lab]

# Host, point and what happens there; and whether the container has moved when all is over.
CASES = [
    (A, "source.piece", "io 1", False),
    (A, "source.freeze", "kill:criu", False),
    (A, "source.dump", "kill:criu", None),
    (A, "source.freeze", "kill:guard", True),
    (A, "source.final", "full 1", False),
    (A, "source.journal.release", "io 1", False),
    (A, "source.journal.hear", "io 1", True),
    (A, "source.journal.finish", "full 2", None),
    (B, "destination.piece", "full 1", False),
    (B, "destination.sync", "io 1", False),
]


@pytest.mark.parametrize(("host", "point", "action", "moved"), CASES, ids=[f"{p}-{a}" for _, p, a, _ in CASES])
def test_something_fails(ready: Crashes, host: str, point: str, action: str, moved: bool | None) -> None:
    ready.ask(host, point, action)
    with ready.counting() as seen, ready.migrating(A, B) as migrate:
        eventually("it got there", lambda: ready.reached(host, point), 30)
        began = time.monotonic()
        migrate.communicate(timeout=60)
        ready.forget()
        where = ready.settled(moved=moved)
    print(f"{point} {action}: at {where} after {time.monotonic() - began:.1f} s, gap {seen['longest_ms']:.0f} ms")
    ready.lab.migrate(NAME, where, B if where == A else A)
