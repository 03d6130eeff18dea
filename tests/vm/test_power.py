"""Power cuts in the middle of a move: after the boot, without a human, one copy runs and has kept its promises."""

from collections.abc import Iterator, Sequence

import pytest

from tests.lab.lab_kit import CLIENT, HOSTS, eventually
from tests.vm.vm_kit import SETTLE_S, Machines, faults_allowed

pytestmark = [pytest.mark.root, pytest.mark.vm]

A, B = "source", "destination"
NAME, ADDRESS = "ct-power", "10.77.2.120"
# Every answer to a write is a promise: it is on the disk.
DURABLE = ["--appendonly", "yes", "--appendfsync", "always"]


@pytest.fixture(scope="module")
def faulty(machines_session: Machines) -> Iterator[Machines]:
    """A Redis that is started again whenever it has ended, and agents that stop where they are asked to."""
    with faults_allowed(machines_session) as machines:
        machines.start_redis(HOSTS[0], NAME, ADDRESS, "--disk", "1GiB", "--restart", "always", arguments=DURABLE)
        yield machines


@pytest.mark.parametrize(
    ("cut", "point", "ends_at"),
    [
        pytest.param(B, "destination.prepare", [A], id="destination before it has reserved"),
        pytest.param(B, "destination.send", [A], id="destination in the rounds"),
        pytest.param(B, "destination.restore", [A], id="destination before ready"),
        pytest.param(B, "destination.ready", [A], id="destination after ready"),
        # In the seconds before the cut it may have asked for the source's word itself.
        pytest.param(B, "source.released", [A, B], id="destination after release"),
        pytest.param(B, "destination.owner", [B], id="destination after the commit"),
        pytest.param(B, "destination.settle", [B], id="destination in the fill"),
        pytest.param(A, "source.prepare", [A], id="source before the rounds"),
        pytest.param(A, "source.precopy", [A], id="source in the rounds"),
        pytest.param(A, "source.freeze", [A], id="source in the freeze"),
        pytest.param(A, "source.final", [A], id="source before ready"),
        pytest.param(A, "source.ready", [B], id="source after ready"),
        pytest.param(A, "source.released", [B], id="source after release"),
        pytest.param(A, "source.finish", [B], id="source after the commit"),
    ],
)
def test_power_cut(faulty: Machines, cut: str, point: str, ends_at: list[str]) -> None:
    """From wherever the last one has left it."""
    machines, ends = faulty, faulty.ends(NAME)
    promised = [0]
    with machines.background("client", *CLIENT, "count", ADDRESS, "6379"):
        eventually("it counts", lambda: _counter(machines, promised) > 0, SETTLE_S * machines.slower)
        hung = machines.move_until(NAME, point, lambda: _counter(machines, promised))
        machines.power_cut(ends[cut])
    machines.boot(ends[cut])
    machines.forget(hung)
    where = _settled(machines, [ends[end] for end in ends_at])
    assert _counter(machines, promised) >= promised[0], "what was acknowledged is lost"
    assert machines.ok(where, "migrator", "volume", "check", NAME)
    lost = machines.ps(where)[NAME]["lost"]
    assert bool(lost) == (ends[cut] == where), f"the loss is told as {lost}"


def _counter(machines: Machines, promised: list[int]) -> int:
    """What it counts now; the highest that has been seen is kept."""
    told = machines.client("timeout", "5", "redis-cli", "-h", ADDRESS, "get", "counter").stdout.strip()
    value = int(told) if told.isdecimal() else 0
    promised[0] = max(promised[0], value)
    return value


def _settled(machines: Machines, hosts: Sequence[str]) -> str:
    """It runs at one of these, answers, and the other host has nothing of it; returns where."""
    where = machines.await_alone(NAME, hosts)
    ping = ("timeout", "5", "redis-cli", "-h", ADDRESS, "ping")
    eventually("it answers", lambda: "PONG" in machines.client(*ping).stdout, SETTLE_S * machines.slower)
    other = next(host for host in HOSTS if host != where)
    assert not machines.clean(other), f"left behind at {other}"
    return where
