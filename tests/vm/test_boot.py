"""Agents that are stopped and hosts that are rebooted: containers go on, come back, or stay where they went."""

import json

import pytest

from tests.lab.lab_kit import HOSTS, eventually
from tests.vm.vm_kit import Machines

pytestmark = [pytest.mark.root, pytest.mark.vm]

A, B = HOSTS
ALWAYS, ONCE, MOVED = "10.77.2.130", "10.77.2.131", "10.77.2.132"
KEYS = {ALWAYS: "always", ONCE: "once", MOVED: "moved"}


def test_the_agent_stops_and_starts_under_its_containers(machines: Machines) -> None:
    machines.start_redis(A, "ct", ALWAYS, "--disk", "1GiB")
    pid = machines.ps(A)["ct"]["pid"]
    with machines.counting(ALWAYS) as report:
        machines.ok(A, "systemctl", "restart", "migrator-agent")
        machines.ok(A, "systemctl", "stop", "migrator-agent")
        before = int(machines.redis(ALWAYS, "get", "counter"))
        eventually("it counts", lambda: int(machines.redis(ALWAYS, "get", "counter")) > before, 10 * machines.slower)
        machines.ok(A, "systemctl", "start", "migrator-agent")
    assert report["same_connection"], report
    assert not report["wrong"], report
    assert machines.ps(A)["ct"]["pid"] == pid
    assert machines.exec(A, "ct", "echo", "there") == "there\n"


def test_a_host_is_rebooted(machines: Machines) -> None:
    durable = ["--appendonly", "yes"]
    machines.start_redis(A, "always", ALWAYS, "--disk", "1GiB", "--restart", "always", arguments=durable)
    machines.start_redis(A, "once", ONCE, "--disk", "1GiB", arguments=durable)
    machines.start_redis(A, "moved", MOVED, "--disk", "1GiB", "--restart", "always", arguments=durable)
    for address, key in KEYS.items():
        machines.redis(address, "set", key, "value")
    machines.migrate("moved", A, B)
    with machines.counting(MOVED) as report:
        machines.reboot(A)
        eventually("it is back", lambda: machines.ps(A)["always"]["state"] == "running", 30 * machines.slower)
        ping = ("timeout", "5", "redis-cli", "-h", ALWAYS, "ping")
        eventually("it answers", lambda: "PONG" in machines.client(*ping).stdout, 30 * machines.slower)
    assert report["same_connection"], report
    states = {name: (row["state"], bool(row["lost"])) for name, row in machines.ps(A).items()}
    assert states == {"always": ("running", True), "once": ("stopped", True)}
    assert machines.where("moved") == [B]
    assert machines.redis(ALWAYS, "get", "always") == "value"
    for name in ("always", "once"):
        checked = json.loads(machines.ok(A, "migrator", "volume", "check", name, "-o", "json"))
        print(f"\n{name} after the reboot: {checked}")
    machines.ok(A, "migrator", "start", "once")
    get = ("timeout", "5", "redis-cli", "-h", ONCE, "get", "once")
    eventually("it has its key", lambda: "value" in machines.client(*get).stdout, 30 * machines.slower)
    assert not machines.ps(A)["once"]["lost"]
