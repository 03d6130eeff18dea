"""The README's installation on two hosts of one's own, with the machines' names in place of its own."""

import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from labkit.hosts import CHECKOUT, LabError
from vmkit.machines import Machine
from vmkit.remote import execute

HEADING = "## Two hosts of your own"
PORT = 7440
INSTALL_S, CERTIFICATES_S, START_S = 3000.0, 300.0, 300.0


@dataclass(frozen=True)
class Steps:
    """Its blocks of shell commands, by what they are for."""

    install: str
    certificates: str
    copy: str
    start: str


def steps(text: str) -> Steps:
    """Raises LabError if the section is not as it was when this was written."""
    section = text.partition(f"\n{HEADING}\n")[2].partition("\n## ")[0]
    blocks = re.findall(r"^```\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    begins = ("cd /opt/migrator", "migrator cert init", "scp ", "systemctl daemon-reload")
    if len(blocks) < len(begins) or not all(map(str.startswith, blocks, begins)):
        raise LabError(f"README.md: the section {HEADING!r} has not the commands that scripts/vmkit/readme.py knows")
    return Steps(*blocks[: len(begins)])


def follow(machines: Sequence[Machine]) -> None:
    """Install on each machine, hand out certificates, start the agents. Raises LabError with what a command said."""
    told = steps((CHECKOUT / "README.md").read_text())
    with ThreadPoolExecutor(len(machines)) as pool:
        list(pool.map(lambda machine: execute(machine, told.install, INSTALL_S), machines))
    first = machines[0]
    for machine in machines:
        write = "cat >/etc/migrator/config.toml"
        execute(machine, write, START_S, stdin=configuration(machine, machines))
    execute(first, certificates(told.certificates, machines), CERTIFICATES_S)
    for machine in machines:
        execute(first, told.copy.replace("host-a", machine.name), CERTIFICATES_S)
    # The last two lines look, and may well find a peer that is not up yet.
    start = [line for line in told.start.splitlines() if line.startswith("systemctl ")]
    with ThreadPoolExecutor(len(machines)) as pool:
        list(pool.map(lambda machine: execute(machine, "\n".join(start), START_S), machines))


def certificates(block: str, machines: Sequence[Machine]) -> str:
    """`cert init`, and the line for host-a once for each machine."""
    lines = block.splitlines()
    issue = next(line for line in lines if "cert issue" in line)
    each = [issue.replace("host-a", machine.name).replace("192.0.2.1", machine.address) for machine in machines]
    return "\n".join([line for line in lines if "cert issue" not in line] + each)


def configuration(machine: Machine, machines: Sequence[Machine]) -> str:
    """packaging/config.example.toml with what the README has one edit."""
    text = (CHECKOUT / "packaging/config.example.toml").read_text()
    values = {
        "host": machine.name, "address": f"{machine.address}:{PORT}", "bridge": "br0",
        "ipv4_pool": f"10.77.{10 + machine.index}.0/24", "ipv4_prefix": 16, "ipv4_gateway": "10.77.0.1",
        "ipv6_pool": f"fd77::{10 + machine.index:x}:0/112",
    }  # fmt: skip
    for key, value in values.items():
        written = f'{key} = "{value}"' if isinstance(value, str) else f"{key} = {value}"
        text, count = re.subn(rf"^{key} = .*$", written, text, flags=re.MULTILINE)
        if count != 1:
            raise LabError(f"packaging/config.example.toml has no line for {key}, or several")
    peers = "".join(f'{peer.name} = "{peer.address}:{PORT}"\n' for peer in machines if peer is not machine)
    return text.partition("[peers]\n")[0] + "[peers]\n" + peers
