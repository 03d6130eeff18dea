"""A destination with one place, and three containers that want to go there."""

import json
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.lab.lab_kit import Lab, eventually

pytestmark = [pytest.mark.lab, pytest.mark.root]

NAMES = ("queue-1", "queue-2", "queue-3")
# The first one takes some seconds: long enough to look at the others.
SLOWLY = ("--bandwidth", "20MiB/s")


@pytest.fixture
def narrow(lab: Lab) -> Iterator[Lab]:
    """The second host takes one container at once."""
    with lab.configured("host-b", lambda text: f"max_arrivals = 1\n{text}"):
        yield lab


def migrations(lab: Lab) -> dict[str, dict[str, Any]]:
    """Those that have begun last, by container."""
    rows = json.loads(lab.ok("host-a", "migrator", "migrations", "ls", "-o", "json"))
    return {row["container"]: row for row in reversed(rows) if row["container"] in NAMES}


def start_all(lab: Lab) -> None:
    """At host-a."""
    lab.image("host-a", "redis")
    for number, name in enumerate(NAMES):
        address = f"10.77.2.{170 + number}/16"
        lab.start("host-a", name, "redis", "--disk", "1GiB", "--ip", address, command=["sleep", "infinity"])


def test_the_others_wait_in_order(narrow: Lab) -> None:
    lab = narrow
    start_all(lab)
    for name in NAMES:
        lab.ok("host-a", "migrate", name, "host-b", "--detach", *(SLOWLY if name == NAMES[0] else ()))
        if name == NAMES[0]:
            eventually("it is on its way", lambda: bool(lab.ps("host-b")))
        else:
            eventually(f"{name} waits", lambda n=name: migrations(lab)[n]["queue_host"] == "host-b")  # type: ignore[misc]
    waiting = migrations(lab)
    assert [waiting[name]["queue_position"] for name in NAMES] == [None, 1, 2]
    assert [waiting[name]["outcome"] for name in NAMES] == ["running", "queued", "queued"]
    assert "queued (2 at host-b)" in lab.ok("host-a", "migrator", "migrations", "ls")
    # Nothing holds the containers that wait, but a second migration of one is refused.
    assert lab.exec("host-a", NAMES[2], "echo", "free") == "free\n"
    lab.ok("host-a", "migrator", "pause", NAMES[2])
    lab.ok("host-a", "migrator", "resume", NAMES[2])
    again = lab.run("host-a", "migrate", NAMES[2], "host-b")
    assert again.returncode == 9, again.stderr
    most, order = 0, list[str]()
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and len(order) < len(NAMES):
        there = lab.ps("host-b")
        most = max(most, sum(row["state"] == "arriving" for row in there.values()))
        order += [name for name in NAMES if name not in order and there.get(name, {}).get("state") == "running"]
    assert (order, most) == ([*NAMES], 1)
    eventually("all have ended", lambda: {row["outcome"] for row in migrations(lab).values()} == {"migrated"})
    assert all(lab.where(name) == ["host-b"] for name in NAMES)


def test_one_that_waits_can_be_cancelled_and_another_takes_its_place(narrow: Lab) -> None:
    lab = narrow
    start_all(lab)
    lab.ok("host-a", "migrate", NAMES[0], "host-b", "--detach", *SLOWLY)
    eventually("it is on its way", lambda: bool(lab.ps("host-b")))
    for name in NAMES[1:]:
        lab.ok("host-a", "migrate", name, "host-b", "--detach")
        eventually(f"{name} waits", lambda n=name: migrations(lab)[n]["queue_host"] == "host-b")  # type: ignore[misc]
    lab.ok("host-a", "migrator", "migrations", "cancel", migrations(lab)[NAMES[1]]["migration"])
    eventually("it has ended", lambda: migrations(lab)[NAMES[1]]["outcome"] == "cancelled")
    eventually("the last is next", lambda: migrations(lab)[NAMES[2]]["queue_position"] in (1, None))
    eventually("both are there", lambda: lab.where(NAMES[0]) == lab.where(NAMES[2]) == ["host-b"], 60)
    assert lab.where(NAMES[1]) == ["host-a"]
