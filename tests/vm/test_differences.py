"""Hosts that are not alike: what matters is refused before a byte moves, and what does not is no obstacle."""

from collections.abc import Iterator

import pytest

from tests.lab.lab_kit import HOSTS
from tests.vm.vm_kit import Machines

pytestmark = [pytest.mark.root, pytest.mark.vm]

A, B = HOSTS
NAME, ADDRESS = "ct", "10.77.2.140"
POOL = "/var/lib/migrator/pool"
CRIU = "/usr/local/lib/migrator/bin/criu"


@pytest.fixture
def running(machines: Machines) -> Iterator[Machines]:
    """A Redis at host-a, which is as it was afterwards, wherever it is."""
    machines.start_redis(A, NAME, ADDRESS, "--disk", "1GiB")
    machines.redis(ADDRESS, "set", "key", "value")
    yield machines
    assert machines.redis(ADDRESS, "get", "key") == "value"


def refused(machines: Machines) -> tuple[int, str]:
    """Exit code and reason; it is where it was."""
    code, report = machines.try_migrate(NAME, A, B)
    assert report["outcome"] == "refused", report
    assert machines.where(NAME) == [A]
    return code, report["error"]["reason"]


@pytest.mark.parametrize("shift", ["1 hour", "1 hour ago"])
def test_the_clock_is_an_hour_apart(running: Machines, shift: str) -> None:
    with running.counting(ADDRESS) as report:
        running.ok(B, "sh", "-ec", f"systemctl stop systemd-timesyncd; date -s '{shift}'")
        try:
            running.migrate(NAME, A, B)
            running.migrate(NAME, B, A)
        finally:
            running.ok(B, "date", "-s", f"@{running.ok(A, 'date', '+%s').strip()}")
    assert report["same_connection"] and not report["wrong"], report


def test_a_full_disk(running: Machines) -> None:
    free = int(running.ok(B, "sh", "-c", f"df -B1 --output=avail {POOL} | tail -1"))
    running.ok(B, "fallocate", "-l", str(free - (50 << 20)), f"{POOL}/filler")
    try:
        assert refused(running) == (3, "NO_SPACE")
    finally:
        running.ok(B, "rm", f"{POOL}/filler")


def test_less_memory(running: Machines) -> None:
    """The rest of it is in use: by a file that is nowhere else."""
    running.redis(ADDRESS, "debug", "populate", "200000", "key", "1000")
    running.ok(B, "sh", "-ec", "mkdir /run/full; mount -t tmpfs -o size=90% tmpfs /run/full")
    try:
        available_kib = int(running.ok(B, "awk", "/^MemAvailable/ {print $2}", "/proc/meminfo"))
        running.ok(B, "fallocate", "-l", str((available_kib << 10) - (300 << 20)), "/run/full/file")
        assert refused(running) == (3, "NO_MEMORY")
    finally:
        running.ok(B, "sh", "-c", "umount /run/full; rmdir /run/full")


def test_an_older_criu(running: Machines) -> None:
    """By what it says of itself: preflight asks it for no more."""
    running.ok(B, "mv", CRIU, f"{CRIU}.kept")
    try:
        running.ok(B, "sh", "-ec", f"cat >{CRIU}; chmod 755 {CRIU}", stdin="#!/bin/sh\necho Version: 3.17.1\n")
        running.restart_agent(B)
        assert refused(running) == (3, "CRIU_OLDER")
    finally:
        running.ok(B, "mv", f"{CRIU}.kept", CRIU)
        running.restart_agent(B)


def test_another_file_system(running: Machines) -> None:
    """Of the host, under the images; the container's own goes along."""
    running.ok(B, "sh", "-ec", "truncate -s 8G /xfs; mkfs.xfs -q /xfs; systemctl stop migrator-agent")
    try:
        running.ok(B, "mount", "-o", "loop", "/xfs", POOL)
        running.ok(B, "systemctl", "start", "migrator-agent")
        with running.counting(ADDRESS) as report:
            running.migrate(NAME, A, B)
            running.migrate(NAME, B, A)
        assert report["same_connection"] and not report["wrong"], report
    finally:
        running.ok(B, "systemctl", "stop", "migrator-agent")
        running.ok(B, "sh", "-c", f"umount {POOL}; rm /xfs")
        running.ok(B, "systemctl", "start", "migrator-agent")


def test_another_processor(running: Machines) -> None:
    """One that lacks what the other has: the way there is closed for what runs, and the way back is open."""
    running.lab("power-cut", B)
    running.lab("boot", B, "--cpu", "Penryn")
    running.await_agent(B)
    try:
        code, reason = refused(running)
        assert (code, reason) == (3, "CPU_FLAGS_MISSING")
        running.ok(A, "migrator", "stop", NAME)
        running.migrate(NAME, A, B)
        running.ok(B, "migrator", "start", NAME)
        running.migrate(NAME, B, A)
    finally:
        running.lab("power-cut", B)
        running.lab("boot", B)
        running.await_agent(B)
