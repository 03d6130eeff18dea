"""migrator: containers of the agents of the lab, moved by `migrate`."""

import ipaddress
import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from benchkit.contenders.base import Bench, Moved, Session
from benchkit.errors import BenchError
from benchkit.hosts import DESTINATION, SOURCE, Lab
from benchkit.workloads import Workload
from labkit.hosts import host_named

CONTAINER = "bench"
FIRST_ADDRESS = ipaddress.IPv4Address("10.77.2.50")
PACKAGES = {"redis": "redis-server", "postgres": "postgresql"}


@dataclass
class _Session:
    lab: Lab
    container: str
    address: str

    def move(self) -> Moved:
        hosts = [host_named(name) for name in (SOURCE, DESTINATION)]
        agents = [Path(f"/proc/{host.init_pid()}/root/proc/{host.agent_pid()}") for host in hosts]
        for agent in agents:
            (agent / "clear_refs").write_text("5")  # forget the peak: proc_pid_clear_refs(5)
        done = self.lab.run(SOURCE, "migrate", self.container, DESTINATION, "-o", "json")
        report = json.loads(done.stdout or "{}")
        if done.returncode != 0 or report.get("outcome") != "migrated":
            raise BenchError(f"migrate: exit code {done.returncode}: {report.get('error') or done.stderr.strip()}")
        phases = {phase["name"]: float(phase["duration_ms"]) for phase in report["phases"]}
        for phase in report["phases"]:
            phases |= {f"{phase['name']}: {step['name']}": float(step["duration_ms"]) for step in phase["steps"]}
        phases["downtime"] = float(report["downtime_ms"])
        return Moved(phases, {"agent_mib": max(map(peak_mib, agents))})


class Ours:
    """The containers of this project; with different numbers there may be several at once."""

    name = "migrator"
    note = "`migrate`, with its defaults"

    def __init__(self, number: int = 0) -> None:
        self._container = f"{CONTAINER}-{number}"
        self._address = str(FIRST_ADDRESS + number)

    def check(self, bench: Bench) -> None:
        """It is what is measured."""

    def takes(self, workload: Workload) -> str:
        return ""

    @contextmanager
    def session(self, bench: Bench, workload: Workload) -> Iterator[Session]:
        lab = bench.lab
        remove(lab, self._container)  # of a run that was cut short
        make_image(bench, workload)
        try:
            options = ["--disk", f"{workload.disk_gib}GiB", "--ip", f"{self._address}/16", *user(workload)]
            create = ["create", self._container, "--image", workload.image, *options, "--", *workload.command()]
            lab.ok(SOURCE, "migrator", *create)
            lab.ok(SOURCE, "migrator", "start", self._container)
            yield _Session(lab, self._container, self._address)
        finally:
            remove(lab, self._container)


def peak_mib(process: Path) -> float:
    """Of all its memory, since that was forgotten."""
    (peak,) = [line for line in (process / "status").read_text().splitlines() if line.startswith("VmHWM:")]
    return int(peak.split()[1]) / 1024


def make_image(bench: Bench, workload: Workload) -> None:
    """The image of a workload is at the source."""
    have = {row["name"] for row in bench.lab.json(SOURCE, "migrator", "image", "ls", "-o", "json")}
    if workload.image in have:
        return
    if workload.service == "workload":
        bench.lab.ok(SOURCE, "migrator", "image", "import", workload.image, str(bench.programs.tarball))
    else:
        packages = PACKAGES[workload.service]
        bench.lab.ok(
            SOURCE, "migrator", "image", "build", workload.image, "--suite", "bookworm", "--include", packages,
            timeout_s=600,
        )  # fmt: skip


def user(workload: Workload) -> list[str]:
    return ["--user", "postgres"] if workload.service == "postgres" else []


def remove(lab: Lab, container: str) -> None:
    """The container is nowhere."""
    for host in (SOURCE, DESTINATION):
        with suppress(BenchError):
            if any(row["name"] == container for row in lab.json(host, "migrator", "ps", "-o", "json")):
                lab.ok(host, "migrator", "rm", "-f", container)
