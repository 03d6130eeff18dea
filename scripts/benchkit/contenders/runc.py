"""runc: checkpoint, copy over TCP and restore; and the same with CRIU's lazy pages."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from benchkit.contenders import rootfs
from benchkit.contenders.base import MAC, Bench, Session
from benchkit.contenders.criu import too_scattered
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
from benchkit.hosts import DESTINATION, SOURCE, must
from benchkit.workloads import Workload
from labkit.hosts import host_named

NAME = "bench-peer"
RUNC = ["runc", "--root", f"{RUN}/runc"]
PAGES_PORT = 7998
# CRIU's other lock of the network starts iptables-restore, twice.
CRIU_CONFIG = "network-lock nftables\ntcp-established\nghost-limit 64M\n"


class Runc:
    """`runc checkpoint`, copy, `runc restore`."""

    name = "runc + copy"
    note = (
        "`runc checkpoint` to a tmpfs, copy over one TCP connection with sendfile, `runc restore`; the network"
        " locked by nftables, which is faster than iptables, and the address announced. Both hosts see the same root"
        " file system: no disk is moved"
    )
    lazy = False

    def check(self, bench: Bench) -> None:
        if shutil.which("runc", path="/usr/sbin:/usr/bin:/sbin:/bin") is None:
            raise CannotRunError("runc is not installed")

    def takes(self, workload: Workload) -> str:
        return "its disk is not moved" if workload.disk_span_mib else ""

    @contextmanager
    def session(self, bench: Bench, workload: Workload) -> Iterator[Session]:
        root = rootfs.folder(bench, workload)
        bundles = {host: make_bundle(bench, workload, host, root) for host in (SOURCE, DESTINATION)}
        self._remove(bench)
        with networks(bench.lab), wide_pipes() if self.lazy else nullcontext():
            try:
                bench.lab.ok(SOURCE, *quiet([*RUNC, "run", "--detach", "--bundle", str(bundles[SOURCE]), NAME]))
                ends = Ends(bench, self._source(bench), self._destination(bundles[DESTINATION]))
                try:
                    yield EndsSession(bench, ends, ADDRESS)
                finally:
                    ends.close()
            finally:
                self._remove(bench)

    def _source(self, bench: Bench) -> Plan:
        checkpoint = ["checkpoint", "--image-path", IMAGES, "--work-path", WORK, "--tcp-established"]
        if self.lazy:
            checkpoint += ["--lazy-pages", "--page-server", f"0.0.0.0:{PAGES_PORT}", "--status-fd", "{status}"]
        main = [*RUNC, *checkpoint, NAME]
        peer = host_named(DESTINATION).address
        return Plan("source", peer, IMAGES, WORK, main, before=self._before(), lazy=self.lazy)

    def _before(self) -> list[list[str]]:
        # Paused before, it is not polled for by CRIU at steps of 100 ms.
        return [[*RUNC, "pause", NAME]]

    def _destination(self, bundle: Path) -> Plan:
        restore = ["restore", "--detach", "--image-path", IMAGES, "--work-path", WORK, "--tcp-established"]
        daemon: list[str] = []
        if self.lazy:
            restore += ["--lazy-pages"]
            source = host_named(SOURCE).address
            daemon = ["criu", "lazy-pages", "--page-server", "--address", source, "--port", str(PAGES_PORT)]
            daemon += ["-D", IMAGES, "-W", WORK, "-o", "lazy.log"]
        return Plan(
            "destination", "", IMAGES, WORK, [*RUNC, *restore, "--bundle", str(bundle), NAME],
            before=CONNECT, daemon=daemon, daemon_socket=f"{WORK}/lazy-pages.socket", mac=MAC, address=ADDRESS,
        )  # fmt: skip

    def _remove(self, bench: Bench) -> None:
        for host in (SOURCE, DESTINATION):
            bench.lab.run(host, *quiet([*RUNC, "delete", "--force", NAME]))


class LazyPages(Runc):
    """The same with pages that follow by fault and in the background."""

    name = "runc lazy pages"
    note = (
        "`runc checkpoint --lazy-pages`, copy of the images without pages, `criu lazy-pages` and `runc restore"
        " --lazy-pages`: a lost connection during the pull loses the container"
    )
    lazy = True

    def takes(self, workload: Workload) -> str:
        return too_scattered(workload) or super().takes(workload)


def make_bundle(bench: Bench, workload: Workload, host: str, root: Path) -> Path:
    """An OCI bundle of the workload for one host: the network namespace by path, no terminal."""
    bundle = bench.folder / f"bundle-{host}"
    shutil.rmtree(bundle, ignore_errors=True)
    bundle.mkdir(parents=True)
    must(["runc", "spec", "--bundle", str(bundle)])
    spec: dict[str, Any] = json.loads((bundle / "config.json").read_text())
    spec["process"] |= {"terminal": False, "args": workload.command(), "user": rootfs.user(workload, root)}
    # What a shell that prepares a service needs, as root.
    for kind in ("bounding", "effective", "permitted"):
        spec["process"]["capabilities"][kind] += ["CAP_CHOWN", "CAP_SETUID", "CAP_SETGID", "CAP_DAC_OVERRIDE"]
    spec["process"]["rlimits"] = []
    spec["root"] = {"path": str(root), "readonly": False}
    spec["hostname"] = "bench"
    for namespace in spec["linux"]["namespaces"]:
        if namespace["type"] == "network":
            namespace["path"] = f"/run/netns/{NETNS}"
    spec["linux"]["namespaces"] = [one for one in spec["linux"]["namespaces"] if one["type"] != "cgroup"]
    spec["linux"]["cgroupsPath"] = f"/migrator-{host}/{NAME}"
    spec["mounts"] = [mount for mount in spec["mounts"] if mount["destination"] != "/sys/fs/cgroup"]
    config = bundle / "criu.conf"
    config.write_text(CRIU_CONFIG)
    spec["annotations"] = {"org.criu.config": str(config)}
    (bundle / "config.json").write_text(json.dumps(spec))
    return bundle
