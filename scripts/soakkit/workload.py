"""A container whose every loss shows: a Redis under clients that count, and a file that it writes line by line."""

import json
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from labkit.hosts import CHECKOUT
from tests.lab.lab_kit import Lab, eventually

NAME, ADDRESS, PORT = "soak", "10.77.2.160", 6379
IDLE_CONNECTIONS = 20
# A line is in the file before the next one is begun; every twentieth is synced.
_WRITER = "i=0; while :; do i=$((i+1)); echo $i >>/lines; [ $((i%20)) -ne 0 ] || sync /lines; sleep 0.02; done"
_SERVER = "redis-server --bind 0.0.0.0 --protected-mode no --save ''"
# Opens connections, holds them, and asks on each of them once at the end.
_HOLD = """
import signal, socket, sys
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
held = [socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=30) for _ in range(int(sys.argv[3]))]
print("connected", flush=True)
signal.sigwait({signal.SIGTERM})
for connection in held:
    connection.sendall(b"PING\\r\\n")
    assert connection.recv(100) == b"+PONG\\r\\n"
print(len(held), flush=True)
"""


class SoakError(Exception):
    """The container or its clients have lost something."""


def start(lab: Lab, host: str) -> None:
    """The container, at this host, and its Redis answers."""
    lab.image(host, "redis")
    command = ["sh", "-c", f"({_WRITER}) & exec {_SERVER}"]
    lab.start(
        host, NAME, "redis", "--disk", "1GiB", "--memory", "256MiB", "--ip", f"{ADDRESS}/16", "-p", "6379:6379",
        command=command,
    )  # fmt: skip
    eventually("Redis answers", lambda: "PONG" in lab.client("redis-cli", "-h", ADDRESS, "ping").stdout)


@contextmanager
def clients(lab: Lab) -> Iterator[dict[str, Any]]:
    """One that counts and many that are idle, for the length of the block; the report is there afterwards.

    Raises SoakError if an answer was wrong or missing, or a connection was lost.
    """
    report: dict[str, Any] = {}
    counting = ["python3", str(CHECKOUT / "scripts/labkit/client.py"), "count", ADDRESS, str(PORT)]
    holding = ["python3", "-c", _HOLD, ADDRESS, str(PORT), str(IDLE_CONNECTIONS)]
    with lab.background("client", *counting) as counter, lab.background("client", *holding) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        eventually("the client counts", lambda: lab.redis(ADDRESS, "get", "counter") != "")
        yield report
        kept, _ = _end(holder)
        report |= json.loads(_end(counter)[0])
    if report["wrong"] or not report["same_connection"]:
        raise SoakError(f"the client was answered {report['wrong'][:3]}")
    if int(kept) != IDLE_CONNECTIONS:
        raise SoakError(f"{kept} of {IDLE_CONNECTIONS} idle connections are left")


def _end(process: "subprocess.Popen[str]") -> tuple[str, str]:
    process.terminate()
    out, err = process.communicate(timeout=70)
    if process.returncode != 0:
        raise SoakError(f"a client ended: {err.strip().splitlines()[-1:]}")
    return out, err


def written(lab: Lab, host: str) -> int:
    """How many lines the file has: all of them, in order, and more than that in a moment. Raises SoakError."""
    lines = lab.exec(host, NAME, "cat", "/lines").split()
    wanted = [str(number) for number in range(1, len(lines) + 1)]
    if lines != wanted:
        at = next(index for index, (line, want) in enumerate(zip(lines, wanted, strict=True)) if line != want)
        raise SoakError(f"line {at + 1} of the file is {lines[at]!r}")
    eventually("the file grows", lambda: int(lab.exec(host, NAME, "tail", "-n1", "/lines")) > len(lines))
    return len(lines)
