"""Agents that are killed and links that are cut in every phase of a migration, by `migrator.faults` at known moments.

Each case ends the same: the container runs at exactly one host, its client has lost nothing, the other host has nothing
of it, and the next migration works. What the client sees is the measure of how soon a container runs on.
"""

import json
import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from labkit.hosts import STATE
from tests.lab.lab_kit import HOSTS, Lab, eventually

pytestmark = [pytest.mark.root, pytest.mark.lab]

A, B = HOSTS
NAME, ADDRESS = "ct-crash", "10.77.2.150"
FAULTS = "/run/faults"

# One TCP connection, one INCR after the other; the longest gap is printed with the last value. A value that does not
# follow the one before it, or a broken connection, ends it with an error.
CLIENT = """
import json, socket, sys, time
connection = socket.create_connection((sys.argv[1], 6379), timeout=60)
connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
lines, last, longest, before = connection.makefile("rb"), 0, 0.0, time.monotonic()
print("connected", flush=True)
stopped = []
import signal
signal.signal(signal.SIGTERM, lambda *_: stopped.append(1))
while not stopped:
    connection.sendall(b"INCR counter\\r\\n")
    value = int(lines.readline()[1:])
    now = time.monotonic()
    assert last == 0 or value == last + 1, (last, value)
    last, longest, before = value, max(longest, now - before), now
    time.sleep(0.002)
print(json.dumps({"last": last, "longest_ms": longest * 1000}), flush=True)
"""


class Crashes:
    """One Redis at host-a with a client that counts, and the faults that are asked of the two agents."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab

    def _file(self, host: str, suffix: str = "") -> Path:
        init = int((STATE / host / "init.pid").read_text())
        return Path(f"/proc/{init}/root{FAULTS}{suffix}")

    def ask(self, host: str, point: str, action: str) -> None:
        self._file(host).write_text(f"{point} {action}\n")

    def forget(self) -> None:
        for host in HOSTS:
            for suffix in ("", ".reached"):
                self._file(host, suffix).unlink(missing_ok=True)

    def reached(self, host: str, point: str) -> bool:
        file = self._file(host, ".reached")
        return file.exists() and point in file.read_text().split()

    def start_redis(self) -> None:
        self.lab.image(A, "redis", "redis-server")
        self.lab.start(
            A, NAME, "redis", "--disk", "1GiB", "--memory", "256MiB", "--ip", f"{ADDRESS}/16",
            command=["redis-server", "--bind", "0.0.0.0", "--protected-mode", "no", "--save", ""],
        )  # fmt: skip
        eventually("redis answers", lambda: self.lab.client("redis-cli", "-h", ADDRESS, "ping").stdout == "PONG\n")

    @contextmanager
    def counting(self) -> Iterator[dict[str, float]]:
        """A client for the length of the block; its numbers are there afterwards. It must not notice anything."""
        seen: dict[str, float] = {}
        with self.lab.background("client", "python3", "-c", CLIENT, ADDRESS) as client:
            assert client.stdout is not None
            assert client.stdout.readline() == "connected\n"
            yield seen
            value = self.counter()
            eventually("the client counts on", lambda: self.counter() > value)
            client.terminate()
            out, err = client.communicate(timeout=70)
            assert client.returncode == 0, err
            seen.update(json.loads(out))

    def counter(self) -> int:
        return int(self.lab.client_ok("redis-cli", "-h", ADDRESS, "get", "counter") or 0)

    def agent_runs(self, host: str) -> bool:
        return next(row for row in self.lab.status() if row["name"] == host)["agent"] == "running"

    @contextmanager
    def migrating(self, source: str, destination: str) -> Iterator["subprocess.Popen[str]"]:
        with self.lab.background(source, "migrate", NAME, destination, "-o", "json") as process:
            yield process

    def settled(self, *, moved: bool | None = None, source: str = A, destination: str = B) -> str:
        """Where it is, once it is at one host and nothing is left at the other."""
        for host in HOSTS:
            if not self.agent_runs(host):
                self.lab.lab("start", host)

        def one_place() -> bool:
            rows = [(host, self.lab.ps(host).get(NAME)) for host in HOSTS]
            states = [(host, row["state"]) for host, row in rows if row]
            idle = all(not row["migration"] for _, row in rows if row)
            return idle and [state for _, state in states] == ["running"]

        eventually("the container runs at exactly one host", one_place, 40)
        (where,) = self.lab.where(NAME)
        assert moved is None or where == (destination if moved else source)
        other = next(host for host in HOSTS if host != where)
        assert not self.lab.clean(other, 20)
        found = self.lab.leftovers(where)
        processes = [line for line in found["processes"] if "redis" not in line and "conmon" not in line]
        assert not processes, "processes are left where it runs"
        assert not [file for file in found["files"] if "migrations" in file], found
        return where


@pytest.fixture(scope="module")
def crashes(lab_session: Lab) -> Iterator[Crashes]:
    """Both agents with faults allowed, and the container."""
    os.environ["MIGRATOR_FAULTS"] = FAULTS
    made = Crashes(lab_session)
    try:
        for host in HOSTS:
            lab_session.lab("kill", host)
            lab_session.lab("start", host)
        made.start_redis()
        yield made
    finally:
        del os.environ["MIGRATOR_FAULTS"]
        made.forget()
        for host in HOSTS:
            if made.agent_runs(host):
                lab_session.lab("kill", host)
            lab_session.lab("start", host)
        lab_session.remove_all()
    left = {host: lab_session.clean(host) for host in HOSTS}
    assert not any(left.values()), f"left behind after every container was removed: {left}"


@pytest.fixture
def ready(crashes: Crashes) -> Iterator[Crashes]:
    """The container at host-a, no fault asked for."""
    crashes.forget()
    (where,) = crashes.lab.where(NAME)
    if where != A:
        crashes.lab.migrate(NAME, where, A)
    yield crashes
    crashes.forget()
    for row in crashes.lab.status():
        if row["link"] == "cut":
            crashes.lab.lab("heal", row["name"])


# The point where the agent dies, and whether the container has moved when all is over.
SOURCE_DIES = [
    ("source.prepare", False),
    ("source.precopy", False),
    ("source.freeze", False),
    ("source.dump", False),
    ("source.final", False),
    ("source.ready", False),
    ("source.released", True),
    ("source.owner", True),
    ("source.finish", True),
]
DESTINATION_DIES = [
    ("destination.prepare", False),
    ("destination.send", False),
    ("destination.hold", False),
    ("destination.restore", False),
    ("destination.ready", False),
    ("destination.released", True),
    ("destination.owner", True),
    ("destination.run", True),
]


@pytest.mark.parametrize(("point", "moved"), SOURCE_DIES)
def test_source_agent_dies(ready: Crashes, point: str, moved: bool) -> None:
    ready.ask(A, point, "kill")
    with ready.counting() as seen, ready.migrating(A, B):
        eventually("the agent died", lambda: ready.reached(A, point) and not ready.agent_runs(A), 30)
        if not moved:
            # The guard alone brings it back, without the agent.
            value = ready.counter()
            eventually("it counts on without the agent", lambda: ready.counter() > value, 3)
        ready.forget()
        where = ready.settled(moved=moved)
    if not moved:
        assert seen["longest_ms"] < 1500, seen
    print(f"{point}: at {where}, longest gap {seen['longest_ms']:.0f} ms")
    ready.lab.migrate(NAME, where, B if where == A else A)


@pytest.mark.parametrize(("point", "moved"), DESTINATION_DIES)
def test_destination_agent_dies(ready: Crashes, point: str, moved: bool) -> None:
    ready.ask(B, point, "kill")
    with ready.counting() as seen, ready.migrating(A, B):
        eventually("the agent died", lambda: ready.reached(B, point) and not ready.agent_runs(B), 30)
        if not moved:
            value = ready.counter()
            eventually("it counts on at the source", lambda: ready.counter() > value, 3)
        ready.forget()
        where = ready.settled(moved=moved)
    if not moved:
        assert seen["longest_ms"] < 1500, seen
    print(f"{point}: at {where}, longest gap {seen['longest_ms']:.0f} ms")
    ready.lab.migrate(NAME, where, B if where == A else A)


@pytest.mark.parametrize(
    ("host", "point", "moved"),
    [
        # Nothing waits yet: a cut as short as this one may be outlasted.
        (B, "destination.prepare", None),
        (A, "source.precopy", None),
        (B, "destination.hold", False),
        (B, "destination.restore", False),
        (B, "destination.ready", False),
        (B, "destination.released", True),
        (B, "destination.owner", True),
    ],
)
def test_link_is_cut(ready: Crashes, host: str, point: str, moved: bool | None) -> None:
    """The destination's link: the client reaches the container at the source all the time."""
    ready.ask(host, point, "hang")
    with ready.counting() as seen, ready.migrating(A, B):
        eventually("it got there", lambda: ready.reached(host, point), 30)
        ready.lab.lab("cut", B)
        ready.forget()
        if moved:
            time.sleep(3)
        else:
            value = ready.counter()
            eventually("it counts on at the source", lambda: ready.counter() > value, 10)
            time.sleep(1)
        ready.lab.lab("heal", B)
        where = ready.settled(moved=moved)
    print(f"cut at {point}: at {where}, longest gap {seen['longest_ms']:.0f} ms")
    ready.lab.migrate(NAME, where, B if where == A else A)


@pytest.mark.parametrize(
    "point", ["destination.prepare", "destination.send", "destination.hold", "destination.restore", "destination.ready"]
)
def test_cancelled(ready: Crashes, point: str) -> None:
    ready.ask(B, point, "hang")
    with ready.counting() as seen, ready.migrating(A, B) as migrate:
        eventually("it got there", lambda: ready.reached(B, point), 30)
        (migration,) = [row["migration"] for row in ready.lab.ps(A).values()]
        began = time.monotonic()
        ready.lab.ok(A, "migrator", "migrations", "cancel", migration)
        value = ready.counter()
        eventually("it counts on", lambda: ready.counter() > value, 3)
        took = time.monotonic() - began
        ready.forget()
        out, err = migrate.communicate(timeout=30)
        assert migrate.returncode == 130, (out, err)
        ready.settled(moved=False)
    print(f"cancelled at {point}: {took * 1000:.0f} ms with three commands, longest gap {seen['longest_ms']:.0f} ms")
    ready.lab.migrate(NAME, A, B)


def test_source_gone_for_good(ready: Crashes) -> None:
    """Nothing was promised yet: the destination cleans up by itself."""
    ready.ask(A, "source.precopy", "kill")
    with ready.migrating(A, B):
        eventually("the agent died", lambda: not ready.agent_runs(A), 30)
        eventually("nothing is left", lambda: not ready.lab.leftovers(B), 60)
    ready.forget()
    ready.settled(moved=False)


def test_restart_disturbs_nothing(ready: Crashes) -> None:
    with ready.counting() as seen:
        for host in HOSTS:
            ready.lab.lab("kill", host)
            ready.lab.lab("start", host)
        ready.settled(moved=False)
    assert seen["longest_ms"] < 200, seen
