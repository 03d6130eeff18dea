"""Programs that are killed, disks that fail and a full one, at known moments of a migration between real agents.

Beside `test_crashes.py`, where the agents die and the link is cut. Each case ends the same: the container runs at
exactly one host, its client has lost nothing, nothing is left at the other, and the next migration works.
"""

import os
import time

import pytest

from tests.lab.crash_kit import NAME, A, B, Crashes
from tests.lab.lab_kit import eventually

pytestmark = [pytest.mark.root, pytest.mark.lab]

# Host, point and what happens there; and whether the container has moved when all is over.
OFTEN = [
    (A, "source.piece", "io 1", False),
    (A, "source.freeze", "kill:criu", False),
    (A, "source.dump", "kill:criu", None),
    (A, "source.freeze", "kill:guard", True),
    (A, "source.journal.release", "io 1", False),
    (A, "source.journal.hear", "io 1", True),
    (B, "destination.sync", "io 1", False),
    (B, "destination.hold", "kill:runc", False),
    (B, "destination.restoring", "kill:restorer", False),
    (B, "destination.ready", "kill:criu", False),
    (B, "destination.released", "kill:criu", False),
    (B, "destination.released", "kill:stand-in", False),
    (B, "destination.complete", "kill:runc", True),
    (B, "destination.journal.own", "io 1", None),
    (B, "destination.run", "kill:fill", True),
]
# With those above in six minutes or so: see CONTRIBUTING.md.
SELDOM = [
    (A, "source.final", "full 1", False),
    (A, "source.journal.finish", "full 2", None),
    (B, "destination.piece", "full 1", False),
    (B, "destination.hold", "kill:restorer", False),
    (B, "destination.hold", "kill:stand-in", False),
    (B, "destination.hold", "kill:conmon", False),
    (B, "destination.hold", "delay", True),
    (B, "destination.mount", "kill:fill", None),
    (B, "destination.restoring", "kill:criu", None),
    (B, "destination.restoring", "kill:runc", False),
    (B, "destination.restoring", "kill:stand-in", False),
    (B, "destination.restore", "kill:criu", False),
    (B, "destination.journal.ready", "io 1", False),
    (B, "destination.ready", "kill:runc", False),
    (B, "destination.ready", "kill:restorer", False),
    (B, "destination.ready", "kill:stand-in", False),
    (B, "destination.released", "kill:runc", False),
    (B, "destination.released", "kill:restorer", False),
    (B, "destination.released", "kill:conmon", False),
    (B, "destination.ready", "kill:conmon", False),
    (B, "destination.released", "kill:fill", True),
    (B, "destination.settle", "io 3", True),
    (B, "destination.journal.finish", "full 2", True),
]
CASES = OFTEN + (SELDOM if os.environ.get("MIGRATOR_FAULT_MATRIX") else [])


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
    ready.lab.migrate(NAME, where, B if where == A else A, "--verify")
