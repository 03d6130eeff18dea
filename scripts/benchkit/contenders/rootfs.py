"""Root file systems for the peers, which run from a folder: of the same tarballs as our images are made of."""

import shutil
from pathlib import Path

from agent import template
from agent.tarball import Cancel
from benchkit.contenders import ours
from benchkit.contenders.base import Bench
from benchkit.hosts import must
from benchkit.workloads import Workload

CACHE = Path("/var/cache/migrator")


def folder(bench: Bench, workload: Workload) -> Path:
    """A fresh copy, seen by both hosts."""
    at = bench.folder / "rootfs" / workload.image
    shutil.rmtree(at, ignore_errors=True)
    at.mkdir(parents=True)
    must(["tar", "-C", str(at), "-xf", str(tarball(bench, workload))])
    return at


def tarball(bench: Bench, workload: Workload) -> Path:
    """Of a Debian with the service, from the agents' cache or made."""
    if workload.service == "workload":
        return bench.programs.tarball
    packages = [ours.PACKAGES[workload.service]]
    return template.build(CACHE, "bookworm", packages, lambda _: None, Cancel()).path


def user(workload: Workload, at: Path) -> dict[str, int]:
    """Of the OCI specification's process.user: who runs the service in this root file system."""
    if workload.service != "postgres":
        return {"uid": 0, "gid": 0}
    for line in (at / "etc/passwd").read_text().splitlines():
        name, _, uid, gid, *_ = line.split(":")
        if name == "postgres":
            return {"uid": int(uid), "gid": int(gid)}
    return {"uid": 0, "gid": 0}
