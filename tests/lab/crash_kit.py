"""A container under a client that counts, between two agents that fail where a test asks for it (`migrator.faults`)."""

import json
import os
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from labkit.hosts import STATE
from tests.lab.lab_kit import HOSTS, Lab, eventually

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
        self.lab.image(A, "redis")
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

    def boot_all(self) -> None:
        """Every host that has no power has it again."""
        for row in self.lab.status():
            if not row["pid"]:
                self.lab.lab("boot", row["name"])

    def agent_runs(self, host: str) -> bool:
        return bool(next(row for row in self.lab.status() if row["name"] == host)["agent"] == "running")

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

        def others() -> list[str]:
            return [line for line in self.lab.leftovers(where)["processes"] if not re.search("redis|conmon", line)]

        # One that has just ended may not have been waited for yet.
        eventually("no process is left where it runs", lambda: not others(), 5)
        found = self.lab.leftovers(where)
        assert not [file for file in found["files"] if "migrations" in file], found
        return where


@contextmanager
def faults_allowed(lab: Lab) -> Iterator[Crashes]:
    """Both agents are started anew so that they do what is asked of them, and without that at the end; then every host
    has power, no container is left, and nothing of one."""
    os.environ["MIGRATOR_FAULTS"] = FAULTS
    made = Crashes(lab)
    try:
        for host in HOSTS:
            lab.lab("kill", host)
            lab.lab("start", host)
        yield made
    finally:
        del os.environ["MIGRATOR_FAULTS"]
        made.boot_all()
        made.forget()
        for host in HOSTS:
            if made.agent_runs(host):
                lab.lab("kill", host)
            lab.lab("start", host)
        lab.remove_all()
    left = {host: lab.clean(host) for host in HOSTS}
    assert not any(left.values()), f"left behind after every container was removed: {left}"
