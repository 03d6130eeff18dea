"""Making the lab and taking it apart."""

import contextlib
import fcntl
import json
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from labkit import foreign
from labkit.hosts import LabError
from vmkit import accelerator, disk, image, network, power, readme
from vmkit.machines import HOSTS_MAX, LAB_FILE, STATE, SUITES, Machine, lab_machines, ssh_options

PROGRAMS = {"nbdkit": "nbdkit", "ssh": "openssh-client", "mmdebstrap": "mmdebstrap", "git": "git", "ip": "iproute2"}


@contextlib.contextmanager
def locked() -> Iterator[None]:
    with Path("/run/lock/migrator-vmlab").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def suites_of(kind: str, count: int) -> list[str]:
    """Those of the machines: all the same, or one after the other. Raises LabError."""
    if kind not in (*SUITES, "mixed"):
        raise LabError(f"--suite must be {', '.join(SUITES)} or mixed, not {kind!r}", 2)
    if not 1 <= count <= HOSTS_MAX:
        raise LabError(f"--hosts must be 1 to {HOSTS_MAX}, not {count}", 2)
    return [SUITES[index % len(SUITES)] if kind == "mixed" else kind for index in range(count)]


def up(kind: str, count: int, *, bare: bool) -> None:
    """Boot the machines and install the project there; `bare` with nothing prepared. Raises LabError."""
    machines = [Machine(index, suite) for index, suite in enumerate(suites_of(kind, count), 1)]
    with locked():
        if LAB_FILE.exists() and any(machine.pid() for machine in lab_machines()):
            raise LabError("the lab is up already: scripts/vmlab down first", 2)
        install_programs()
        foreign.install_qemu()
        images = {
            suite: image.ready_made(suite, bare=bare) for suite in sorted({machine.suite for machine in machines})
        }
        accelerator.find(images[machines[0].suite] / "vmlinuz")
        remove()
        STATE.mkdir(mode=0o700)
        LAB_FILE.write_text(json.dumps({"suites": [machine.suite for machine in machines]}))
        began = time.monotonic()
        network.make()
        for machine in machines:
            disk.make(machine, images[machine.suite], machines)
            power.on(machine)
        with ThreadPoolExecutor(len(machines)) as pool:
            list(pool.map(power.wait_until_it_answers, machines))
        print(
            f"vmlab: {len(machines)} hosts answer after {time.monotonic() - began:.0f} s ({accelerator.name()})",
            flush=True,
        )
        readme.follow(machines)
        print(f"vmlab: the project is installed after {time.monotonic() - began:.0f} s", flush=True)
    print(f"vmlab: up, with {describe(machines)} and the client 10.77.0.1")


def describe(machines: Sequence[Machine]) -> str:
    return ", ".join(f"{machine.name} {machine.address} ({machine.suite})" for machine in machines)


def install_programs() -> None:
    """As scripts/setup does, for the lab alone."""
    missing = [package for program, package in PROGRAMS.items() if shutil.which(program) is None]
    if not missing:
        return
    print(f"vmlab: installing {' '.join(missing)}", flush=True)
    for command in (["update"], ["install", "--yes", "--no-install-recommends", *missing]):
        done = subprocess.run(["apt-get", "-qq", *command], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise LabError(f"apt-get {command[0]}: {done.stderr.strip()[-500:]}")


def down() -> None:
    with locked():
        remove()
    print("vmlab: down")


def remove() -> None:
    """Every trace of a lab but the cache; right also for what a crash left."""
    for index in range(1, HOSTS_MAX + 1):
        machine = Machine(index, SUITES[0])
        hang_up(machine)
        power.cut(machine)
    network.remove()
    if STATE.exists():
        shutil.rmtree(STATE)


def hang_up(machine: Machine) -> None:
    """End the SSH connection that commands share."""
    if (STATE / f"ssh-{machine.address}").exists():
        end = ["ssh", *ssh_options(), "-O", "exit", f"root@{machine.address}"]
        subprocess.run(end, capture_output=True, check=False)
        (STATE / f"ssh-{machine.address}").unlink(missing_ok=True)
