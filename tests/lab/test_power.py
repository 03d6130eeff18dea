"""Hosts that lose their power in the middle of a move, and are booted again: without a human, one copy runs.

These are hosts of the lab: they lose all that runs there and keep their files. tests/vm has disks that lose, too.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest

from tests.lab.crash_kit import ADDRESS, NAME, A, B, Crashes, faults_allowed
from tests.lab.lab_kit import HOSTS, Lab, eventually

pytestmark = [pytest.mark.root, pytest.mark.lab]

# Every answer to a write is a promise: it is on the disk.
DURABLE = ["--appendonly", "yes", "--appendfsync", "always"]


@pytest.fixture(scope="module")
def powered(lab_session: Lab) -> Iterator[Crashes]:
    """Agents with faults allowed, and a Redis that is started again whenever it has ended."""
    with faults_allowed(lab_session) as made:
        options = ["--disk", "1GiB", "--memory", "256MiB", "--restart", "always"]
        lab_session.start_redis(A, NAME, ADDRESS, *options, arguments=DURABLE)
        yield made


@pytest.mark.parametrize(
    ("cut", "host", "point", "ends_at"),
    [
        pytest.param(B, B, "destination.send", A, id="destination-precopy"),
        pytest.param(B, B, "destination.restore", A, id="destination-restored"),
        pytest.param(B, B, "destination.ready", A, id="destination-ready"),
        pytest.param(B, A, "source.released", A, id="destination-released"),
        pytest.param(B, B, "destination.owner", B, id="destination-owner"),
        pytest.param(B, B, "destination.settle", B, id="destination-fill"),
        pytest.param(A, A, "source.precopy", A, id="source-precopy"),
        pytest.param(A, A, "source.final", A, id="source-frozen"),
        pytest.param(A, A, "source.ready", B, id="source-ready"),
        pytest.param(A, A, "source.released", B, id="source-released"),
        pytest.param(A, A, "source.owner", B, id="source-owner"),
        pytest.param(A, A, "source.finish", B, id="source-finish"),
    ],
)
def test_power_cut(powered: Crashes, cut: str, host: str, point: str, ends_at: str) -> None:
    lab = powered.lab
    _fresh_at_a(powered)
    promised = 0
    for _ in range(5):
        promised = int(lab.redis(ADDRESS, "incr", "counter"))
    powered.ask(host, point, "hang")
    # A copy that goes on with its memory has its connections, too.
    client: AbstractContextManager[Any] = nullcontext() if cut == ends_at else powered.counting()
    with client, powered.migrating(A, B):
        eventually("it got there", lambda: powered.reached(host, point), 30)
        lab.lab("power-cut", cut)
        lab.lab("boot", cut)
        powered.forget()
        assert powered.settled() == ends_at
    eventually("it answers", lambda: "PONG" in lab.client("redis-cli", "-h", ADDRESS, "ping").stdout)
    assert powered.counter() >= promised, "what was acknowledged is lost"
    lab.ok(ends_at, "migrator", "volume", "check", NAME)
    lost = lab.ps(ends_at)[NAME]["lost"]
    assert bool(lost) == (cut == ends_at), f"the loss is told as {lost}"


def test_both_lose_their_power(powered: Crashes) -> None:
    """Between the release and the commit: what is left is a disk at each host, and one of them counts."""
    lab = powered.lab
    _fresh_at_a(powered)
    promised = int(lab.redis(ADDRESS, "incr", "counter"))
    powered.ask(A, "source.released", "hang")
    with powered.migrating(A, B):
        eventually("it got there", lambda: powered.reached(A, "source.released"), 30)
        for host in HOSTS:
            lab.lab("power-cut", host)
    powered.boot_all()
    assert powered.settled() == A
    eventually("it answers", lambda: "PONG" in lab.client("redis-cli", "-h", ADDRESS, "ping").stdout)
    assert powered.counter() >= promised
    assert lab.ps(A)[NAME]["lost"]


def test_a_reboot_brings_back_what_should_run(lab: Lab) -> None:
    """By its restart policy; what has moved away stays there."""
    addresses = {"always": "10.77.2.151", "once": "10.77.2.152", "moved": "10.77.2.153"}
    for name, address in addresses.items():
        policy = [] if name == "once" else ["--restart", "always"]
        lab.start_redis(A, name, address, "--disk", "1GiB", *policy, arguments=DURABLE)
        lab.redis(address, "set", "key", name)
    lab.migrate("moved", A, B)
    with lab.counting(addresses["moved"]) as report:
        lab.lab("power-cut", A)
        lab.lab("boot", A)
        eventually("it runs", lambda: lab.ps(A)["always"]["state"] == "running")
    assert report["same_connection"]
    found = lab.ps(A)
    assert {name: (found[name]["state"], bool(found[name]["lost"])) for name in addresses if name in found} == {
        "always": ("running", True),
        "once": ("stopped", True),
    }
    assert lab.where("moved") == [B]
    lab.ok(A, "migrator", "start", "once")
    assert not lab.ps(A)["once"]["lost"]
    for name, address in addresses.items():
        answers = ("redis-cli", "-h", address, "get", "key")
        eventually(f"{name} has its key", lambda a=answers, n=name: lab.client(*a).stdout.strip() == n)  # type: ignore[misc]


def _fresh_at_a(powered: Crashes) -> None:
    """It runs at host-a, and nothing is told of what it has lost before."""
    lab = powered.lab
    powered.forget()
    (where,) = lab.where(NAME)
    if where != A:
        lab.migrate(NAME, where, A)
    lab.ok(A, "migrator", "stop", NAME)
    lab.ok(A, "migrator", "start", NAME)
    eventually("it answers", lambda: "PONG" in lab.client("redis-cli", "-h", ADDRESS, "ping").stdout)
