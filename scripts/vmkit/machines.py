"""What the lab is made of: names, addresses, files, and how to get inside a machine."""

import json
import os
import shlex
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from labkit.hosts import Host, LabError

CACHE = Path("/var/cache/migrator-vmlab")
STATE = Path("/var/lib/migrator-vmlab")
LAB_FILE = STATE / "lab.json"
KEY = CACHE / "key"
SWITCH, CLIENT = "migrator-vmlab-switch", "migrator-vmlab-client"
CLIENT_ADDRESS = "10.77.0.1"
SUITES = ("bookworm", "trixie")
HOSTS_MAX = 8


@dataclass(frozen=True)
class Machine:
    """One virtual machine; the first has index 1. Its addresses are those that scripts/lab gives to its host."""

    index: int
    suite: str

    @cached_property
    def name(self) -> str:
        return Host(self.index).name

    @property
    def address(self) -> str:
        return Host(self.index).address

    @property
    def address6(self) -> str:
        return Host(self.index).address6

    @property
    def mac(self) -> str:
        return f"02:77:01:00:00:{self.index:02x}"

    @property
    def folder(self) -> Path:
        return STATE / self.name

    @property
    def disk(self) -> Path:
        return self.folder / "disk.raw"

    @property
    def console(self) -> Path:
        """What the kernel and systemd said, of all boots."""
        return self.folder / "console.log"

    def pid(self) -> int:
        """That of its QEMU, or 0 when it does not run."""
        return running(self.folder / "qemu.pid", b"qemu-system")

    def inside(self, *command: str) -> list[str]:
        """The command that runs `command` in the machine, by SSH from the client; a connection is used many times."""
        if not self.pid():
            raise LabError(f"{self.name} has no power: scripts/vmlab boot {self.name}", 4)
        options = ["-tt"] if os.isatty(0) and os.isatty(1) else ["-T"]
        return [*on_client("ssh", *ssh_options(), *options, f"root@{self.address}"), "--", shlex.join(command)]


def running(pid_file: Path, word: bytes) -> int:
    """The pid in a file, if it is that of a process with `word` in its command; else 0."""
    try:
        pid = int(pid_file.read_text())
        return pid if word in Path(f"/proc/{pid}/cmdline").read_bytes() else 0
    except (FileNotFoundError, ProcessLookupError, ValueError):
        return 0


def on_client(*command: str) -> list[str]:
    return ["nsenter", f"--net=/run/netns/{CLIENT}", "--", *command]


def ssh_options() -> list[str]:
    """Machines are made anew with each lab: their keys prove nothing that the switch does not prove already."""
    settings = {
        "IdentityFile": KEY, "IdentitiesOnly": "yes", "StrictHostKeyChecking": "no", "UserKnownHostsFile": "/dev/null",
        "LogLevel": "ERROR", "ConnectTimeout": "10", "ServerAliveInterval": "5", "ServerAliveCountMax": "6",
        "ControlMaster": "auto", "ControlPath": STATE / "ssh-%h", "ControlPersist": "600",
    }  # fmt: skip
    return ["-F", "/dev/null", *(word for name, value in settings.items() for word in ("-o", f"{name}={value}"))]


def lab_machines() -> list[Machine]:
    try:
        suites = json.loads(LAB_FILE.read_text())["suites"]
    except FileNotFoundError:
        raise LabError("the lab is not up: scripts/vmlab up", 4) from None
    return [Machine(index, suite) for index, suite in enumerate(suites, 1)]


def machine_named(name: str) -> Machine:
    machines = lab_machines()
    for machine in machines:
        if machine.name == name:
            return machine
    raise LabError(f"no host {name!r} in the lab: it has {', '.join(machine.name for machine in machines)}", 4)
