"""Containers move between machines with kernels of their own, under a client on a third."""

from functools import partial

import pytest

from tests.lab.lab_kit import CLIENT, HOSTS
from tests.vm.vm_kit import Machines

pytestmark = [pytest.mark.root, pytest.mark.vm]

A, B = HOSTS
ADDRESS, OTHER = "10.77.2.101", "10.77.2.102"
KEYS = 5000


@pytest.mark.smoke
def test_a_redis_moves_and_its_client_does_not_notice(machines: Machines) -> None:
    machines.start_redis(A, "ct101", ADDRESS)
    machines.client_ok(*CLIENT, "fill", ADDRESS, "6379", str(KEYS))
    with machines.counting(ADDRESS) as report:
        machines.exec(A, "ct101", "sh", "-c", "head -c 300000 /dev/urandom >/written; sha256sum /written >/sum")
        moved = machines.migrate("ct101", A, B, "--verify")
    assert report["same_connection"] and not report["wrong"], report
    assert machines.where("ct101") == [B]
    assert machines.client_ok(*CLIENT, "check", ADDRESS, "6379", str(KEYS)).strip() == str(KEYS)
    machines.exec(B, "ct101", "sha256sum", "--check", "--quiet", "/sum")
    assert not machines.clean(A), "left behind at the source"
    assert moved["downtime_ms"] > 0


def test_every_tracker(machines: Machines) -> None:
    """Of those that the kernels of both have; a client writes the while."""
    machines.start_redis(A, "ct102", OTHER)
    machines.client_ok(*CLIENT, "fill", OTHER, "6379", str(KEYS))
    where = [A, B]
    for method in trackers(machines):
        chosen = partial(tracked_by, method)
        with machines.configured(A, chosen), machines.configured(B, chosen), machines.counting(OTHER) as report:
            moved = machines.migrate("ct102", *where, "--verify")
        assert any(note.startswith(f"memory is tracked by {method}:") for note in moved["notes"]), moved["notes"]
        assert report["same_connection"] and not report["wrong"], report
        assert machines.client_ok(*CLIENT, "check", OTHER, "6379", str(KEYS)).strip() == str(KEYS)
        where.reverse()


def tracked_by(method: str, configuration: str) -> str:
    return configuration.replace('memory_tracker = ""', f'memory_tracker = "{method}"')


def trackers(machines: Machines) -> set[str]:
    """As Debian's kernels should have them."""
    has = [{"soft-dirty"} | ({"write-protect"} if machines.release(host) != "bookworm" else set()) for host in (A, B)]
    return has[0] & has[1]
