"""Volumes of real containers checked while they are in use, damaged, and repaired at rest."""

import hashlib
import os
import struct
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent import images
from agent.images import Images
from agent.tarball import Cancel
from agent.volume_checks import Checked, VolumeChecks
from blockdev import loop
from migrator import faults
from migrator.errors import Busy, Cancelled, ExecutionError, NotFound, Precondition
from migrator.v1.container_pb2 import ContainerSpec, Volume
from tests.lab.containers_kit import IMAGE_BYTES, Bench, TestImage

pytestmark = [pytest.mark.root, pytest.mark.skipif(os.geteuid() != 0, reason="needs root")]

MIB = 1 << 20
SMALLEST = {"ext4": 64 * MIB, "xfs": 320 * MIB, "btrfs": 256 * MIB}
# The deleted file stays open: its blocks are in use, and no folder has it.
WRITER = (
    "exec 3>/data/deleted; echo gone >&3; rm /data/deleted;"
    " i=0; while true; do echo $i >>/data/log; i=$((i+1)); sleep 0.01; done"
)


class Host(Bench):
    """A bench with checks of its volumes."""

    def __init__(self, folder: Path, volumes_folder: Path, image: TestImage) -> None:
        super().__init__(folder, volumes_folder, image)
        with self.database.transaction() as cursor:
            cursor.execute(images.SCHEMA)
        self.staging = volumes_folder.parent / "images/staging"
        self.mounts = folder / "run/image-mounts"
        self.images = Images(self.database, volumes_folder.parent / "images", self.mounts)
        self.checks = VolumeChecks(self._volumes, self.containers, self.keeper, self.images)

    def with_data(self, kind: str) -> None:
        """A container that writes into a second volume of this kind."""
        volumes = [
            Volume(mount_point="/", size_bytes=IMAGE_BYTES),
            Volume(mount_point="/data", size_bytes=SMALLEST[kind], filesystem=kind),
        ]
        self.containers.create("ct1", ContainerSpec(image="tiny", volumes=volumes, command=["sh", "-c", WRITER]))
        self.containers.start("ct1")
        log, deadline = self.containers.mounted_volumes("ct1")[1].at / "log", time.monotonic() + 30
        while not log.exists():
            assert time.monotonic() < deadline, "nothing is written"
            time.sleep(0.01)

    @property
    def data(self) -> Path:
        return self._volumes.open("ct1-1").path

    def digest(self) -> str:
        return hashlib.sha256(self.data.read_bytes()).hexdigest()

    def check(self, mount_point: str = "") -> list[Checked]:
        return self.checks.check("ct1", mount_point, lambda _: None, Cancel())

    def repair(self, mount_point: str = "") -> list[Checked]:
        return self.checks.repair("ct1", mount_point, lambda _: None, Cancel())

    def damage(self, kind: str) -> None:
        """So that its checker says no, at rest."""
        if kind == "ext4":
            subprocess.run(["debugfs", "-w", "-R", "clri log", str(self.data)], check=True, capture_output=True)
            return
        with self.data.open("r+b") as file:
            if kind == "xfs":
                (blocks_per_group,) = struct.unpack(">I", os.pread(file.fileno(), 4, 84))
                file.seek(blocks_per_group * 4096 + 4096)  # where the second group keeps what is free
            else:
                file.seek(65536)
            file.write(bytes(4096))


@pytest.fixture
def host(tmp_path: Path, pool_folder: Path, image: TestImage) -> Iterator[Host]:
    made = Host(tmp_path, pool_folder / "volumes", image)
    try:
        yield made
        assert list(made.staging.iterdir()) == []
        assert list(made.mounts.iterdir()) == []
    finally:
        made.clean()


@pytest.mark.parametrize("kind", list(SMALLEST))
def test_a_running_container_is_checked_and_goes_on(host: Host, kind: str) -> None:
    host.with_data(kind)
    pid = host.containers.init_pid("ct1")
    assert host.check() == [Checked("ct1", "/", "ext4", ""), Checked("ct1", "/data", kind, "")]
    assert host.check("/data") == [Checked("ct1", "/data", kind, "")]
    with pytest.raises(Precondition, match="stop it first") as refused:
        host.repair()
    assert refused.value.reason == "RUNNING"
    assert host.containers.init_pid("ct1") == pid
    host.containers.stop("ct1", 0.1)
    assert host.repair("/data") == [Checked("ct1", "/data", kind, "")]


@pytest.mark.parametrize("kind", ["ext4", "xfs"])
def test_damage_is_found_and_repaired(host: Host, kind: str) -> None:
    host.with_data(kind)
    host.containers.stop("ct1", 0.1)
    host.damage(kind)
    before = host.digest()
    root, data = host.check()
    assert root.problem == "" and data.problem != ""
    assert host.digest() == before
    repaired = host.repair("/data")
    assert repaired == [Checked("ct1", "/data", kind, data.problem, repaired=True)]
    assert host.check("/data") == [Checked("ct1", "/data", kind, "")]
    host.containers.start("ct1")


def test_what_cannot_be_repaired_stays_as_it_was(host: Host) -> None:
    host.with_data("btrfs")
    host.containers.stop("ct1", 0.1)
    host.damage("btrfs")
    before = host.digest()
    (found,) = host.repair("/data")
    assert "cannot be repaired" in found.problem and not found.repaired
    assert host.digest() == before


def test_what_cannot_be_checked_is_refused(host: Host) -> None:
    host.with_data("ext4")
    with pytest.raises(NotFound, match="it has /, /data"):
        host.check("/other")
    with pytest.raises(NotFound):
        host.checks.check("ct2", "", lambda _: None, Cancel())
    with host.containers.hold("ct1", "it is being moved"), pytest.raises(Busy):
        host.check()


def test_a_caller_who_leaves_ends_the_check(host: Host) -> None:
    host.with_data("ext4")
    cancel = Cancel()
    cancel.cancel()
    with pytest.raises(Cancelled):
        host.checks.check("ct1", "", lambda _: None, cancel)
    assert host.containers.operation("ct1") is None


def test_an_interrupted_repair_leaves_the_volume_and_nothing_else(
    host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host.with_data("ext4")
    host.containers.stop("ct1", 0.1)
    host.damage("ext4")
    before = host.digest()
    (tmp_path / "faults").write_text("volume.repaired fail\n")
    monkeypatch.setattr(faults, "_file", str(tmp_path / "faults"))
    with pytest.raises(ExecutionError, match=r"volume\.repaired"):
        host.repair()
    (tmp_path / "faults").unlink()
    assert host.digest() == before
    # What a killed agent leaves: a clone that is attached, and mounted.
    left, at = host.staging / "left", host.mounts / "left"
    left.mkdir()
    at.mkdir()
    subprocess.run(["cp", "--reflink=always", str(host._volumes.open("ct1-0").path), str(left / "x.img")], check=True)
    device = loop.attach(left / "x.img")
    subprocess.run(["mount", str(device.path), str(at)], check=True)
    host.images.sweep()
    assert not Path(f"/sys/block/loop{device.number}/loop").exists()
    assert host.repair("/data")[0].repaired
