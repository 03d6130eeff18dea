"""Virtual machines as their tests use them: what `tests.lab.lab_kit` does with hosts, and power."""

import json
import os
import subprocess
from dataclasses import dataclass

from labkit.leftovers import Leftovers, difference
from tests.lab.lab_kit import CHECKOUT, HOSTS, Lab, eventually

SCRIPT = str(CHECKOUT / "scripts/vmlab")
# Emulation costs a factor of 15 or so, and takes what the rest of the machine leaves.
SLOWER = 30.0
IN_MACHINE = "/opt/migrator"
UP_S = 2400


@dataclass
class Machines(Lab):
    """Two virtual machines that are up. Host names are host-a and host-b."""

    script: str = SCRIPT
    slower: float = SLOWER

    def present(self, host: str) -> Leftovers:
        """What containers and migrations consist of, on one machine."""
        command = ("env", f"PYTHONPATH={IN_MACHINE}/scripts", "python3", "-m", "labkit.leftovers")
        found: Leftovers = json.loads(self.ok(host, *command))
        return found

    def remember(self) -> None:
        self.baseline = {host: self.present(host) for host in HOSTS}

    def leftovers(self, host: str) -> Leftovers:
        return difference(self.baseline[host], self.present(host))

    def power_cut(self, host: str) -> None:
        """What the machine has not flushed to its disk is lost."""
        self.lab("power-cut", host)

    def boot(self, host: str) -> None:
        """Returns when it answers and its agent is ready."""
        self.lab("boot", host)
        self.await_agent(host)

    def await_agent(self, host: str) -> None:
        """Wait until the agent's service has said that it is ready."""
        active = ("systemctl", "is-active", "--quiet", "migrator-agent")
        eventually(f"{host}'s agent is ready", lambda: self.run(host, *active).returncode == 0, 10 * self.slower)


def up(suite: str) -> None:
    """Two of them, ready."""
    done = subprocess.run(
        [SCRIPT, "up", "--suite", suite, "--hosts", "2"], capture_output=True, text=True, check=False, timeout=UP_S
    )
    assert done.returncode == 0, f"{SCRIPT} up: {done.stdout}{done.stderr}"


def down() -> None:
    """Repeatable."""
    subprocess.run([SCRIPT, "down"], capture_output=True, check=True, timeout=600)


def suite() -> str:
    """What the hosts run, as `scripts/test --vm` was told."""
    return os.environ.get("MIGRATOR_VM_SUITE", "trixie")
