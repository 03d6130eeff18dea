"""Agents that are killed and links that are cut in every phase of a migration, by `migrator.faults` at known moments.

Each case ends the same: the container runs at exactly one host, its client has lost nothing, the other host has nothing
of it, and the next migration works. What the client sees is the measure of how soon a container runs on.
"""

import time
from typing import Any

import pytest

from tests.lab.crash_kit import NAME, A, B, Crashes
from tests.lab.lab_kit import HOSTS, eventually

pytestmark = [pytest.mark.root, pytest.mark.lab]

# The point where the agent dies, and whether the container has moved when all is over.
SOURCE_DIES = [
    ("source.prepare", False),
    ("source.precopy", False),
    ("source.freeze", False),
    ("source.dump", False),
    ("source.final", False),
    ("source.ready", False),
    ("source.released", True),
    ("source.owner", True),
    ("source.finish", True),
]
DESTINATION_DIES = [
    ("destination.prepare", False),
    ("destination.send", False),
    ("destination.hold", False),
    ("destination.restoring", False),
    ("destination.restore", False),
    ("destination.ready", False),
    ("destination.released", True),
    ("destination.complete", True),
    ("destination.owner", True),
    ("destination.run", True),
]


@pytest.mark.parametrize(("point", "moved"), SOURCE_DIES)
def test_source_agent_dies(ready: Crashes, point: str, moved: bool) -> None:
    ready.ask(A, point, "kill")
    with ready.counting() as seen, ready.migrating(A, B):
        eventually("the agent died", lambda: ready.reached(A, point) and not ready.agent_runs(A), 30)
        if not moved:
            # The guard alone brings it back, without the agent.
            value = ready.counter()
            eventually("it counts on without the agent", lambda: ready.counter() > value, 3)
        ready.forget()
        where = ready.settled(moved=moved)
    if not moved:
        assert seen["longest_ms"] < 1500, seen
    print(f"{point}: at {where}, longest gap {seen['longest_ms']:.0f} ms")
    ready.lab.migrate(NAME, where, B if where == A else A, "--verify")


@pytest.mark.parametrize(("point", "moved"), DESTINATION_DIES)
def test_destination_agent_dies(ready: Crashes, point: str, moved: bool) -> None:
    ready.ask(B, point, "kill")
    with ready.counting() as seen, ready.migrating(A, B):
        eventually("the agent died", lambda: ready.reached(B, point) and not ready.agent_runs(B), 30)
        if not moved:
            value = ready.counter()
            eventually("it counts on at the source", lambda: ready.counter() > value, 3)
        ready.forget()
        where = ready.settled(moved=moved)
    if not moved:
        assert seen["longest_ms"] < 1500, seen
    print(f"{point}: at {where}, longest gap {seen['longest_ms']:.0f} ms")
    ready.lab.migrate(NAME, where, B if where == A else A)


@pytest.mark.parametrize(
    ("host", "point", "moved"),
    [
        # Nothing waits yet: a cut as short as this one may be outlasted.
        (B, "destination.prepare", None),
        (A, "source.precopy", None),
        (B, "destination.hold", False),
        (B, "destination.restore", False),
        (B, "destination.ready", False),
        (B, "destination.released", True),
        (B, "destination.owner", True),
    ],
)
def test_link_is_cut(ready: Crashes, host: str, point: str, moved: bool | None) -> None:
    """The destination's link: the client reaches the container at the source all the time."""
    ready.ask(host, point, "hang")
    with ready.counting() as seen, ready.migrating(A, B):
        eventually("it got there", lambda: ready.reached(host, point), 30)
        ready.lab.lab("cut", B)
        ready.forget()
        if moved:
            time.sleep(3)
        else:
            value = ready.counter()
            eventually("it counts on at the source", lambda: ready.counter() > value, 10)
            time.sleep(1)
        ready.lab.lab("heal", B)
        where = ready.settled(moved=moved)
    print(f"cut at {point}: at {where}, longest gap {seen['longest_ms']:.0f} ms")
    ready.lab.migrate(NAME, where, B if where == A else A)


@pytest.mark.parametrize(
    "point", ["destination.prepare", "destination.send", "destination.hold", "destination.restore", "destination.ready"]
)
def test_cancelled(ready: Crashes, point: str) -> None:
    ready.ask(B, point, "hang")
    with ready.counting() as seen, ready.migrating(A, B) as migrate:
        eventually("it got there", lambda: ready.reached(B, point), 30)
        (migration,) = [row["migration"] for row in ready.lab.ps(A).values()]
        began = time.monotonic()
        ready.lab.ok(A, "migrator", "migrations", "cancel", migration)
        value = ready.counter()
        eventually("it counts on", lambda: ready.counter() > value, 3)
        took = time.monotonic() - began
        ready.forget()
        out, err = migrate.communicate(timeout=30)
        assert migrate.returncode == 130, (out, err)
        ready.settled(moved=False)
    print(f"cancelled at {point}: {took * 1000:.0f} ms with three commands, longest gap {seen['longest_ms']:.0f} ms")
    ready.lab.migrate(NAME, A, B)


def test_source_gone_for_good(ready: Crashes) -> None:
    """Nothing was promised yet: the destination cleans up by itself."""
    ready.ask(A, "source.precopy", "kill")
    with ready.migrating(A, B):
        eventually("the agent died", lambda: not ready.agent_runs(A), 30)
        eventually("nothing is left", lambda: not ready.lab.leftovers(B), 60)
    ready.forget()
    ready.settled(moved=False)


def test_restart_disturbs_nothing(ready: Crashes) -> None:
    with ready.counting() as seen:
        for host in HOSTS:
            ready.lab.lab("kill", host)
            ready.lab.lab("start", host)
        ready.settled(moved=False)
    assert seen["longest_ms"] < 200, seen


@pytest.mark.parametrize(
    ("host", "point"),
    [
        (A, "source.freeze"),
        (A, "source.dump"),
        (A, "source.final"),
        (B, "destination.hold"),
        (B, "destination.restore"),
        (A, "source.ready"),
    ],
)
def test_failure_in_the_freeze(ready: Crashes, host: str, point: str) -> None:
    """It goes on at once: what the client notices is the freeze as far as it came, and the way back."""
    ready.ask(host, point, "fail")
    with ready.counting() as seen:
        code, report = ready.lab.try_migrate(NAME, A, B)
        assert (code, report["outcome"], report["where_running"]) == (6, "rolled_back", A), report
        assert point in report["error"]["message"]
        ready.forget()
        ready.settled(moved=False)
    print(f"{point}: failed, longest gap {seen['longest_ms']:.0f} ms, {notes(report)}")
    assert seen["longest_ms"] < 1500, seen


def notes(report: dict[str, Any]) -> str:
    return ", ".join(note for note in report["notes"] if note.startswith("rolled back"))
