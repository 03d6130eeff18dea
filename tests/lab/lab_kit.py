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

CHECKOUT = Path(__file__).resolve().parents[2]
SCRIPT = str(CHECKOUT / "scripts/lab")
PROGRAMS = CHECKOUT / "tests/lab/programs"
CLIENT = ("python3", str(PROGRAMS / "client.py"))
STATE = Path("/var/lib/migrator-lab")
CGROUPS = Path("/sys/fs/cgroup")
HOSTS = ("host-a", "host-b")
# What a container or a migration puts below a host's state and run folders.
STATE_FOLDERS = ("volumes", "containers", "checkpoints", "pool/volumes", "pool/images/unfinished")
RUN_FOLDERS = ("migrations", "runc", "exits", "images", "restore")
COMMAND_TIMEOUT_S = 120.0

Done = subprocess.CompletedProcess[str]
Leftovers = dict[str, list[str]]


@dataclass
class Lab:
    """Two hosts that are up. Host names are host-a and host-b."""

    baseline: dict[str, Leftovers] = field(default_factory=dict)
    _images: set[tuple[str, str]] = field(default_factory=set)

    # -- commands ---------------------------------------------------------------------------------------------------

    def run(self, host: str, *command: str, stdin: str | None = None, timeout_s: float = COMMAND_TIMEOUT_S) -> Done:
        """A command inside a host, whatever its exit code."""
        return _run([SCRIPT, "run", host, "--", *command], stdin, timeout_s)

    def client(self, *command: str, stdin: str | None = None, timeout_s: float = COMMAND_TIMEOUT_S) -> Done:
        """A command on the outside machine, whatever its exit code."""
        return _run([SCRIPT, "client", "--", *command], stdin, timeout_s)

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
        return subprocess.Popen([SCRIPT, *where, "--", *command], text=True, **(pipes | options))

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
        done = _run([SCRIPT, *arguments], None, COMMAND_TIMEOUT_S)
        assert done.returncode == 0, f"scripts/lab {' '.join(arguments)}: {done.stderr}"

    def status(self) -> list[dict[str, Any]]:
        """The hosts as `scripts/lab status -o json` shows them."""
        hosts: list[dict[str, Any]] = json.loads(_run([SCRIPT, "status", "-o", "json"], None, 30.0).stdout)["hosts"]
        return hosts

    # -- containers -------------------------------------------------------------------------------------------------

    def image(self, host: str, name: str, *packages: str) -> None:
        """A Debian bookworm with these packages is an image of the host."""
        if (host, name) not in self._images:
            done = self.run(
                host, "migrator", "image", "build", name, "--suite", "bookworm", "--include", ",".join(packages),
                timeout_s=400,
            )  # fmt: skip
            assert done.returncode == 0, done.stderr
            self._images.add((host, name))

    def start(self, host: str, name: str, image: str, *options: str, command: Sequence[str]) -> None:
        """Make a container and start it."""
        self.ok(host, "migrator", "create", name, "--image", image, *options, "--", *command)
        self.ok(host, "migrator", "start", name)

    def exec(self, host: str, container: str, *command: str, stdin: str | None = None) -> str:
        """What a command in the container writes to standard output; it must exit with 0."""
        interactive = [] if stdin is None else ["-i"]
        return self.ok(host, "migrator", "exec", *interactive, container, "--", *command, stdin=stdin)

    def start_workload(self, host: str, name: str, feature: str, address: str, *options: str) -> None:
        """A container that runs programs/workload.py, and answers."""
        self.image(host, "tools", "nginx-light", "python3")
        wait = "until test -e /workload.ready; do sleep 0.02; done; exec python3 /workload.py " + feature
        self.start(host, name, "tools", "--ip", f"{address}/16", *options, command=["sh", "-c", wait])
        push = "cat >/workload.py && touch /workload.ready"
        self.exec(host, name, "sh", "-c", push, stdin=(PROGRAMS / "workload.py").read_text())
        done = ["sh", "-c", f"until python3 {PROGRAMS}/client.py ask {address} 7000 facts; do sleep 0.1; done"]
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
            eventually("the client counts", lambda: self.redis(address, "get", "counter") != "", within_s)
            yield report
            process.terminate()
            out, err = process.communicate(timeout=60)
            assert process.returncode == 0, err
            report |= json.loads(out)

    def redis(self, address: str, *command: str) -> str:
        """What redis-cli on the client answers."""
        return self.client_ok("redis-cli", "-h", address, *command).strip()

    def start_redis(self, host: str, name: str, address: str, *options: str, bind: str = "0.0.0.0") -> None:
        """A container with a Redis that answers."""
        self.image(host, "redis", "redis-server")
        server = ["redis-server", "--bind", *bind.split(), "--protected-mode", "no", "--enable-debug-command", "yes"]
        self.start(host, name, "redis", "--ip", f"{address}/16", *options, command=server)
        eventually("redis answers", lambda: "PONG" in self.client("redis-cli", "-h", address, "ping").stdout)

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
        before = self.baseline[host]
        new = {kind: sorted(set(found) - set(before[kind])) for kind, found in present(host).items()}
        return {kind: found for kind, found in new.items() if found}

    def clean(self, host: str, within_s: float = 10.0) -> Leftovers:
        """`leftovers` once they have gone, or after `within_s` what has not: the finish phase is allowed its time."""
        deadline = time.monotonic() + within_s
        while (found := self.leftovers(host)) and time.monotonic() < deadline:
            time.sleep(0.1)
        return found


def eventually(what: str, probe: Callable[[], bool], within_s: float = 15.0) -> None:
    """Wait until it is so; fails with `what` if it does not become so."""
    deadline = time.monotonic() + within_s
    while not probe():
        assert time.monotonic() < deadline, f"not within {within_s:g} s: {what}"
        time.sleep(0.05)


def present(host: str) -> Leftovers:
    """Everything of a kind that containers and migrations consist of, on one host."""
    init = int((STATE / host / "init.pid").read_text())
    root = Path(f"/proc/{init}/root")
    return {
        "loop devices": _loops(root / "var/lib/migrator"),
        "mounts": _mounts(init),
        "network namespaces": _names(root / "run/netns"),
        "links": _links(init),
        "nftables tables": _tables(init),
        "cgroups": _cgroups(host),
        "processes": _processes(init),
        "files": _files(root),
    }


def _run(command: Sequence[str], stdin: str | None, timeout_s: float) -> Done:
    source: dict[str, Any] = {"stdin": subprocess.DEVNULL} if stdin is None else {"input": stdin}
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False, **source)


def _inside(init: int, *command: str) -> str:
    enter = ["nsenter", f"--target={init}", "--mount", "--net", "--"]
    return subprocess.run([*enter, *command], capture_output=True, text=True, check=True).stdout


def _loops(state: Path) -> list[str]:
    """Devices on files in the host's state folder or in its pool, which is a file system of its own."""
    listing = subprocess.run(
        ["losetup", "--list", "--json", "--output", "NAME,BACK-INO,BACK-MAJ:MIN,BACK-FILE"],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    pool = _device((state / "pool").stat().st_dev) if (state / "pool").is_mount() else ""
    inodes = set()
    for folder, _, names in os.walk(state):
        for name in names:
            try:
                found = Path(folder, name).lstat()
            except FileNotFoundError:
                continue
            inodes.add((_device(found.st_dev), found.st_ino))
    loops = json.loads(listing)["loopdevices"] if listing.strip() else []
    return [
        f"{Path(loop['back-file'].removesuffix(' (deleted)')).name} at {loop['name']}"
        for loop in loops
        if loop["back-maj:min"].strip() == pool or (loop["back-maj:min"].strip(), loop["back-ino"]) in inodes
    ]


def _device(number: int) -> str:
    return f"{os.major(number)}:{os.minor(number)}"


def _mounts(init: int) -> list[str]:
    return [line.split()[4] for line in Path(f"/proc/{init}/mountinfo").read_text().splitlines()]


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


def _links(init: int) -> list[str]:
    return [link["ifname"] for link in json.loads(_inside(init, "ip", "-json", "link"))]


def _tables(init: int) -> list[str]:
    return _inside(init, "nft", "list", "tables").splitlines()


def _cgroups(host: str) -> list[str]:
    found = []
    for group in (*CGROUPS.glob(f"migrator-{host}"), *CGROUPS.glob(f"*/migrator-{host}")):
        # The one for all conmons stays; what is still in it is among the processes.
        groups = [path for path in group.rglob("*") if path.is_dir() and path.name != "_conmon"]
        found += [str(path.relative_to(CGROUPS)) for path in groups]
    return found


def _processes(init: int) -> list[str]:
    """All but the host's init, its agent, and the commands that a test runs there at the moment."""
    proc = Path(f"/proc/{init}/root/proc")
    agent = Path(f"/proc/{init}/root/run/lab-agent.pid")
    mine = {1, int(agent.read_text()) if agent.exists() else 0}
    found = []
    for folder in proc.iterdir():
        if not folder.name.isdecimal() or int(folder.name) in mine:
            continue
        try:
            command = (folder / "cmdline").read_bytes()[:200].replace(b"\0", b" ").decode(errors="replace").strip()
            state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            continue
        found.append(f"{folder.name} {command or '[no command]'} ({state})")
    return found


def _files(root: Path) -> list[str]:
    folders = [root / "var/lib/migrator" / name for name in STATE_FOLDERS]
    folders += [root / "run/migrator" / name for name in RUN_FOLDERS]
    found = []
    for folder in folders:
        if folder.is_dir():
            found += [f"/{path.relative_to(root)}" for path in folder.iterdir()]
    return found
