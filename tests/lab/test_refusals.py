"""Moves that must not happen: each says why, exits with its code, and changes nothing."""

from collections.abc import Iterator

import pytest

from labkit.leftovers import Leftovers, present
from tests.lab.lab_kit import HOSTS, Lab, eventually

pytestmark = [pytest.mark.lab, pytest.mark.root]

ADDRESS = "10.77.2.130"


@pytest.fixture
def running(lab: Lab) -> Iterator[Lab]:
    """A lab with a Redis `ct` at host-a. Afterwards it answers as before, and nothing is at host-b."""
    lab.start_redis("host-a", "ct", ADDRESS, "--disk", "1GiB", "-p", "8080:6379")
    lab.redis(ADDRESS, "set", "key", "value")
    yield lab
    assert lab.ps("host-a")["ct"]["state"] == "running"
    assert lab.redis(ADDRESS, "get", "key") == "value"


def refused(lab: Lab, container: str, destination: str, *options: str) -> tuple[int, str, str]:
    """Exit code, reason and message."""
    code, report = lab.try_migrate(container, "host-a", destination, *options)
    error = report["error"]
    assert error["exit_code"] == code
    assert report.get("outcome") in (None, "refused")
    return code, error["reason"], error["message"]


def there(lab: Lab) -> Leftovers:
    """What is at host-b, its agent's processes apart."""
    return lab.clean("host-b", within_s=2)


def test_names(running: Lab) -> None:
    """Unknown container, unknown host, the host where it is, and what cannot be a name."""
    assert refused(running, "nobody", "host-b")[:2] == (2, "CONTAINER_NOT_FOUND")
    assert refused(running, "ct", "host-z")[:2] == (2, "UNKNOWN_HOST")
    assert refused(running, "ct", "host-a")[:2] == (2, "SAME_HOST")
    assert refused(running, "No_Name", "host-b")[:2] == (2, "INVALID_ARGUMENT")
    assert not there(running)


def test_name_and_port_taken_there(running: Lab) -> None:
    running.image("host-b", "redis")
    create = ["migrator", "create", "--image", "redis", "--disk", "1GiB"]
    running.ok("host-b", *create, "ct", "--", "sleep", "infinity")
    code, reason, message = refused(running, "ct", "host-b")
    assert (code, reason) == (3, "NAME_TAKEN")
    assert "host-b" in message
    running.ok("host-b", "migrator", "rm", "ct")
    running.start("host-b", "other", "redis", "--ip", "auto", "-p", "8080:80", command=["sleep", "infinity"])
    assert refused(running, "ct", "host-b")[:2] == (3, "PORT_IN_USE")
    assert running.ps("host-b").keys() == {"other"}


def test_address_in_use_there(lab: Lab) -> None:
    """Two stopped containers have the same address, each on its host: nobody could notice when they were created."""
    for host, name in (("host-a", "ct"), ("host-b", "other")):
        lab.image(host, "redis")
        lab.ok(
            host, "migrator", "create", "--image", "redis", "--disk", "1GiB", "--ip", f"{ADDRESS}/16", name,
            "--", "sleep", "infinity",
        )  # fmt: skip
    code, reason, message = refused(lab, "ct", "host-b")
    assert (code, reason) == (3, "ADDRESS_IN_USE")
    assert ADDRESS in message
    assert "other" in message


def test_no_room_there(running: Lab) -> None:
    filler = "/var/lib/migrator/pool/filler"
    free = int(running.ok("host-b", "sh", "-c", "df -B1 --output=avail /var/lib/migrator/pool | tail -1"))
    running.ok("host-b", "fallocate", "-l", str(free - (100 << 20)), filler)
    try:
        code, reason, message = refused(running, "ct", "host-b")
    finally:
        running.ok("host-b", "rm", filler)
    assert (code, reason) == (3, "NO_SPACE")
    assert "host-b" in message
    assert not there(running)


def test_what_is_the_same_as_an_image_there_needs_no_room(running: Lab) -> None:
    pool, little = "/var/lib/migrator/pool", 20 << 20
    filler = f"{pool}/filler"

    def refusal() -> str | None:
        sizes = running.ok("host-b", "sh", "-c", f"df -B1 --output=size,avail {pool} | tail -1").split()
        size, free = map(int, sizes)
        left = 2 * min(1 << 30, size // 20) + (64 << 20) + little  # the pool's reserve, and preflight's own
        running.ok("host-b", "fallocate", "-l", str(free - left), filler)
        code, report = running.try_migrate("ct", "host-a", "host-b", "--check-only")
        running.ok("host-b", "rm", filler)
        return report["error"]["reason"] if code else None

    running.no_image("host-b", "redis")
    assert refusal() == "NO_SPACE"
    running.image("host-b", "redis")
    assert refusal() is None


def test_bind_mounts(lab: Lab) -> None:
    """A folder of the host goes along only where it is marked, and there at both ends."""
    lab.image("host-a", "redis")
    lab.ok("host-a", "mkdir", "/run/only-here")
    try:
        for name, bind in (
            ("plain", "/opt:/mnt"),
            ("marked", "/opt:/mnt,shared"),
            ("missing", "/run/only-here:/mnt,shared"),
        ):
            lab.start("host-a", name, "redis", "--disk", "1GiB", "--bind", bind, command=["sleep", "infinity"])
        assert refused(lab, "plain", "host-b")[:2] == (3, "BIND_MOUNT")
        assert refused(lab, "missing", "host-b")[:2] == (3, "BIND_MOUNT_MISSING")
        assert not there(lab)
        lab.migrate("marked", "host-a", "host-b")
        # The host may have mounts of its own below the folder, which are none of the container's.
        assert lab.exec("host-b", "marked", "ls", "/mnt") == lab.ok("host-b", "ls", "/opt")
    finally:
        lab.remove_all()
        lab.ok("host-a", "rmdir", "/run/only-here")


def test_open_exec_session(running: Lab) -> None:
    """It would be lost, so it stands in the way; when it has ended it does not."""
    with running.background("host-a", "migrator", "exec", "ct", "--", "sleep", "60"):
        eventually(
            "the session is open",
            lambda: "sleep" in running.exec("host-a", "ct", "sh", "-c", "cat /proc/[0-9]*/comm"),
        )
        code, reason, message = refused(running, "ct", "host-b")
        assert (code, reason) == (3, "EXEC_SESSION")
        assert "sleep" in message
        running.ok(
            "host-a",
            "migrator",
            "exec",
            "ct",
            "--",
            "sh",
            "-c",
            "kill $(grep -l sleep /proc/[0-9]*/comm | cut -d/ -f3)",
        )
    code, report = running.try_migrate("ct", "host-a", "host-b", "--check-only")
    assert (code, report["outcome"]) == (0, "checked")


def test_the_destination_cannot_ask_back(running: Lab) -> None:
    """It looks for host-a where nobody is, and could not find out what became of a migration."""
    with running.configured("host-b", lambda text: text.replace('host-a = "10.77.1.1:', 'host-a = "10.77.1.9:')):
        code, reason, message = refused(running, "ct", "host-b")
    assert (code, reason) == (3, "SOURCE_UNREACHABLE")
    assert "host-b cannot ask host-a back" in message


def test_check_only_changes_nothing(running: Lab) -> None:
    """On neither host, down to the last mount."""
    before = {host: present(host) for host in HOSTS}
    code, report = running.try_migrate("ct", "host-a", "host-b", "--check-only")
    assert (code, report["outcome"], report["error"]) == (0, "checked", None)
    assert [phase["name"] for phase in report["phases"]] == ["preflight"]
    assert {host: present(host) for host in HOSTS} == before
    assert running.where("ct") == ["host-a"]


def test_timeout_rolls_back(running: Lab) -> None:
    """With a millisecond nothing can be done; with a slow link it ends in the middle of it."""
    with running.counting(ADDRESS) as client:
        for options in (["--timeout", "1ms"], ["--timeout", "1500ms", "--bandwidth", "20Mbit/s"]):
            code, report = running.try_migrate("ct", "host-a", "host-b", *options)
            assert (code, report["outcome"]) == (124, "timed_out")
            assert report["where_running"] == "host-a"
            assert report["error"]["reason"] == "DEADLINE_EXCEEDED"
            eventually("it is at host-a alone", lambda: running.where("ct") == ["host-a"])
            assert not there(running)
    assert client["wrong"] == []
    assert client["same_connection"]
    running.migrate("ct", "host-a", "host-b")
    running.migrate("ct", "host-b", "host-a")
