"""A volume that grows under a Redis which then moves, and disks that are sent to another host and come back."""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from labkit.build import AGENT_PORT
from labkit.hosts import STATE
from tests.disk_kit import chain_folder
from tests.lab.containers_kit import make_image
from tests.lab.lab_kit import CHECKOUT, Lab, eventually

pytestmark = [pytest.mark.lab, pytest.mark.root]

ADDRESS = "10.77.2.140"
MIB = 1 << 20
DIGEST = "find /data -type f -name 'file*' | sort | xargs cat | sha256sum"


def volumes(lab: Lab, host: str, container: str) -> dict[str, int]:
    """Sizes in MiB by mount point."""
    listed = json.loads(lab.ok(host, "migrator", "volume", "ls", container, "-o", "json"))
    return {row["mount_point"]: row["size_bytes"] // MIB for row in listed}


def seen_mib(lab: Lab, host: str, container: str) -> int:
    return int(lab.exec(host, container, "df", "-m", "--output=size", "/data").split()[-1])


@pytest.mark.parametrize("kind", ["xfs", "btrfs"])
def test_a_volume_grows_under_a_redis_that_moves_then(lab: Lab, kind: str) -> None:
    lab.start_redis("host-a", "grown", ADDRESS, "--disk", "1GiB", "--volume", f"/data=320MiB,{kind}")
    lab.redis(ADDRESS, "config", "set", "dir", "/data")
    lab.redis(ADDRESS, "debug", "populate", "20000", "key", "100")
    with lab.counting(ADDRESS) as report:
        lab.ok("host-a", "migrator", "volume", "resize", "grown:/data", "640MiB")
        assert volumes(lab, "host-a", "grown") == {"/": 1024, "/data": 640}
        assert seen_mib(lab, "host-a", "grown") > 550
        # More than fitted before.
        lab.exec("host-a", "grown", "sh", "-c", "for i in 1 2 3; do head -c 115M /dev/urandom >/data/file$i; done")
        assert lab.redis(ADDRESS, "save") == "OK"
        digest = lab.exec("host-a", "grown", "sh", "-c", DIGEST)
        lab.migrate("grown", "host-a", "host-b", "--verify")
        assert volumes(lab, "host-b", "grown") == {"/": 1024, "/data": 640}
        assert lab.exec("host-b", "grown", "sh", "-c", DIGEST) == digest
        lab.ok("host-b", "migrator", "volume", "resize", "grown:/data", "768MiB")
        assert seen_mib(lab, "host-b", "grown") > 650
        lab.migrate("grown", "host-b", "host-a", "--verify")
    assert report["wrong"] == [] and report["same_connection"]
    assert lab.redis(ADDRESS, "dbsize") == "20001"
    assert lab.exec("host-a", "grown", "sh", "-c", DIGEST) == digest
    assert volumes(lab, "host-a", "grown")["/data"] == 768


def test_a_volume_keeps_its_size_while_it_moves(lab: Lab) -> None:
    lab.start_redis("host-a", "moving", ADDRESS, "--disk", "1GiB", "--volume", "/data=512MiB,xfs")
    lab.exec("host-a", "moving", "sh", "-c", "head -c 200M /dev/urandom >/data/file")
    with lab.background("host-a", "migrate", "moving", "host-b", "--bandwidth", "200Mbit/s") as move:
        eventually("it moves", lambda: bool(lab.ps("host-a")["moving"]["migration"]))
        for words in (["resize", "moving:/data", "1GiB"], ["export", "moving", "/tmp/moving.raw"]):
            done = lab.run("host-a", "migrator", "volume", *words)
            assert done.returncode == 9 and "busy" in done.stderr
        move.terminate()
        move.wait(60)
    eventually("it is free again", lambda: not lab.ps("host-a").get("moving", {"migration": "m"})["migration"], 30)
    lab.ok("host-a", "migrator", "volume", "resize", "moving:/data", "1GiB")


@pytest.fixture
def remote() -> Iterator[list[str]]:
    """The command line on the client, as an operator of host-b."""
    keys = [
        f"--{name}={STATE}/pki/{file}"
        for name, file in (("ca", "ca.crt"), ("cert", "operator.crt"), ("key", "operator.key"))
    ]
    yield [str(CHECKOUT / ".venv/bin/migrator"), "--host", f"10.77.1.2:{AGENT_PORT}", *keys]


def test_a_ploop_container_from_afar_runs_and_leaves_as_ploop(lab: Lab, remote: list[str], tmp_path: Path) -> None:
    """A folder on the client becomes an image at host-b; a container of it runs; its disk comes back as a folder."""
    back = tmp_path / "back.hdd"
    whole = make_image(tmp_path / "tiny.raw").path.read_bytes()
    first = whole[: len(whole) // 2].ljust(len(whole), b"\0")
    chain_folder(tmp_path / "root.hdd", [first, whole], cluster_sectors=2048)
    lab.client_ok(*remote, "image", "import", "carried", str(tmp_path / "root.hdd"))
    lab.ok("host-b", "migrator", "create", "carried", "--image", "carried", "--disk", "128MiB", "--", "sleep", "100000")
    lab.ok("host-b", "migrator", "start", "carried")
    assert "busybox" in lab.exec("host-b", "carried", "ls", "/bin")
    refused = lab.client(*remote, "volume", "export", "carried", str(back), "--format", "ploop")
    assert refused.returncode == 3 and "stop it first" in refused.stderr and not back.exists()
    lab.ok("host-b", "migrator", "stop", "-t", "1s", "carried")
    lab.client_ok(*remote, "volume", "export", "carried", str(back), "--format", "ploop")
    assert sorted(path.name for path in back.iterdir()) == ["DiskDescriptor.xml", "root.hds"]
    subprocess.run(["qemu-img", "check", "-q", "-f", "parallels", back / "root.hds"], check=True)
    lab.ok("host-b", "migrator", "volume", "export", "carried", str(tmp_path / "carried.raw"))
    converted = tmp_path / "converted.raw"
    subprocess.run(["qemu-img", "convert", "-f", "parallels", "-O", "raw", back / "root.hds", converted], check=True)
    assert converted.read_bytes() == (tmp_path / "carried.raw").read_bytes()
    lab.ok("host-b", "migrator", "rm", "carried")
    lab.ok("host-b", "migrator", "image", "rm", "carried")
