"""Snapshots of a Redis that is being written: taken, rolled back to, moved, and agents that die meanwhile."""

import json
from pathlib import Path
from typing import Any

import pytest

from labkit.hosts import STATE
from tests.lab.lab_kit import HOSTS, Lab, eventually

pytestmark = [pytest.mark.root, pytest.mark.lab]

A, B = HOSTS
NAME, ADDRESS = "ct-snap", "10.77.2.170"
FAULTS = "/run/faults"
# All its files are closed before it is gone; what was written to a disk may have to get there first.
DIES_WITHIN_S = 60

# Numbers go into a list one after the other; each is on the disk when it is answered.
WRITER = """
import signal, socket, sys
connection = socket.create_connection((sys.argv[1], 6379), timeout=20)
lines, number, stopped = connection.makefile("rb"), 0, []
signal.signal(signal.SIGTERM, lambda *_: stopped.append(1))
while not stopped:
    connection.sendall(b"RPUSH list %d\\r\\n" % number)
    number = int(lines.readline()[1:])
print(number)
"""


@pytest.fixture
def redis(lab: Lab) -> Lab:
    """With a log on the disk that is synced at every write."""
    lab.image(A, "redis")
    lab.start(
        A, NAME, "redis", "--disk", "1GiB", "--volume", "/data=64MiB", "--ip", f"{ADDRESS}/16",
        command=["redis-server", "--bind", "0.0.0.0", "--protected-mode", "no", "--dir", "/data", "--appendonly", "yes",
                 "--appendfsync", "always", "--save", ""],
    )  # fmt: skip
    answers(lab)
    return lab


def answers(lab: Lab) -> None:
    def pong() -> bool:
        return "PONG" in lab.client("timeout", "1", "redis-cli", "-h", ADDRESS, "ping").stdout

    eventually("Redis answers", pong, 20)


def length(lab: Lab) -> int:
    return int(lab.redis(ADDRESS, "llen", "list"))


def listed(lab: Lab, host: str) -> dict[str, dict[str, Any]]:
    found = json.loads(lab.ok(host, "migrator", "snapshot", "ls", NAME, "-o", "json"))
    return {item["name"]: item for item in found}


def images(lab: Lab, host: str) -> list[str]:
    return lab.ok(host, "ls", "/var/lib/migrator/pool/snapshots").split()


def test_a_snapshot_while_it_is_written(redis: Lab) -> None:
    """What was answered before it is in it, what came after is not; the writer never fails."""
    with redis.background("client", "python3", "-c", WRITER, ADDRESS) as writer:
        eventually("something is written", lambda: length(redis) > 20)
        before = length(redis)
        taken = json.loads(redis.ok(A, "migrator", "snapshot", "create", NAME, "one", "-o", "json"))
        after = length(redis)
        eventually("more is written", lambda: length(redis) > after + 20)
        writer.terminate()
        out, err = writer.communicate(timeout=20)
    assert int(out) == length(redis), err
    assert taken["freeze_ms"] > 0
    refused = redis.run(A, "migrator", "snapshot", "rollback", NAME, "one")
    assert refused.returncode == 3
    assert "--force" in refused.stderr
    redis.ok(A, "migrator", "snapshot", "create", NAME, "two")
    redis.ok(A, "migrator", "snapshot", "rollback", NAME, "one", "--force")
    answers(redis)
    assert before <= length(redis) <= after
    assert redis.redis(ADDRESS, "lrange", "list", "0", "2").split() == ["0", "1", "2"]
    redis.ok(A, "migrator", "snapshot", "create", NAME, "three")
    assert {name: item["parent"] for name, item in listed(redis, A).items()} == {
        "one": None,
        "two": "one",
        "three": "one",
    }
    redis.ok(A, "migrator", "snapshot", "rm", NAME, "one")
    redis.ok(A, "migrator", "snapshot", "rollback", NAME, "two", "--force")
    answers(redis)
    assert length(redis) == int(out)
    redis.ok(A, "migrator", "rm", "-f", NAME)
    assert images(redis, A) == []


def test_moved_or_left_behind_as_asked(redis: Lab) -> None:
    redis.ok(A, "migrator", "snapshot", "create", NAME, "empty")
    redis.redis(ADDRESS, "rpush", "list", "a")
    redis.exec(A, NAME, "sh", "-c", "head -c 20M /dev/urandom >/root/random; sync")
    redis.ok(A, "migrator", "snapshot", "create", NAME, "full")
    redis.redis(ADDRESS, "rpush", "list", "b")
    code, refused = redis.try_migrate(NAME, A, B)
    assert (code, refused["error"]["reason"]) == (3, "SNAPSHOTS")
    assert "--with-snapshots" in refused["error"]["message"]
    before = listed(redis, A)
    report = redis.migrate(NAME, A, B, "--with-snapshots", "--verify")
    now = listed(redis, B)
    assert {name: (item["parent"], item["created"], item["current"]) for name, item in now.items()} == {
        name: (item["parent"], item["created"], item["current"]) for name, item in before.items()
    }
    # The first whole, of the second and of the volume what differs; ext4 may be making its inode tables meanwhile.
    whole = redis.ps(B)[NAME]["disk_bytes"]
    assert report["bytes"]["disk"] < 1.5 * whole
    assert images(redis, A) == []
    assert length(redis) == 2
    for name, expected in (("empty", 0), ("full", 1)):
        redis.ok(B, "migrator", "snapshot", "rollback", NAME, name, "--force")
        answers(redis)
        assert length(redis) == expected
    redis.migrate(NAME, B, A, "--without-snapshots")
    assert listed(redis, A) == {}
    assert images(redis, B) == []
    assert length(redis) == 1


def test_stopped_and_moved_with_its_snapshots(redis: Lab) -> None:
    redis.redis(ADDRESS, "rpush", "list", "a")
    redis.ok(A, "migrator", "pause", NAME)
    redis.ok(A, "migrator", "snapshot", "create", NAME, "paused")
    redis.ok(A, "migrator", "resume", NAME)
    redis.redis(ADDRESS, "rpush", "list", "b")
    redis.ok(A, "migrator", "stop", NAME)
    redis.ok(A, "migrator", "snapshot", "create", NAME, "stopped")
    redis.migrate(NAME, A, B, "--with-snapshots")
    redis.ok(B, "migrator", "snapshot", "rollback", NAME, "paused")
    redis.ok(B, "migrator", "start", NAME)
    answers(redis)
    assert length(redis) == 1
    redis.ok(B, "migrator", "snapshot", "rollback", NAME, "stopped", "--force")
    answers(redis)
    assert length(redis) == 2


class Dying:
    """An agent that dies at a named moment."""

    def __init__(self, lab: Lab, host: str) -> None:
        self._lab, self._host = lab, host
        init = int((STATE / host / "init.pid").read_text())
        self._file = Path(f"/proc/{init}/root{FAULTS}")

    def during(self, point: str, *command: str) -> None:
        self._file.write_text(f"{point} kill\n")
        try:
            done = self._lab.run(self._host, *command)
        finally:
            self._file.unlink()
        assert done.returncode == 4, f"the agent was to die: exit code {done.returncode}: {done.stderr}"
        eventually(f"it died, after {done.stderr}", lambda: self._agent() != "running", DIES_WITHIN_S)
        self._lab.lab("start", self._host)

    def _agent(self) -> str:
        return next(str(row["agent"]) for row in self._lab.status() if row["name"] == self._host)


@pytest.fixture
def dying(redis: Lab, monkeypatch: pytest.MonkeyPatch) -> Dying:
    monkeypatch.setenv("MIGRATOR_FAULTS", FAULTS)
    redis.lab("kill", A)
    redis.lab("start", A)
    return Dying(redis, A)


def test_an_agent_that_dies_between_image_and_record(redis: Lab, dying: Dying) -> None:
    redis.redis(ADDRESS, "rpush", "list", "a")
    dying.during("snapshot.taken", "migrator", "snapshot", "create", NAME, "lost")
    assert length(redis) == 1
    assert listed(redis, A) == {}
    assert images(redis, A) == []
    redis.ok(A, "migrator", "snapshot", "create", NAME, "lost")


def test_an_agent_that_dies_in_a_rollback(redis: Lab, dying: Dying) -> None:
    """One of the two volumes is replaced; the other one is when the agent is back."""
    redis.redis(ADDRESS, "rpush", "list", "a")
    redis.exec(A, NAME, "sh", "-c", "echo old >/root/file; sync")
    redis.ok(A, "migrator", "snapshot", "create", NAME, "old")
    redis.redis(ADDRESS, "rpush", "list", "b")
    redis.exec(A, NAME, "sh", "-c", "echo new >/root/file; sync")
    redis.ok(A, "migrator", "stop", NAME)
    dying.during("snapshot.rollback", "migrator", "snapshot", "rollback", NAME, "old")
    redis.ok(A, "migrator", "start", NAME)
    answers(redis)
    assert length(redis) == 1
    assert redis.exec(A, NAME, "cat", "/root/file") == "old\n"
    assert listed(redis, A)["old"]["current"]


@pytest.mark.parametrize(("host", "point"), [(A, "source.snapshots"), (B, "destination.snapshots")])
def test_an_agent_that_dies_while_snapshots_move(
    redis: Lab, monkeypatch: pytest.MonkeyPatch, host: str, point: str
) -> None:
    monkeypatch.setenv("MIGRATOR_FAULTS", FAULTS)
    redis.lab("kill", host)
    redis.lab("start", host)
    redis.redis(ADDRESS, "rpush", "list", "a")
    redis.ok(A, "migrator", "snapshot", "create", NAME, "one")
    file = Path(f"/proc/{int((STATE / host / 'init.pid').read_text())}/root{FAULTS}")
    file.write_text(f"{point} kill\n")
    code, _ = redis.try_migrate(NAME, A, B, "--with-snapshots")
    assert code != 0
    file.unlink()
    redis.lab("start", host)
    eventually("it is at host-a alone", lambda: redis.where(NAME) == [A], 40)
    eventually("nothing is left at host-b", lambda: images(redis, B) == [])
    eventually("no migration runs", lambda: not redis.ps(A)[NAME]["migration"], 40)
    assert length(redis) == 1
    redis.migrate(NAME, A, B, "--with-snapshots")
    assert list(listed(redis, B)) == ["one"]
