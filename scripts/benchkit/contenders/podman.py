"""Podman: `container checkpoint --export`, copy of the archive, `container restore --import`."""

import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

from benchkit.contenders.base import Bench, Session
from benchkit.contenders.moving import RUN, WORK, Ends, EndsSession
from benchkit.contenders.peer_end import Plan
from benchkit.errors import CannotRunError
from benchkit.hosts import DESTINATION, SOURCE, Lab, execute, last_words
from benchkit.workloads import Workload
from labkit.hosts import host_named

# Not the other peers': it is at a host's own MAC, and the client remembers.
ADDRESS = "10.77.2.61"
NAME, IMAGE = "bench-podman", "localhost/bench:latest"
# Podman's own files are each host's: the storage on its disk, the rest on its /run.
STORAGE = "/var/lib/migrator/bench-podman"
ARCHIVES = f"{RUN}/archive"
PODMAN = [
    *("podman", "--root", STORAGE, "--runroot", f"{RUN}/podman", "--tmpdir", f"{RUN}/podman-tmp"),
    *("--storage-driver", "vfs", "--cgroup-manager", "cgroupfs", "--events-backend", "file", "--runtime", "runc"),
]
INSTALL_S = 300.0
LIMIT = 4096


class Podman:
    """Debian's podman, installed if need be."""

    name = "podman"
    note = (
        "`podman container checkpoint --export --compress none --tcp-established` to a tmpfs, copy over one TCP"
        " connection, `podman container restore --import`; it is in its host's network and its address moves along"
    )

    def check(self, bench: Bench) -> None:
        if shutil.which("podman") is None:
            install(["podman"])
        for host in (SOURCE, DESTINATION):
            bench.lab.ok(host, *PODMAN, "import", str(bench.programs.tarball), IMAGE)

    def takes(self, workload: Workload) -> str:
        if workload.service != "workload":
            return "measured with the plain workloads alone"
        return "its disk is not moved" if workload.disk_span_mib else ""

    @contextmanager
    def session(self, bench: Bench, workload: Workload) -> Iterator[Session]:
        self._remove(bench.lab)
        try:
            bench.lab.ok(SOURCE, "ip", "address", "add", f"{ADDRESS}/16", "dev", "br0")
            words = ["run", "--detach", "--name", NAME, "--network", "host", "--log-driver", "none"]
            words += ["--pids-limit", "0", *limits()]
            bench.lab.ok(SOURCE, *PODMAN, *words, IMAGE, *workload.command())
            ends = Ends(bench, self._source(), self._destination())
            try:
                yield EndsSession(bench, ends, ADDRESS)
            finally:
                ends.close()
        finally:
            self._remove(bench.lab)

    def _source(self) -> Plan:
        options = ["--export", f"{ARCHIVES}/archive.tar", "--compress", "none", "--tcp-established"]
        main = [*PODMAN, "container", "checkpoint", *options, NAME]
        away = [["ip", "address", "del", f"{ADDRESS}/16", "dev", "br0"]]
        return Plan("source", host_named(DESTINATION).address, ARCHIVES, WORK, main, after_dump=away)

    def _destination(self) -> Plan:
        here = [["ip", "address", "add", f"{ADDRESS}/16", "dev", "br0"]]
        main = [*PODMAN, "container", "restore", "--import", f"{ARCHIVES}/archive.tar", "--tcp-established"]
        # The address is the bridge's from now on, so it is the bridge's MAC that is announced.
        return Plan("destination", "", ARCHIVES, WORK, main, before=here, mac="br0", address=ADDRESS)

    def _remove(self, lab: Lab) -> None:
        for host in (SOURCE, DESTINATION):
            lab.run(host, *PODMAN, "rm", "--force", "--time", "0", NAME)
            lab.run(host, "sh", "-c", f"ip address del {ADDRESS}/16 dev br0; rm -rf {ARCHIVES} {WORK}")


def limits() -> list[str]:
    """Podman's own defaults are more than a root without CAP_SYS_RESOURCE may set, and it lowers what it has itself."""
    kinds = {"nofile": resource.RLIMIT_NOFILE, "nproc": resource.RLIMIT_NPROC}
    of_each = {name: min(resource.getrlimit(kind)[1], LIMIT) for name, kind in kinds.items()}
    return [word for name, value in of_each.items() for word in ("--ulimit", f"{name}={value}:{value}")]


def install(packages: list[str]) -> None:
    """From the distribution. Raises CannotRunError with apt's last words."""
    command = ["env", "DEBIAN_FRONTEND=noninteractive", "RUNLEVEL=1", "apt-get", "install", "--yes", "-q"]
    for words in (["apt-get", "update", "-q"], [*command, "--no-install-recommends", *packages]):
        done = execute(words, INSTALL_S)
        if done.returncode != 0:
            raise CannotRunError(f"{' '.join(packages)} cannot be installed: {last_words(done.stderr)}")
