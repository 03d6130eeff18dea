"""The lab's hosts as the benchmark uses them: commands inside, and the links between."""

import json
import shlex
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchkit.errors import BenchError
from labkit.hosts import CHECKOUT, CLIENT, PATH, STATE, SWITCH, host_named

LAB = str(CHECKOUT / "scripts/lab")
SOURCE, DESTINATION = "host-a", "host-b"
COMMAND_TIMEOUT_S = 300.0
ENVIRONMENT = {"PATH": PATH, "HOME": "/root", "LANG": "C.UTF-8", "PYTHONDONTWRITEBYTECODE": "1"}

Done = subprocess.CompletedProcess[str]


class Lab:
    """Two hosts and a client that are up."""

    def inside(self, host: str, *command: str) -> list[str]:
        """The command that runs `command` in a host."""
        return host_named(host).inside(*command)

    def at_client(self, *command: str) -> list[str]:
        """The command that runs `command` on the outside machine."""
        return ["nsenter", f"--net=/run/netns/{CLIENT}", "--", *command]

    def run(self, host: str, *command: str, timeout_s: float = COMMAND_TIMEOUT_S) -> Done:
        """A command inside a host, whatever its exit code. Raises BenchError if it takes too long."""
        return execute(self.inside(host, *command), timeout_s)

    def ok(self, host: str, *command: str, timeout_s: float = COMMAND_TIMEOUT_S) -> str:
        """What a command inside a host writes; it must exit with 0."""
        done = self.run(host, *command, timeout_s=timeout_s)
        if done.returncode != 0:
            raise BenchError(f"{host}: {shlex.join(command)}: exit code {done.returncode}: {last_words(done.stderr)}")
        return done.stdout

    def json(self, host: str, *command: str) -> Any:
        """What a command inside a host writes as JSON."""
        return json.loads(self.ok(host, *command))

    def popen(self, host: str, *command: str, **options: Any) -> "subprocess.Popen[str]":
        """As subprocess.Popen with text pipes; host "client" is the outside machine."""
        words = self.at_client(*command) if host == "client" else self.inside(host, *command)
        pipes: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen(words, text=True, env=ENVIRONMENT, **(pipes | options))

    def state(self, host: str) -> Path:
        """A host's /var/lib/migrator, from outside."""
        return STATE / host / "lib"

    @contextmanager
    def shaped(self, rate: str) -> Iterator[None]:
        """Every host's link to the switch carries `rate`, such as 1gbit, in each direction; "" is as it is."""
        if not rate:
            yield
            return
        ends = [(["ip", "netns", "exec", SWITCH], host) for host in (SOURCE, DESTINATION)]
        ends += [(self.inside(host), "eth0") for host in (SOURCE, DESTINATION)]
        for enter, link in ends:
            limit = ["rate", rate, "burst", "1m", "latency", "50ms"]
            must([*enter, "tc", "qdisc", "replace", "dev", link, "root", "tbf", *limit])
        try:
            yield
        finally:
            for enter, link in ends:
                must([*enter, "tc", "qdisc", "del", "dev", link, "root"])


@contextmanager
def lab_up() -> Iterator[Lab]:
    """A lab of two hosts, taken down at the end. Raises BenchError if there is one already."""
    up = execute([LAB, "up", "--hosts", "2"], COMMAND_TIMEOUT_S)
    if up.returncode != 0:
        raise BenchError(up.stderr.strip().removeprefix("lab: "))
    try:
        yield Lab()
    finally:
        down = execute([LAB, "down"], COMMAND_TIMEOUT_S)
        if down.returncode != 0:
            raise BenchError(f"taking the hosts down: {down.stderr.strip()}")


def execute(command: list[str], timeout_s: float) -> Done:
    """In a session of its own: Ctrl-C is ours to handle."""
    try:
        return subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
            env=ENVIRONMENT,
            start_new_session=True,
        )
    except subprocess.TimeoutExpired:
        raise BenchError(f"{shlex.join(command[-6:])} did not end within {timeout_s:g} s") from None


def must(command: list[str]) -> str:
    """Its output; raises BenchError if it fails."""
    done = execute(command, COMMAND_TIMEOUT_S)
    if done.returncode != 0:
        raise BenchError(f"{shlex.join(command)}: exit code {done.returncode}: {last_words(done.stderr)}")
    return done.stdout


def last_words(text: str, lines: int = 6) -> str:
    """The end of what a program has said, for an error."""
    return " / ".join(text.strip().splitlines()[-lines:]) or "no word"
