"""The lab as its tests use it: commands inside hosts and on the client, and what a host has left behind.

Everything goes through `scripts/lab`, as a user would; only `leftovers` looks behind it.
"""

import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from labkit.leftovers import Leftovers, beyond, present

CHECKOUT = Path(__file__).resolve().parents[2]
SCRIPT = str(CHECKOUT / "scripts/lab")
PROGRAMS = CHECKOUT / "tests/lab/programs"
CLIENT = ("python3", str(CHECKOUT / "scripts/labkit/client.py"))
# A lab may have more, for others.
HOSTS = tuple(os.environ.get("LAB_HOSTS", "host-a host-b").split())
COMMAND_TIMEOUT_S = 120.0
CONFIGURATION = "/etc/migrator/config.toml"

# Images, by their names: a Debian with these packages.
SUITE = "bookworm"
PACKAGES = {"redis": ("redis-server",), "tools": ("nginx-light", "python3"), "postgresql": ("postgresql",)}
POSTGRESQL = """\
cd /var/lib/postgresql
printf 'local all all trust\\nhost all all all trust\\n' >/tmp/hba.conf
exec /usr/lib/postgresql/15/bin/postgres -D /var/lib/postgresql/15/main \
    -c config_file=/etc/postgresql/15/main/postgresql.conf -c hba_file=/tmp/hba.conf -c ssl=off \
    -c listen_addresses='*' -c unix_socket_directories=/tmp -c shared_buffers=32MB -c external_pid_file=
"""

Done = subprocess.CompletedProcess[str]


@dataclass
class Lab:
    """Two hosts that are up: HOSTS."""

    script: str = SCRIPT
    # Hosts that are emulated are slower in everything.
    slower: float = 1.0
    baseline: dict[str, Leftovers] = field(default_factory=dict)
    _images: set[tuple[str, str]] = field(default_factory=set)

    # -- commands ---------------------------------------------------------------------------------------------------

    def run(self, host: str, *command: str, stdin: str | None = None, timeout_s: float = COMMAND_TIMEOUT_S) -> Done:
        """A command inside a host, whatever its exit code."""
        return _run([self.script, "run", host, "--", *command], stdin, timeout_s * self.slower)

    def client(self, *command: str, stdin: str | None = None, timeout_s: float = COMMAND_TIMEOUT_S) -> Done:
        """A command on the outside machine, whatever its exit code."""
        return _run([self.script, "client", "--", *command], stdin, timeout_s * self.slower)

    def ok(self, host: str, *command: str, stdin: str | None = None) -> str:
        """What a command inside a host writes to standard output; it must exit with 0."""
        done = self.run(host, *command, stdin=stdin)
        assert done.returncode == 0, f"{host}: {' '.join(command)}: exit code {done.returncode}: {done.stderr}"
        return done.stdout

    def client_ok(self, *command: str, stdin: str | None = None) -> str:
        """As `ok`, on the client."""
        done = self.client(*command, stdin=stdin)
        assert done.returncode == 0, f"client: {' '.join(command)}: exit code {done.returncode}: {done.stderr}"
        return done.stdout

    def popen(self, host: str, *command: str, **options: Any) -> subprocess.Popen[str]:
        """As subprocess.Popen with text pipes; host "client" is the outside machine. The caller ends it."""
        where = ["client"] if host == "client" else ["run", host]
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.DEVNULL}
        return subprocess.Popen([self.script, *where, "--", *command], text=True, **(pipes | options))

    @contextmanager
    def background(self, host: str, *command: str, **options: Any) -> Iterator[subprocess.Popen[str]]:
        """`popen` for the length of a block; what still runs at its end is terminated."""
        process = self.popen(host, *command, **options)
        try:
            yield process
        finally:
            if process.poll() is None:
                process.terminate()
                try:
                    process.wait(10)
                except subprocess.TimeoutExpired:
                    process.kill()
            for pipe in (process.stdin, process.stdout, process.stderr):
                if pipe is not None:
                    pipe.close()
            process.wait()

    def lab(self, *arguments: str) -> None:
        """scripts/lab with these arguments, such as kill HOST; it must exit with 0."""
        done = _run([self.script, *arguments], None, COMMAND_TIMEOUT_S * self.slower)
        assert done.returncode == 0, f"{self.script} {' '.join(arguments)}: {done.stderr}"

    def status(self) -> list[dict[str, Any]]:
        """The hosts as `scripts/lab status -o json` shows them."""
        told = _run([self.script, "status", "-o", "json"], None, 30.0 * self.slower)
        hosts: list[dict[str, Any]] = json.loads(told.stdout)["hosts"]
        return hosts

    @contextmanager
    def configured(self, host: str, change: Callable[[str], str]) -> Iterator[None]:
        """With an agent whose configuration is what `change` makes of it, for the length of a block."""
        before = self.ok(host, "cat", CONFIGURATION)
        self._configure(host, change(before))
        try:
            yield
        finally:
            self._configure(host, before)

    def _configure(self, host: str, text: str) -> None:
        self.ok(host, "tee", CONFIGURATION, stdin=text)
        self.restart_agent(host)

    def restart_agent(self, host: str) -> None:
        """Returns when it is ready."""
        self.lab("kill", host)
        self.lab("start", host)

    # -- containers -------------------------------------------------------------------------------------------------

    def image(self, host: str, name: str) -> None:
        """One of PACKAGES is an image of the host."""
        if (host, name) not in self._images:
            done = self.run(
                host, "migrator", "image", "build", name, "--suite", SUITE, "--include", ",".join(PACKAGES[name]),
                timeout_s=400,
            )  # fmt: skip
            assert done.returncode == 0, done.stderr
            self._images.add((host, name))

    def no_image(self, host: str, name: str) -> None:
        """The host has no such image, whatever was built for other tests."""
        if (host, name) in self._images:
            self.ok(host, "migrator", "image", "rm", name)
            self._images.remove((host, name))

    def start(self, host: str, name: str, image: str, *options: str, command: Sequence[str]) -> None:
        """Make a container and start it."""
        self.ok(host, "migrator", "create", name, "--image", image, *options, "--", *command)
        self.ok(host, "migrator", "start", name)

    def exec(self, host: str, container: str, *command: str, stdin: str | None = None) -> str:
        """What a command in the container writes to standard output; it must exit with 0."""
        interactive = [] if stdin is None else ["-i"]
        return self.ok(host, "migrator", "exec", *interactive, container, "--", *command, stdin=stdin)

    def start_workload(
        self, host: str, name: str, feature: str, address: str, *options: str, program: str = "workload.py"
    ) -> None:
        """A container that runs one of `programs` with these words, and answers."""
        self.image(host, "tools")
        wait = "until test -e /workload.ready; do sleep 0.02; done; exec python3 /workload.py " + feature
        self.start(host, name, "tools", "--ip", f"{address}/16", *options, command=["sh", "-c", wait])
        push = "cat >/workload.py && touch /workload.ready"
        self.exec(host, name, "sh", "-c", push, stdin=(PROGRAMS / program).read_text())
        done = ["sh", "-c", f"until {' '.join(CLIENT)} ask {address} 7000 facts; do sleep 0.1; done"]
        self.client_ok("timeout", "20", *done)

    def ask(self, address: str, word: str = "facts") -> dict[str, Any]:
        """What a workload answers to the client."""
        answer: dict[str, Any] = json.loads(self.client_ok(*CLIENT, "ask", address, "7000", word))
        return answer

    @contextmanager
    def counting(self, address: str, within_s: float = 30.0) -> Iterator[dict[str, Any]]:
        """A client counts on one connection to a Redis during the block; afterwards the dictionary is its report."""
        report: dict[str, Any] = {}
        with self.background("client", *CLIENT, "count", address, "6379") as process:
            within_s *= self.slower
            eventually("the client counts", lambda: self.redis(address, "get", "counter") != "", within_s)
            yield report
            process.terminate()
            out, err = process.communicate(timeout=60 * self.slower)
            assert process.returncode == 0, err
            report |= json.loads(out)

    def redis(self, address: str, *command: str) -> str:
        """What redis-cli on the client answers."""
        return self.client_ok("redis-cli", "-h", address, *command).strip()

    def start_redis(
        self, host: str, name: str, address: str, *options: str, bind: str = "0.0.0.0", arguments: Sequence[str] = ()
    ) -> None:
        """A container with a Redis that answers."""
        self.image(host, "redis")
        server = ["redis-server", "--bind", *bind.split(), "--protected-mode", "no", "--enable-debug-command", "yes"]
        server += arguments
        self.start(host, name, "redis", "--ip", f"{address}/16", *options, command=server)
        ping = ("redis-cli", "-h", address, "ping")
        eventually("redis answers", lambda: "PONG" in self.client(*ping).stdout, 15 * self.slower)

    def start_postgresql(self, host: str, name: str, address: str, *options: str) -> None:
        """A container with a PostgreSQL that answers, and trusts everybody."""
        self.image(host, "postgresql")
        options = ("--ip", f"{address}/16", "--user", "postgres", *options)
        self.start(host, name, "postgresql", *options, command=["sh", "-c", POSTGRESQL])
        self.await_postgresql(address)

    def await_postgresql(self, address: str) -> None:
        """It answers the client."""
        ready = ("pg_isready", "-q", "-h", address)
        eventually("PostgreSQL is ready", lambda: self.client(*ready).returncode == 0, 30 * self.slower)

    def psql(self, address: str, statement: str) -> str:
        """What psql on the client answers."""
        return self.client_ok("psql", "-h", address, "-U", "postgres", "-AtX", "-c", statement).strip()

    def ps(self, host: str) -> dict[str, dict[str, Any]]:
        """`migrator ps -o json`, by container."""
        return {row["name"]: row for row in json.loads(self.ok(host, "migrator", "ps", "-o", "json"))}

    def where(self, container: str) -> list[str]:
        """The hosts whose `migrator ps` lists it."""
        return [host for host in HOSTS if container in self.ps(host)]

    def try_migrate(self, container: str, source: str, destination: str, *options: str) -> tuple[int, dict[str, Any]]:
        """Exit code and the object of `migrate -o json`; empty where it wrote none."""
        done = self.run(source, "migrate", container, destination, *options, "-o", "json")
        return done.returncode, json.loads(done.stdout or "{}")

    def migrate(self, container: str, source: str, destination: str, *options: str) -> dict[str, Any]:
        """The object of a migration that must succeed."""
        code, report = self.try_migrate(container, source, destination, *options)
        assert code == 0 and report["outcome"] == "migrated", f"exit code {code}: {report}"
        assert report["where_running"] == destination
        return report

    def remove_all(self) -> None:
        """No container on any host."""
        for host in HOSTS:
            for name in self.ps(host):
                self.ok(host, "migrator", "rm", "-f", name)

    # -- what is there ----------------------------------------------------------------------------------------------

    def remember(self) -> None:
        """What is on the hosts now is none of `leftovers`."""
        self.baseline = {host: present(host) for host in HOSTS}

    def leftovers(self, host: str) -> Leftovers:
        """What is on the host beyond what was there when the lab came up, by kind; empty when there is nothing."""
        return beyond(self.baseline[host], host)

    def clean(self, host: str, within_s: float = 10.0) -> Leftovers:
        """`leftovers` once they have gone, or after `within_s` what has not: the finish phase is allowed its time."""
        deadline = time.monotonic() + within_s * self.slower
        while (found := self.leftovers(host)) and time.monotonic() < deadline:
            time.sleep(0.1)
        return found


def eventually(what: str, probe: Callable[[], bool], within_s: float = 15.0) -> None:
    """Wait until it is so; fails with `what` if it does not become so."""
    deadline = time.monotonic() + within_s
    while not probe():
        assert time.monotonic() < deadline, f"not within {within_s:g} s: {what}"
        time.sleep(0.05)


def _run(command: Sequence[str], stdin: str | None, timeout_s: float) -> Done:
    source: dict[str, Any] = {"stdin": subprocess.DEVNULL} if stdin is None else {"input": stdin}
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False, **source)
