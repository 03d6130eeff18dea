"""Bare CRIU, without a runtime: dump and restore on a tmpfs that both hosts see; and lazy pages between two hosts."""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

from benchkit.contenders.base import MAC, Bench, Moved, Session
from benchkit.contenders.moving import ADDRESS, CONNECT, IMAGES, NETNS, RUN, WORK, Ends, networks, quiet, wide_pipes
from benchkit.contenders.peer_end import Plan
from benchkit.errors import CannotRunError
from benchkit.hosts import DESTINATION, SOURCE
from benchkit.workloads import Workload
from labkit.hosts import host_named

SHARED = "/dev/shm/migrator-bench-criu"
PID_FILE = f"{RUN}/pid"
PAGES_PORT = 7998
COMMON = ["--tcp-established", "--network-lock", "nftables", "--manage-cgroups=ignore", "--ghost-limit", "64M"]
# A task gets its pid again, so the destination must not have used it: each session has a thousand of its own.
_first_pids = itertools.count(10_000, 500)


@dataclass
class _Session:
    bench: Bench
    ends: Ends
    address: str = ADDRESS

    def move(self) -> Moved:
        return self.ends.move(self.bench)


class Criu:
    """`criu dump` and `criu restore`, no copy: what checkpoint and restore cannot beat."""

    name = "CRIU on tmpfs"
    note = (
        "`criu dump` and `criu restore` of bare processes, images on one tmpfs that both hosts see: no runtime, no"
        " mount namespace, nothing copied"
    )
    lazy = False

    def check(self, bench: Bench) -> None:
        if bench.lab.run(SOURCE, "criu", "check").returncode != 0:
            raise CannotRunError("criu check fails")

    def takes(self, workload: Workload) -> str:
        if workload.service != "workload":
            return "its processes run outside a root file system of their own"
        return "its disk is not moved" if workload.disk_span_mib else ""

    @contextmanager
    def session(self, bench: Bench, workload: Workload) -> Iterator[Session]:
        first_pid = next(_first_pids)
        with networks(bench.lab), wide_pipes() if self.lazy else nullcontext():
            try:
                program = [str(bench.programs.workload), *workload.command()[1:]]
                start = ["nsenter", f"--net=/run/netns/{NETNS}", "setsid", "--fork", *program]
                bench.lab.ok(
                    SOURCE, "sh", "-c",
                    f"echo {first_pid} >/proc/sys/kernel/ns_last_pid; {quiet(start)[2].removeprefix('exec ')}",
                )  # fmt: skip
                found = bench.lab.ok(SOURCE, "pgrep", "--oldest", "--exact", program[0].rpartition("/")[2])
                ends = Ends(bench, self._source(bench, int(found)), self._destination())
                try:
                    yield _Session(bench, ends)
                finally:
                    ends.close()
            finally:
                for host in (SOURCE, DESTINATION):
                    # By the network namespace alone: only this session's processes are in it.
                    script = f"kill -9 $(ip netns pids {NETNS}); rm -rf {SHARED}"
                    bench.lab.run(host, "sh", "-c", script)

    def _source(self, bench: Bench, pid: int) -> Plan:
        inode = bench.lab.ok(SOURCE, "stat", "--dereference", "--format=%i", f"/run/netns/{NETNS}").strip()
        main = ["criu", "dump", "--tree", str(pid), "-D", self._images, "-W", WORK, "-o", "dump.log", *COMMON]
        main += ["--external", f"net[{inode}]:{NETNS}"]
        if self.lazy:
            main += ["--lazy-pages", "--address", "0.0.0.0", "--port", str(PAGES_PORT), "--status-fd", "{status}"]
        peer = host_named(DESTINATION).address
        return Plan("source", peer, self._images, WORK, main, lazy=self.lazy, copy=self.lazy)

    def _destination(self) -> Plan:
        main = ["criu", "restore", "--restore-detached", "-D", self._images, "-W", WORK, "-o", "restore.log", *COMMON]
        main += ["--inherit-fd", f"fd[9]:{NETNS}"]
        daemon: list[str] = []
        if self.lazy:
            main += ["--lazy-pages"]
            source = host_named(SOURCE).address
            daemon = ["criu", "lazy-pages", "--page-server", "--address", source, "--port", str(PAGES_PORT)]
            daemon += ["-D", self._images, "-W", WORK, "-o", "lazy.log"]
        with_namespace = ["sh", "-c", f'exec "$@" 9</run/netns/{NETNS}', "sh", *main]
        return Plan(
            "destination", "", self._images, WORK, with_namespace,
            before=CONNECT, daemon=daemon, daemon_socket=f"{WORK}/lazy-pages.socket", mac=MAC, address=ADDRESS,
        )  # fmt: skip

    @property
    def _images(self) -> str:
        return IMAGES if self.lazy else SHARED


class CriuLazy(Criu):
    """Lazy pages between two hosts."""

    name = "CRIU lazy pages"
    note = (
        "`criu dump --lazy-pages` at one host, the images without pages copied, `criu lazy-pages` and `criu restore"
        " --lazy-pages` at the other, of bare processes: a connection lost during the pull loses them"
    )
    lazy = True
