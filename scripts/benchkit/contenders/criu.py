"""Bare CRIU, without a runtime: dump and restore on a tmpfs that both hosts see; and lazy pages between two hosts."""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

from benchkit.contenders.base import MAC, Bench, Session
from benchkit.contenders.moving import (
    ADDRESS,
    CONNECT,
    IMAGES,
    NETNS,
    RUN,
    WORK,
    Ends,
    EndsSession,
    networks,
    quiet,
    wide_pipes,
)
from benchkit.contenders.peer_end import Plan
from benchkit.errors import CannotRunError
from benchkit.hosts import DESTINATION, SOURCE
from benchkit.workloads import DISK_FILE, GIB_MIB, Workload
from labkit.hosts import host_named

SHARED = "/dev/shm/migrator-bench-criu"
# A file at each host, and where it is mounted.
DISK, MOUNT = "/var/lib/migrator/bench-disk.img", f"{RUN}/disk"
MAKE_DISK = f"set -e; truncate -s {{size}}G {DISK}; mkfs.ext4 -q {DISK}; mkdir -p {MOUNT}; mount -o loop {DISK} {MOUNT}"
PAGES_PORT = 7998
COMMON = ["--tcp-established", "--network-lock", "nftables", "--manage-cgroups=ignore", "--ghost-limit", "64M"]
# A task gets its pid again, so the destination must not have used it: each session has a thousand of its own.
_first_pids = itertools.count(10_000, 500)


class Criu:
    """`criu dump` and `criu restore`, no copy: what checkpoint and restore cannot beat."""

    name = "CRIU on tmpfs"
    note = (
        "`criu dump` and `criu restore` of bare processes, images on one tmpfs that both hosts see: no runtime, no"
        " mount namespace, nothing copied"
    )
    lazy = False
    disk = ""

    def check(self, bench: Bench) -> None:
        if bench.lab.run(SOURCE, "criu", "check").returncode != 0:
            raise CannotRunError("criu check fails")

    def takes(self, workload: Workload) -> str:
        if workload.service != "workload":
            return "its processes run outside a root file system of their own"
        if self.disk and not workload.disk_span_mib:
            return "it has no disk of its own"
        return "its disk is not moved" if workload.disk_span_mib and not self.disk else ""

    @contextmanager
    def session(self, bench: Bench, workload: Workload) -> Iterator[Session]:
        first_pid = next(_first_pids)
        with networks(bench.lab), wide_pipes() if self.lazy else nullcontext():
            try:
                if self.disk:
                    bench.lab.ok(SOURCE, "sh", "-c", MAKE_DISK.format(size=workload.disk_gib))
                words = [f"{MOUNT}/blocks" if word == DISK_FILE else word for word in workload.command()[1:]]
                program = [str(bench.programs.workload), *words]
                start = ["nsenter", f"--net=/run/netns/{NETNS}", "setsid", "--fork", *program]
                bench.lab.ok(
                    SOURCE, "sh", "-c",
                    f"echo {first_pid} >/proc/sys/kernel/ns_last_pid; {quiet(start)[2].removeprefix('exec ')}",
                )  # fmt: skip
                found = bench.lab.ok(SOURCE, "pgrep", "--oldest", "--exact", program[0].rpartition("/")[2])
                ends = Ends(bench, self._source(bench, int(found)), self._destination())
                try:
                    yield EndsSession(bench, ends, ADDRESS)
                finally:
                    ends.close()
            finally:
                for host in (SOURCE, DESTINATION):
                    # By the network namespace alone: only this session's processes are in it.
                    kill = f"for pid in $(ip netns pids {NETNS}); do kill -9 $pid; tail --pid=$pid -f /dev/null; done"
                    script = f"{kill}; umount {MOUNT}; rm -rf {SHARED} {DISK}"
                    bench.lab.run(host, "timeout", "20", "sh", "-c", script)

    def _source(self, bench: Bench, pid: int) -> Plan:
        inode = bench.lab.ok(SOURCE, "stat", "--dereference", "--format=%i", f"/run/netns/{NETNS}").strip()
        main = ["criu", "dump", "--tree", str(pid), "-D", self._images, "-W", WORK, "-o", "dump.log", *COMMON]
        main += ["--external", f"net[{inode}]:{NETNS}"]
        if self.lazy:
            main += ["--lazy-pages", "--address", "0.0.0.0", "--port", str(PAGES_PORT), "--status-fd", "{status}"]
        peer = host_named(DESTINATION).address
        unmount = [["umount", MOUNT]] if self.disk else []
        return Plan(
            "source", peer, self._images, WORK, main, after_dump=unmount, lazy=self.lazy, copy=self.lazy, disk=self.disk
        )

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
        mount = [["mkdir", "-p", MOUNT], ["mount", "-o", "loop", DISK, MOUNT]] if self.disk else []
        return Plan(
            "destination", "", self._images, WORK, with_namespace,
            before=[*CONNECT, *mount], daemon=daemon, daemon_socket=f"{WORK}/lazy-pages.socket",
            mac=MAC, address=ADDRESS, disk=self.disk,
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

    def takes(self, workload: Workload) -> str:
        return too_scattered(workload) or super().takes(workload)


def too_scattered(workload: Workload) -> str:
    """Why CRIU's lazy pages are not for it; empty if they are."""
    if workload.rate_mbs and workload.memory_mib > GIB_MIB:
        return "each fault lengthens a list that CRIU walks through for the next: 7 minutes were not enough"
    return ""


class DiskCopy(Criu):
    """The disk's image copied whole while nothing runs."""

    name = "CRIU + disk copy"
    note = (
        "bare CRIU on a tmpfs that both hosts see, and between dump and restore the disk's sparse image is unmounted,"
        " its data copied over one TCP connection with sendfile, and mounted again"
    )
    disk = DISK
