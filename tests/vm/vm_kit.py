"""Virtual machines as their tests use them: what `tests.lab.lab_kit` does with hosts, and power."""

import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agent import template
from agent.tarball import Cancel
from labkit.leftovers import Leftovers, difference
from tests.lab.lab_kit import CHECKOUT, HOSTS, PACKAGES, SUITE, Lab, eventually

SCRIPT = str(CHECKOUT / "scripts/vmlab")
# Emulation costs a factor of 15 or so, and takes what the rest of the machine leaves.
SLOWER = 30.0
IN_MACHINE = "/opt/migrator"
UP_S = 2400
MOVES_TRIED = 4
FAULTS = "/run/faults"
DROP_IN = "/etc/systemd/system/migrator-agent.service.d"
# As on this machine, from where new machines have them.
TEMPLATES = Path("/var/cache/migrator")
SETTLE_S = 30.0
REACHED_EACH_S, ASKED_EACH_S = 2.0, 30.0


@dataclass
class Machines(Lab):
    """Two virtual machines that are up: HOSTS."""

    script: str = SCRIPT
    slower: float = SLOWER

    def present(self, host: str) -> Leftovers:
        """What containers and migrations consist of, on one machine."""
        command = ("env", f"PYTHONPATH={IN_MACHINE}/scripts", "python3", "-m", "labkit.leftovers")
        found: Leftovers = json.loads(self.ok(host, *command))
        return found

    def remember(self) -> None:
        for host in HOSTS:
            self.baseline[host] = self.present(host)
            images = json.loads(self.ok(host, "migrator", "image", "ls", "-o", "json"))
            self._images |= {(host, image["name"]) for image in images}

    def leftovers(self, host: str) -> Leftovers:
        return difference(self.baseline[host], self.present(host))

    def migrate(self, container: str, source: str, destination: str, *options: str) -> dict[str, Any]:
        """Until it has succeeded, within limits: an emulator that is kept waiting looks like a host that has died."""
        for attempt in range(1, MOVES_TRIED):
            code, report = self.try_migrate(container, source, destination, *options)
            if code == 0:
                assert (report["outcome"], report["where_running"]) == ("migrated", destination), report
                return report
            assert (code, report["outcome"]) == (6, "rolled_back"), f"exit code {code}: {report}"
            print(f"\nattempt {attempt} to move {container} was rolled back: {report['error']['message']}")
        return super().migrate(container, source, destination, *options)

    def power_cut(self, host: str) -> None:
        """What the machine has not flushed to its disk is lost."""
        self.lab("power-cut", host)

    def boot(self, host: str) -> None:
        """Returns when it answers and its agent is ready."""
        self.lab("boot", host)
        self.await_agent(host)

    def boot_all(self) -> None:
        """Those that have no power."""
        for row in self.status():
            if row["name"] in HOSTS and row["power"] == "off":
                self.boot(row["name"])

    def reboot(self, host: str) -> None:
        """By systemd, in order; returns when it is up again and its agent is ready."""
        boot = ("cat", "/proc/sys/kernel/random/boot_id")
        before = self.ok(host, *boot)
        self.run(host, "systemctl", "reboot")

        def is_new() -> bool:
            told = self.run(host, *boot)
            return told.returncode == 0 and told.stdout != before

        eventually(f"{host} is up again", is_new, 60 * self.slower)
        self.await_agent(host)

    def allow_faults(self) -> None:
        """From now on, and after each boot, the agents do what `go_wrong` asks of them (`migrator.faults`)."""
        unit = f"[Service]\nEnvironment=MIGRATOR_FAULTS={FAULTS}\n"
        for host in HOSTS:
            script = f"mkdir -p {DROP_IN}; cat >{DROP_IN}/faults.conf; systemctl daemon-reload; sync"
            self.ok(host, "sh", "-ec", script, stdin=unit)
        self.restart_agents()

    def forbid_faults(self) -> None:
        """As they were."""
        for host in HOSTS:
            self.ok(host, "sh", "-ec", f"rm -rf {DROP_IN} {FAULTS}*; systemctl daemon-reload")
        self.restart_agents()

    def release(self, host: str) -> str:
        """Its suite of Debian."""
        return self.ok(host, "sh", "-c", ". /etc/os-release; echo $VERSION_CODENAME").strip()

    def restart_agent(self, host: str) -> None:
        """Returns when it is ready."""
        self.ok(host, "systemctl", "restart", "migrator-agent")

    def restart_agents(self) -> None:
        """Of both hosts, side by side."""
        with ThreadPoolExecutor(len(HOSTS)) as pool:
            list(pool.map(self.restart_agent, HOSTS))

    def go_wrong(self, host: str, point: str, action: str) -> None:
        """Have something go wrong there; `allow_faults` was called. A boot forgets it."""
        self.ok(host, "sh", "-c", f"cat >{FAULTS}", stdin=f"{point} {action}\n")

    def forget(self, host: str) -> None:
        """Nothing goes wrong there any more."""
        self.ok(host, "sh", "-c", f"rm -f {FAULTS}*")

    def reached(self, host: str, point: str) -> bool:
        """Whether it has gone wrong."""
        return point in self.run(host, "cat", f"{FAULTS}.reached").stdout.split()

    def ends(self, container: str) -> dict[str, str]:
        """The hosts of a move from where it is to the other: "source" and "destination"."""
        (source,) = self.where(container)
        return {"source": source, "destination": next(host for host in HOSTS if host != source)}

    def move_until(self, container: str, point: str, meanwhile: Callable[[], object]) -> str:
        """Begin to move it to the other host, until the end that the point is of hangs there; returns that host. Begun
        again if it is rolled back before: see `migrate`."""
        source, destination = (ends := self.ends(container)).values()
        host = ends[point.partition(".")[0]]
        self.go_wrong(host, point, "hang")
        for _ in range(MOVES_TRIED):
            begun = self.run(source, "migrate", container, destination, "--detach", "-o", "json")
            assert begun.returncode == 0, begun.stderr
            name = json.loads(begun.stdout)["migration"]
            asked = time.monotonic()
            while not self.reached(host, point):
                meanwhile()
                # To ask takes seconds of the processor that the migration needs.
                time.sleep(REACHED_EACH_S)
                if time.monotonic() - asked < ASKED_EACH_S:
                    continue
                moving = json.loads(self.ok(source, "migrator", "migrations", "show", name, "-o", "json"))
                asked = time.monotonic()
                if moving["outcome"] != "running":
                    print(f"\nit has not come to {point}: {moving['outcome']}, {moving['error']}")
                    break
            else:
                return host
        raise AssertionError(f"no migration has come to {point}")

    def await_alone(self, container: str, hosts: Sequence[str]) -> str:
        """Wait until it runs at one of these alone, with nothing under way; returns which."""
        found: list[tuple[str, str, str | None]] = []

        def is_alone() -> bool:
            rows = [(host, self.ps(host).get(container)) for host in HOSTS]
            found[:] = [(host, row["state"], row["migration"]) for host, row in rows if row]
            return found in [[(host, "running", None)] for host in hosts]

        eventually(f"{container} runs alone at {' or '.join(hosts)}", is_alone, SETTLE_S * self.slower)
        return found[0][0]

    def await_agent(self, host: str) -> None:
        """Wait until the agent's service has said that it is ready."""
        active = ("systemctl", "is-active", "--quiet", "migrator-agent")
        eventually(f"{host}'s agent is ready", lambda: self.run(host, *active).returncode == 0, 10 * self.slower)


@contextmanager
def faults_allowed(machines: Machines) -> Iterator[Machines]:
    """Agents that do what `go_wrong` asks of them; afterwards all have power, and none has a container."""
    machines.allow_faults()
    yield machines
    machines.boot_all()
    machines.forbid_faults()
    machines.remove_all()


def up(suite: str, count: int = 2) -> None:
    """So many, ready. What images are built from is made here, where that takes a minute and not half an hour."""
    for packages in PACKAGES.values():
        template.build(TEMPLATES, SUITE, packages, print, Cancel())
    done = subprocess.run(
        [SCRIPT, "up", "--suite", suite, "--hosts", str(count)],
        capture_output=True,
        text=True,
        check=False,
        timeout=UP_S,
    )
    assert done.returncode == 0, f"{SCRIPT} up: {done.stdout}{done.stderr}"


def down() -> None:
    """Repeatable."""
    subprocess.run([SCRIPT, "down"], capture_output=True, check=True, timeout=600)


def suite() -> str:
    """What the hosts run, as `scripts/test --vm` was told."""
    return os.environ.get("MIGRATOR_VM_SUITE", "trixie")
