"""Volumes of real containers: resized at rest and in use, and exported to what others read."""

import hashlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from agent import images, volumes
from agent.database import Database
from agent.disk_images import DiskSource
from agent.images import Images
from agent.tarball import Cancel
from agent.volumes import ContainerVolume, Volumes
from blockdev import loop, resize
from blockdev.errors import BlockError
from blockdev.volume import UNFINISHED, Volume
from migrator.errors import Busy, InvalidArgument, MigratorError, NotFound, Precondition
from migrator.v1.container_pb2 import ContainerSpec
from migrator.v1.container_pb2 import Volume as VolumeSpec
from tests.failing import shut_down
from tests.lab.containers_kit import IMAGE_BYTES, Bench, TestImage

pytestmark = [pytest.mark.root, pytest.mark.skipif(os.geteuid() != 0, reason="needs root")]

MIB = 1 << 20
SMALLEST = {"ext4": 64 * MIB, "xfs": 320 * MIB, "btrfs": 256 * MIB}
WRITER = "i=0; while true; do echo $i >>/data/log; i=$((i+1)); sleep 0.01; done"


class Host(Bench):
    """A bench with the volumes' operations."""

    def __init__(self, folder: Path, volumes_folder: Path, image: TestImage) -> None:
        super().__init__(folder, volumes_folder, image)
        self.images = Images(
            volumes_images_database(self), volumes_folder.parent / "images", folder / "run" / "image-mounts"
        )
        self.volumes = self.make()

    def make(self) -> Volumes:
        return Volumes(self.database, self._volumes, self.containers, self.keeper, self.images.staging)

    def with_data(self, kind: str, *, running: bool = True, size_bytes: int = 0) -> None:
        """A container that writes into a second volume of this kind."""
        spec = ContainerSpec(
            image="tiny",
            volumes=[
                VolumeSpec(mount_point="/", size_bytes=IMAGE_BYTES),
                VolumeSpec(mount_point="/data", size_bytes=size_bytes or SMALLEST[kind], filesystem=kind),
            ],
            command=["sh", "-c", WRITER],
        )
        self.containers.create("ct1", spec)
        if running:
            self.containers.start("ct1")

    def volume(self, index: int = 1) -> ContainerVolume:
        return self.volumes.all("ct1")[index]

    @property
    def data(self) -> Path:
        return self.containers.mounted_volumes("ct1")[1].at

    def export(self, kind: str, into: Path, mount_point: str = "/data", snapshot: str = "") -> list[Path]:
        with self.volumes.export("ct1", mount_point, snapshot, kind, lambda _: None, Cancel()) as files:
            into.mkdir()
            return [Path(shutil.copyfile(file.path, into / file.name)) for file in files]

    def left(self) -> list[str]:
        return [path.name for path in self._volumes.folder.iterdir() if path.name.endswith((UNFINISHED, ".mount"))]


def volumes_images_database(host: Bench) -> Database:
    with host.database.transaction() as cursor:
        cursor.execute(images.SCHEMA)
    return host.database


@pytest.fixture
def host(tmp_path: Path, pool_folder: Path, image: TestImage) -> Iterator[Host]:
    made = Host(tmp_path, pool_folder / "volumes", image)
    try:
        yield made
        assert made.left() == []
        assert list((pool_folder / "images/staging").iterdir()) == []
    finally:
        made.clean()


def free_size(at: Path) -> int:
    status = os.statvfs(at)
    return status.f_blocks * status.f_frsize


@pytest.mark.parametrize("kind", ["ext4", "xfs", "btrfs"])
def test_it_grows_while_the_container_writes(host: Host, kind: str) -> None:
    if not resize.may_grow_mounted(kind):
        pytest.skip("this kernel grows a mounted ext4 only for CAP_SYS_RESOURCE, which is missing here")
    host.with_data(kind)
    before, pid = free_size(host.data), host.containers.init_pid("ct1")
    wanted = SMALLEST[kind] + 192 * MIB
    resized = host.volumes.resize("ct1", "/data", wanted)
    assert (resized.size_bytes, resized.mount_point) == (wanted, "/data")
    assert free_size(host.data) > before + 150 * MIB
    assert host.containers.spec("ct1").volumes[1].size_bytes == wanted
    assert host.containers.init_pid("ct1") == pid
    # What it writes then is all there, in order, after a stop and a start.
    (host.data / "large").write_bytes(os.urandom(100 * MIB))
    host.containers.stop("ct1", 0.1)
    host.containers.start("ct1")
    assert (host.data / "log").read_text().splitlines()[:3] == ["0", "1", "2"]
    assert (host.data / "large").stat().st_size == 100 * MIB
    assert host.volumes.resize("ct1", "/data", wanted) == host.volume()


def test_without_the_capability_a_mounted_ext4_is_refused(host: Host) -> None:
    if resize.may_grow_mounted("ext4"):
        pytest.skip("this process has CAP_SYS_RESOURCE")
    host.with_data("ext4")
    with pytest.raises(Precondition, match="stop ct1 first") as raised:
        host.volumes.resize("ct1", "/data", 200 * MIB)
    assert raised.value.reason == "CANNOT_GROW_MOUNTED"
    assert host.volume().size_bytes == SMALLEST["ext4"]
    host.containers.stop("ct1", 0.1)
    host.volumes.resize("ct1", "/data", 200 * MIB)
    host.containers.start("ct1")
    assert free_size(host.data) > 150 * MIB


@pytest.mark.parametrize("kind", ["ext4", "btrfs"])
def test_it_grows_and_shrinks_at_rest(host: Host, kind: str) -> None:
    host.with_data(kind, size_bytes=512 * MIB)
    content = os.urandom(20 * MIB)
    (host.data / "content").write_bytes(content)
    host.containers.stop("ct1", 0.1)
    for size in (1024 * MIB, SMALLEST[kind], SMALLEST[kind] + 12345):
        resized = host.volumes.resize("ct1", "/data", size)
        assert resized.size_bytes == -(-size // 4096) * 4096
        assert host.volumes.all("ct1")[1] == resized
        host.containers.start("ct1")
        assert (host.data / "content").read_bytes() == content
        assert abs(free_size(host.data) - size) < 100 * MIB
        host.containers.stop("ct1", 0.1)


def test_what_does_not_fit_is_refused_and_nothing_changes(host: Host) -> None:
    host.with_data("ext4", size_bytes=256 * MIB)
    content = os.urandom(100 * MIB)
    (host.data / "content").write_bytes(content)
    with pytest.raises(Precondition, match="only while it is stopped"):
        host.volumes.resize("ct1", "/data", 64 * MIB)
    host.containers.stop("ct1", 0.1)
    with pytest.raises(Precondition, match="as it was") as raised:
        host.volumes.resize("ct1", "/data", 64 * MIB)
    assert raised.value.reason == "CANNOT_SHRINK"
    assert host.volume().size_bytes == 256 * MIB
    with pytest.raises(InvalidArgument):
        host.volumes.resize("ct1", "/data", MIB)
    with pytest.raises(Precondition, match="no room") as raised:
        host.volumes.resize("ct1", "/data", 1 << 40)
    assert raised.value.reason == "NO_SPACE"
    for size in (0, -1, 1 << 62):
        with pytest.raises(InvalidArgument):
            host.volumes.resize("ct1", "/data", size)
    host.containers.start("ct1")
    assert (host.data / "content").read_bytes() == content


def test_xfs_does_not_shrink(host: Host) -> None:
    host.with_data("xfs", running=False, size_bytes=512 * MIB)
    with pytest.raises(Precondition, match="cannot be made smaller") as raised:
        host.volumes.resize("ct1", "/data", 400 * MIB)
    assert raised.value.reason == "CANNOT_SHRINK"


def test_a_container_that_is_held_is_busy(host: Host) -> None:
    host.with_data("ext4", running=False)
    with host.containers.hold("ct1", "it is being migrated"):
        with pytest.raises(Busy):
            host.volumes.resize("ct1", "/data", 128 * MIB)
        with pytest.raises(Busy):
            host.export("raw", host.folder / "out")
    with pytest.raises(NotFound, match="it has /, /data"):
        host.volumes.resize("ct1", "/none", 128 * MIB)
    with pytest.raises(NotFound):
        host.volumes.resize("none", "/", 128 * MIB)


def test_a_crash_between_file_and_record_is_made_good(host: Host) -> None:
    host.with_data("ext4", running=False)
    volume = Volume(host._volumes.open("ct1-1").path, "ext4")
    resize.resize_at_rest(volume, 128 * MIB)
    assert host.containers.spec("ct1").volumes[1].size_bytes == SMALLEST["ext4"]
    host.volumes.recover()
    assert host.containers.spec("ct1").volumes[1].size_bytes == 128 * MIB


def test_growth_in_use_that_was_broken_off_goes_on(host: Host) -> None:
    """The file is larger already, device and file system are not."""
    host.with_data("xfs")
    os.truncate(host._volumes.open("ct1-1").path, 512 * MIB)
    host.volumes.recover()
    assert host.volume().size_bytes == 512 * MIB
    host.volumes.resize("ct1", "/data", 512 * MIB)
    assert free_size(host.data) > 400 * MIB


# Export


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def mounted(path: Path, kind: str, at: Path) -> Iterator[Path]:
    at.mkdir()
    device = Volume(path, kind).mount(at)
    try:
        yield at
    finally:
        device.unmount()
        at.rmdir()


@pytest.fixture
def stopped(host: Host) -> Host:
    host.with_data("ext4", size_bytes=100 * MIB + 8192)
    (host.data / "content").write_bytes(os.urandom(10 * MIB))
    host.containers.stop("ct1", 0.1)
    return host


def test_raw(stopped: Host) -> None:
    (file,) = stopped.export("raw", stopped.folder / "out")
    assert digest(file) == digest(stopped._volumes.open("ct1-1").path)


def test_qcow2_keeps_holes(stopped: Host) -> None:
    (file,) = stopped.export("qcow2", stopped.folder / "out")
    original = stopped._volumes.open("ct1-1").path
    compared = ["qemu-img", "compare", "-f", "qcow2", "-F", "raw", str(file), str(original)]
    assert subprocess.run(compared, check=False, capture_output=True).returncode == 0
    assert file.stat().st_size < 16 * MIB


def test_ploop_is_read_by_qemu_and_by_us(stopped: Host) -> None:
    original = stopped._volumes.open("ct1-1").path
    folder = stopped.folder / "out"
    root, described = stopped.export("ploop", folder)
    assert (root.name, described.name) == ("root.hds", "DiskDescriptor.xml")
    subprocess.run(["qemu-img", "check", "-q", "-f", "parallels", root], check=True)
    back = stopped.folder / "back.raw"
    subprocess.run(["qemu-img", "convert", "-f", "parallels", "-O", "raw", root, back], check=True)
    # Whole clusters, and nothing but zeros behind what there was.
    assert back.stat().st_size == 101 * MIB
    assert back.read_bytes().startswith(original.read_bytes())
    head = root.read_bytes()[:64]
    sectors, count = int.from_bytes(head[36:44], "little"), int.from_bytes(head[32:36], "little")
    assert head.startswith(b"WithouFreSpacExt") and sectors == 101 * 2048 and count == 101
    with stopped.images.reserved("again", "ext4"):
        image = stopped.images.add_disk(
            "again", "", "out", DiskSource(folder, "ploop"), keep_identity=True, report=lambda _: None, cancel=Cancel()
        )
    assert image.path.read_bytes() == back.read_bytes()
    with mounted(image.path, "ext4", stopped.folder / "look") as at:
        assert (at / "content").stat().st_size == 10 * MIB
    stopped.images.delete("again")


def test_a_running_container_is_refused_with_a_way_out(host: Host) -> None:
    host.with_data("ext4")
    with pytest.raises(Precondition, match="stop it first, or export a snapshot") as raised:
        host.export("raw", host.folder / "out")
    assert raised.value.reason == "RUNNING"
    with pytest.raises(InvalidArgument, match="vmdk"):
        host.export("vmdk", host.folder / "out")
    with pytest.raises(MigratorError) as unknown:
        host.export("raw", host.folder / "out", snapshot="none")
    assert unknown.value.reason == "SNAPSHOT_NOT_FOUND"


def test_a_snapshot_of_a_running_container(host: Host) -> None:
    host.with_data("ext4")
    (host.data / "before").write_bytes(b"x")
    with host.containers.hold("ct1", "a snapshot is taken"):
        host.keeper.take(host.containers.record("ct1"), "one", lambda: None)
    (host.data / "after").write_bytes(b"y")
    with ExitStack() as stack:
        for index, kind in enumerate(("raw", "ploop")):
            (file, *_) = host.export(kind, host.folder / kind, snapshot="one")
            if kind == "ploop":
                raw = host.folder / "converted.raw"
                subprocess.run(["qemu-img", "convert", "-f", "parallels", "-O", "raw", file, raw], check=True)
                file = raw
            at = stack.enter_context(mounted(file, "ext4", host.folder / f"look{index}"))
            assert (at / "before").read_bytes() == b"x"
            assert not (at / "after").exists()
    assert host.volumes.all() == host.volumes.all("ct1")


def test_nothing_of_ours_is_attached_afterwards(stopped: Host) -> None:
    stopped.export("ploop", stopped.folder / "out")
    assert loop.find(stopped._volumes.open("ct1-1").path) == []
    assert volumes.EXPORT_FORMATS == ("raw", "qcow2", "ploop")


def test_growth_that_fails_half_way_leaves_record_and_file_the_same(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file has grown, xfs_growfs cannot be found: a migration must not see two sizes."""
    host.with_data("xfs")
    monkeypatch.setenv("PATH", str(host.folder))
    with pytest.raises(BlockError, match="growing"):
        host.volumes.resize("ct1", "/data", 512 * MIB)
    monkeypatch.undo()
    assert host.volume().size_bytes == host.containers.spec("ct1").volumes[1].size_bytes == 512 * MIB
    host.volumes.resize("ct1", "/data", 512 * MIB)
    assert free_size(host.data) > 400 * MIB


@pytest.mark.parametrize("kind", ["ext4", "xfs"])
def test_a_container_whose_disk_has_failed_stops_and_starts(host: Host, kind: str) -> None:
    host.with_data(kind)
    shut_down(host.data)
    host.containers.stop("ct1", 0.1)
    host.containers.start("ct1")
    (host.data / "new").write_text("text")
    host.containers.stop("ct1", 0.1)
    assert loop.find(host._volumes.open("ct1-1").path) == []
