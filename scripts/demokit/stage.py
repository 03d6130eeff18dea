"""The demo's hands: commands inside the hosts and on the client machine, and what they find there."""

import json
import secrets
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from demokit import screen
from labkit import leftovers
from labkit.hosts import CHECKOUT

LAB = str(CHECKOUT / "scripts/lab")
CLIENT = ("python3", str(CHECKOUT / "scripts/labkit/client.py"))
CONTAINER, ADDRESS, PORT = "ct101", "10.77.2.101", "6379"
READY_S = 20.0
CLEAN_S = 10.0
CANCEL_S = 10.0

Done = subprocess.CompletedProcess[str]


class DemoError(Exception):
    """The demo cannot go on."""


@dataclass(frozen=True)
class Move:
    """One move: what `migrate` reported, when it ran (CLOCK_MONOTONIC), and what was found after it."""

    source: str
    destination: str
    began_s: float
    ended_s: float
    outcome: str
    downtime_ms: float
    where: Sequence[str]
    file_kept: bool
    left: leftovers.Leftovers


class Stage:
    """The hosts of a lab that is up."""

    def __init__(self, hosts: Sequence[str]) -> None:
        self._hosts = hosts
        self._before = {host: leftovers.present(host) for host in hosts}

    def migrator(self, host: str, *words: str) -> None:
        """Show and run one `migrator` command, with the first line of its progress if it reports any."""
        screen.command(host, ["migrator", *words])
        command = [LAB, "run", host, "--", "migrator", *words]
        said: list[str] = []
        with subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        ) as process:
            assert process.stderr is not None
            for line in process.stderr:
                said.append(line)
                if len(said) == 1 and not line.startswith("migrator: "):
                    screen.note(line.strip())
        if process.returncode != 0:
            raise DemoError(_failed(command, process.returncode, "".join(said)))

    def wait_for_redis(self) -> None:
        _wait("Redis does not answer", READY_S, lambda: _client("redis", "PING").stdout.strip() == '"PONG"')

    def ask_client(self, verb: str, *words: object) -> Any:
        """One question of the client program to Redis, its answer."""
        done = _client(verb, *map(str, words))
        if done.returncode != 0:
            raise DemoError(f"the client's {verb}: {_last_line(done.stderr)}")
        return json.loads(done.stdout)

    def counter(self) -> int:
        return int(self.ask_client("redis", "GET", "counter"))

    def move(self, number: int, source: str, destination: str) -> Move:
        """Write a file, move the container, and look at everything."""
        file, word = f"/root/before-move-{number}", secrets.token_hex(8)
        _ok(["run", source, "--", "migrator", "exec", CONTAINER, "--", "sh", "-c", f"echo {word} >{file}"])
        screen.command(source, ["migrate", CONTAINER, destination])
        began = time.monotonic()
        report = _migrate(source, destination)
        ended = time.monotonic()
        found = _ok(["run", destination, "--", "migrator", "exec", CONTAINER, "--", "cat", file])
        return Move(
            source,
            destination,
            began,
            ended,
            outcome=report["outcome"],
            downtime_ms=report["downtime_ms"],
            where=self.where(),
            file_kept=found.strip() == word,
            left=self._left(source),
        )

    def where(self) -> list[str]:
        """The hosts whose `migrator ps` has the container running."""
        rows = {host: json.loads(_ok(["run", host, "--", "migrator", "ps", "-o", "json"])) for host in self._hosts}
        return [
            host
            for host, found in rows.items()
            if any(row["name"] == CONTAINER and row["state"] == "running" for row in found)
        ]

    def _left(self, host: str) -> leftovers.Leftovers:
        """What is left at a host, once the end of the migration has had its time."""
        deadline = time.monotonic() + CLEAN_S
        while (found := leftovers.beyond(self._before[host], host)) and time.monotonic() < deadline:
            time.sleep(0.1)
        return found


def pauses(moves: Sequence[Move], report: dict[str, Any]) -> tuple[list[float], float]:
    """The longest time between two answers in each move and outside all of them, less the typical one; in ms."""
    in_moves, elsewhere = [0.0] * len(moves), 0.0
    for start_s, length_s in report["pauses"]:
        milliseconds = (length_s - report["typical_s"]) * 1000
        for index, move in enumerate(moves):
            if move.began_s <= start_s <= move.ended_s:
                in_moves[index] = max(in_moves[index], milliseconds)
                break
        else:
            elsewhere = max(elsewhere, milliseconds)
    return in_moves, elsewhere


class Client:
    """The counting client, for the length of a block."""

    def __init__(self) -> None:
        # A session of its own: Ctrl-C is the demo's to handle.
        self._process = subprocess.Popen(
            [LAB, "client", "--", *CLIENT, "count", ADDRESS, PORT],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def stop(self) -> dict[str, Any]:
        """End the count; its report. Raises DemoError if it had ended by itself."""
        self._process.terminate()
        out, err = self._process.communicate(timeout=60)
        if self._process.returncode != 0:
            raise DemoError(f"the client broke off: {_last_line(err)}")
        report: dict[str, Any] = json.loads(out)
        return report

    def __enter__(self) -> Self:
        try:
            _wait("the client does not count", READY_S, lambda: _client("redis", "GET", "counter").stdout != "null\n")
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def _end(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.communicate()


def lab(*words: str) -> Done:
    """scripts/lab, in a session of its own: interrupted, it undoes what it has begun before this raises."""
    process = subprocess.Popen(
        [LAB, *words],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, err = process.communicate()
    except KeyboardInterrupt:
        process.send_signal(signal.SIGINT)
        process.communicate()
        if words[0] == "up" and process.returncode == 0:  # it was done by then
            lab("down")
        raise
    return Done(process.args, process.returncode, out, err)


def _migrate(source: str, destination: str) -> Any:
    """Its object. Its phases go to standard error as they happen: the reader of our output sees them."""
    command = [LAB, "run", source, "--", "migrate", CONTAINER, destination, "-o", "json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=sys.stdout, text=True)
    try:
        out, _ = process.communicate()
    except KeyboardInterrupt:
        # Ctrl-C is for it, too: it cancels and says so.
        try:
            process.communicate(timeout=CANCEL_S)
        except subprocess.TimeoutExpired:
            process.kill()
        raise
    if process.returncode != 0:
        raise DemoError(f"migrate ended with exit code {process.returncode}: {out.strip()}")
    return json.loads(out)


def _client(verb: str, *words: str) -> Done:
    command = [LAB, "client", "--", *CLIENT, verb, ADDRESS, PORT, *words]
    return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)


def _ok(words: Sequence[str]) -> str:
    """What `scripts/lab` with these words writes; it must work."""
    command = [LAB, *words]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise DemoError(_failed(command, done.returncode, done.stderr))
    return done.stdout


def _failed(command: Sequence[str], code: int, said: str) -> str:
    last_words = "\n".join(said.strip().splitlines()[-10:])
    return f"scripts/{Path(LAB).name} {shlex.join(command[1:])} ended with exit code {code}:\n{last_words}"


def _wait(what: str, within_s: float, probe: Callable[[], bool]) -> None:
    deadline = time.monotonic() + within_s
    while not probe():
        if time.monotonic() > deadline:
            raise DemoError(f"{what} within {within_s:g} s")
        time.sleep(0.1)


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no word"])[-1]
