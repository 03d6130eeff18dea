"""Containers move between machines with kernels of their own, under a client on a third."""

import pytest

from tests.lab.lab_kit import CLIENT
from tests.vm.vm_kit import Machines

pytestmark = [pytest.mark.root, pytest.mark.vm]

A, B = "host-a", "host-b"
ADDRESS = "10.77.2.101"
KEYS = 5000


@pytest.mark.smoke
def test_a_redis_moves_and_its_client_does_not_notice(machines: Machines) -> None:
    machines.start_redis(A, "ct101", ADDRESS)
    machines.client_ok(*CLIENT, "fill", ADDRESS, "6379", str(KEYS))
    with machines.counting(ADDRESS) as report:
        machines.exec(A, "ct101", "sh", "-c", "head -c 300000 /dev/urandom >/written; sha256sum /written >/sum")
        moved = machines.migrate("ct101", A, B)
    assert report["same_connection"] and not report["wrong"], report
    assert machines.where("ct101") == [B]
    assert machines.client_ok(*CLIENT, "check", ADDRESS, "6379", str(KEYS)).strip() == str(KEYS)
    machines.exec(B, "ct101", "sha256sum", "--check", "--quiet", "/sum")
    assert not machines.clean(A), "left behind at the source"
    assert moved["downtime_ms"] > 0
