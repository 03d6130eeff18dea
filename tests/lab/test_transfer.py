"""What travels of disks: nothing that is there already, and nothing twice when the link breaks."""

import json
import time

import pytest

from tests.lab.lab_kit import Lab, eventually
from tests.lab.test_moves import phase_of

pytestmark = [pytest.mark.lab, pytest.mark.root]

ADDRESS = "10.77.2.140"


def test_image_that_is_there_is_not_sent(lab: Lab) -> None:
    """Whole volumes are equal at the end, and little more than the container's own blocks was on the wire."""
    lab.start_redis("host-a", "based", ADDRESS, "--disk", "1GiB")
    lab.exec("host-a", "based", "sh", "-c", "head -c 20M /dev/urandom >/root/own; rm -r /usr/share/doc; sync")
    alone = lab.migrate("based", "host-a", "host-b", "--verify")["bytes"]
    lab.image("host-a", "redis", "redis-server")
    based = lab.migrate("based", "host-b", "host-a", "--verify")["bytes"]
    print(f"\nwithout the image {alone}, with it {based}")
    assert based["disk"] < 0.4 * alone["disk"]
    assert (
        lab.exec("host-a", "based", "sh", "-c", "wc -c </root/own; ls /usr/share/doc 2>&1 | wc -l") == "20971520\n1\n"
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
    assert client["wrong"] == [] and client["same_connection"]
    assert not lab.clean("host-a")
