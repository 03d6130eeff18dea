"""What travels of disks: nothing that is there already, and nothing twice when the link breaks."""

import json
import time

import pytest

from tests.lab.lab_kit import Lab, eventually
from tests.lab.test_moves import MOVES, phase_of
from tests.lab.test_workloads import grown

pytestmark = [pytest.mark.lab, pytest.mark.root]

ADDRESS = "10.77.2.140"
OWN_BYTES = 20 << 20


def test_image_that_is_there_is_not_sent(lab: Lab) -> None:
    """Whole volumes are equal at the end, and little more than the container's own blocks was on the wire."""
    lab.no_image("host-b", "redis")
    lab.start_redis("host-a", "based", ADDRESS, "--disk", "1GiB")
    lab.exec("host-a", "based", "sh", "-c", f"head -c {OWN_BYTES} /dev/urandom >/root/own; rm -r /usr/share/doc; sync")
    alone = lab.migrate("based", "host-a", "host-b", "--verify")["bytes"]
    based = lab.migrate("based", "host-b", "host-a", "--verify")["bytes"]
    print(f"\nwithout the image {alone}, with it {based}")
    assert based["wire"] < 0.5 * alone["wire"]
    assert based["wire"] < 1.25 * OWN_BYTES
    assert (
        lab.exec("host-a", "based", "sh", "-c", "wc -c </root/own; ls /usr/share/doc 2>&1 | wc -l")
        == f"{OWN_BYTES}\n1\n"
    )


def test_broken_connection_goes_on(lab: Lab) -> None:
    """The link is away for longer than it takes to notice; little is sent again, and the client is served."""
    lab.start_redis("host-a", "broken", ADDRESS, "--disk", "1GiB")
    lab.exec("host-a", "broken", "sh", "-c", "head -c 60M /dev/urandom >/root/random; sync")
    with (
        lab.counting(ADDRESS) as client,
        lab.background(
            "host-a", "migrate", "broken", "host-b", "--bandwidth", "300Mbit/s", "--verify", "-o", "json"
        ) as command,
    ):
        eventually("precopy", lambda: phase_of(lab, "host-a") == "precopy")
        time.sleep(1.5)
        lab.lab("cut", "host-b")
        time.sleep(7)
        assert command.poll() is None
        lab.lab("heal", "host-b")
        out, _ = command.communicate(timeout=60)
    report = json.loads(out)
    assert report["outcome"] == "migrated", report
    assert report["total_ms"] > 7000
    assert report["bytes"]["wire"] < 1.05 * report["bytes"]["disk"]
    assert report["bytes"]["wire"] <= 300e6 / 8 * report["total_ms"] / 1000
    assert client["wrong"] == [] and client["same_connection"]
    assert not lab.clean("host-a")


def test_disks_that_are_written_in_every_way_all_the_time(lab: Lab) -> None:
    """Direct, mapped, synced, in the page cache, and holes: whole volumes are equal at both ends, there and back.

    On the way back the image is there already, and the file systems have given back what was deleted.
    """
    lab.start_workload(
        "host-a", "writing", "/root /data", ADDRESS, "--disk", "1GiB", "--volume", "/data=400MB,xfs",
        program="disk_writer.py",
    )  # fmt: skip
    before = lab.ask(ADDRESS)
    assert before["wrong"] == []
    for source, destination in MOVES:
        report = lab.migrate("writing", source, destination, "--verify")
        print(f"\n{source} to {destination}: {report['bytes']}, {report['downtime_ms']:.0f} ms")
        now = lab.ask(ADDRESS)
        assert now["wrong"] == []
        assert now["same"] == before["same"]
        eventually("all of it goes on", lambda n=now: grown(lab, n["grows"], ADDRESS), 5)  # type: ignore[misc]
        lab.exec(destination, "writing", "sh", "-c", "rm -rf /usr/share/doc /usr/share/man; sync")
        for at in ("rootfs", "volumes/1"):
            lab.ok(destination, "fstrim", f"/var/lib/migrator/containers/writing/{at}")
    assert not lab.clean("host-b")
