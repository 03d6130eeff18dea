"""A tiny root file system, and a host's worth of containers in folders of the test's own."""

import os
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from agent import container_records, snapshot_records
from agent.assembly import Assembly
from agent.cgroup import Cgroup
from agent.containers import Containers
from agent.database import Database
from agent.network import Networks
from agent.processes import Process
from agent.runtime import Runtime
from agent.snapshots import SnapshotKeeper
from blockdev.volume import VolumeStore
from migrator.errors import NotFound
from migrator.network import Interface, PublishedPort
from migrator.v1.container_pb2 import ContainerSpec, Volume

BUSYBOX = Path("/bin/busybox")
APPLETS = (
    "cat", "chmod", "cut", "echo", "env", "find", "grep", "head", "hostname", "id", "kill", "ls", "mkdir", "mknod",
    "mount", "nc", "printf", "ps", "pwd", "seq", "sh", "sleep", "stat", "stty", "sync", "tail", "test",
    "touch", "tr", "tty", "wc",
)  # fmt: skip
IMAGE_BYTES = 48 << 20


@dataclass(frozen=True)
class TestImage:
    path: Path
    filesystem: str = "ext4"
    __test__ = False


class OneImage:
    """An image store with one image, called tiny."""

    def __init__(self, image: TestImage) -> None:
        self._image = image

    def get(self, name: str) -> TestImage:
        if name != "tiny":
            raise NotFound(f"there is no image {name}")
        return self._image


class NoPublisher:
    def publish(self, container: str, interfaces: Sequence[Interface], ports: Sequence[PublishedPort]) -> None:
        assert not ports

    def unpublish(self, container: str) -> None:
        pass


class NoAddresses:
    def assign(self, container: str, spec: ContainerSpec, others: Sequence[ContainerSpec]) -> None:
        assert not spec.interfaces


def make_image(path: Path, filesystem: str = "ext4") -> TestImage:
    """An image with busybox and an unprivileged user in it."""
    root = path.parent / f"{path.name}.root"
    for folder in ("bin", "etc", "proc", "sys", "dev", "tmp", "root", "home/app"):
        (root / folder).mkdir(parents=True)
    (root / "bin/busybox").write_bytes(BUSYBOX.read_bytes())
    (root / "bin/busybox").chmod(0o755)
    (root / "tmp").chmod(0o1777)
    for applet in APPLETS:
        (root / "bin" / applet).symlink_to("busybox")
    (root / "etc/passwd").write_text("root:x:0:0:root:/root:/bin/sh\napp:x:1000:1001:app:/home/app:/bin/sh\n")
    (root / "etc/group").write_text("root:x:0:\napp:x:1001:\nextra:x:1002:app\n")
    with path.open("wb") as file:
        file.truncate(IMAGE_BYTES)
    subprocess.run(["mkfs.ext4", "-q", "-b", "4096", "-d", str(root), str(path)], check=True)
    return TestImage(path, filesystem)


class Bench:
    """A host's containers, and a way to make its agent forget everything that it holds in memory."""

    def __init__(self, folder: Path, volumes: Path, image: TestImage) -> None:
        self.folder = folder
        self.parent = f"migrator-test-{os.getpid()}"
        self.runtime = Runtime(folder / "state", folder / "run", self.parent)
        self.networks = Networks()
        self._images = OneImage(image)
        self._volumes = VolumeStore(volumes)
        self.containers = self._open()

    def _open(self) -> Containers:
        self.database = Database(self.folder / "state/agent.db", [container_records.SCHEMA, snapshot_records.SCHEMA])
        assembly = Assembly(self.runtime, self._volumes, self.networks, NoPublisher())
        self.keeper = SnapshotKeeper(self.database, assembly, self._volumes, self._volumes.folder.parent / "snapshots")
        return Containers(self.database, self.runtime, assembly, self._images, NoAddresses(), self.keeper)

    def restart_agent(self, away_s: float = 0.0, *, reboot: bool = False) -> None:
        """What a new agent process would know, perhaps after a reboot of the host."""
        self.containers.close()
        if reboot:
            for record in self.containers.all():
                # conmon and container die without a word.
                Process(record.conmon_pid, record.conmon_ticks).signal(9)
                self.runtime.delete(record.name)
                for mounted in self.containers.mounted_volumes(record.name):
                    mounted.unmount()
                self.networks.destroy(record.name)
        self.database.close()
        time.sleep(away_s)
        self.containers = self._open()
        self.containers.reconcile()

    def create(self, name: str, script: str = "exec sleep 1000000", **spec: object) -> None:
        """A container whose first process is a shell with this script."""
        volumes = [Volume(mount_point="/", size_bytes=IMAGE_BYTES)]
        self.containers.create(name, ContainerSpec(image="tiny", volumes=volumes, command=["sh", "-c", script], **spec))  # type: ignore[arg-type]

    def log(self, name: str) -> str:
        path = self.runtime.paths(name).log
        return path.read_text() if path.exists() else ""

    def clean(self) -> None:
        try:
            for record in self.containers.all():
                self.containers.forget(record.name)
            self.containers.close()
            self.networks.close()
            self.database.close()
        finally:
            Cgroup(f"/{self.parent}").destroy()


@contextmanager
def bench(folder: Path, volumes: Path, image: TestImage) -> Iterator[Bench]:
    made = Bench(folder, volumes, image)
    try:
        yield made
    finally:
        made.clean()


def need(*programs: str) -> None:
    """Skip unless root and with these programs."""
    if os.geteuid() != 0:
        pytest.skip("needs root")
    for program in programs:
        if not Path(program).exists() and not any(
            (Path(p) / program).exists() for p in ("/usr/bin", "/usr/sbin", "/bin", "/sbin")
        ):
            pytest.skip(f"{program} is not installed")
