"""A tiny root file system, and a host's worth of containers in folders of the test's own."""

import os
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from agent import container_records
from agent.assembly import Assembly
from agent.cgroup import Cgroup
from agent.containers import Containers
from agent.database import Database
from agent.network import Networks
from agent.runtime import Runtime
from migrator.errors import NotFound
from migrator.network import Interface, PublishedPort
from migrator.v1.container_pb2 import ContainerSpec

BUSYBOX = Path("/bin/busybox")
APPLETS = (
    "cat", "chmod", "cut", "echo", "env", "find", "grep", "head", "hostname", "id", "kill", "ls", "mkdir", "mknod", "mount",
    "nc", "printf", "ps", "pwd", "sh", "sleep", "stat", "stty", "sync", "tail", "test", "touch", "tr", "tty", "wc",
)  # fmt: skip
IMAGE_BYTES = 64 << 20


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


class _Mounted:
    def __init__(self, at: Path) -> None:
        self.at = at

    @property
    def device(self) -> Path:
        found = subprocess.run(["findmnt", "-no", "SOURCE", str(self.at)], check=True, capture_output=True, text=True)
        return Path(found.stdout.strip())

    def unmount(self) -> None:
        subprocess.run(["umount", str(self.at)], check=True)


class _File:
    def __init__(self, path: Path) -> None:
        self._path = path

    def mount(self, at: Path) -> _Mounted:
        subprocess.run(["mount", "-o", "loop", str(self._path), str(at)], check=True)
        return _Mounted(at)


class FileVolumes:
    """Volumes as plain files with ext4, mounted by mount(8)."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir()

    def create(self, name: str, size_bytes: int, kind: str) -> _File:
        path = self._folder / name
        with path.open("wb") as file:
            file.truncate(size_bytes)
        subprocess.run([f"mkfs.{kind}", "-q", str(path)], check=True)
        return _File(path)

    def clone(self, source_image: Path, name: str, size_bytes: int, kind: str) -> _File:
        subprocess.run(["cp", "--sparse=always", str(source_image), str(self._folder / name)], check=True)
        return _File(self._folder / name)

    def open(self, name: str) -> _File:
        return _File(self._folder / name)

    def delete(self, name: str) -> None:
        (self._folder / name).unlink(missing_ok=True)

    def find_mounted(self, name: str, at: Path) -> _Mounted | None:
        return _Mounted(at) if os.path.ismount(at) else None

    def allocated_bytes(self, name: str) -> int:
        return (self._folder / name).stat().st_blocks * 512


class Bench:
    """A host's containers, and a way to make its agent forget everything that it holds in memory."""

    def __init__(self, folder: Path, image: TestImage) -> None:
        self.folder = folder
        self.parent = f"migrator-test-{os.getpid()}"
        self.runtime = Runtime(folder / "state", folder / "run", self.parent)
        self.networks = Networks()
        self._images = OneImage(image)
        self._volumes = FileVolumes(folder / "volumes")
        self.containers = self._open()

    def _open(self) -> Containers:
        self.database = Database(self.folder / "state/agent.db", [container_records.SCHEMA])
        assembly = Assembly(self.runtime, self._volumes, self.networks, NoPublisher())
        return Containers(self.database, self.runtime, assembly, self._images, NoAddresses())

    def restart_agent(self) -> None:
        """What a new agent process would know."""
        self.containers.close()
        self.database.close()
        self.containers = self._open()
        self.containers.reconcile()

    def create(self, name: str, script: str = "exec sleep 1000000", **spec: object) -> None:
        """A container whose first process is a shell with this script."""
        self.containers.create(name, ContainerSpec(image="tiny", command=["sh", "-c", script], **spec))  # type: ignore[arg-type]

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
def bench(folder: Path, image: TestImage) -> Iterator[Bench]:
    made = Bench(folder, image)
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
