"""Disk images with real file systems made into images: the right bytes and files, and nothing left of bad ones."""

import hashlib
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from agent import images
from agent.disk_images import DiskSource, recognise
from agent.images import Image
from agent.server import Servers, Service
from agent.services.images import ImageService
from agent.tarball import Cancel
from blockdev import filesystem, loop, reflink
from blockdev.volume import Volume, VolumeStore
from migrator import channel
from migrator.cli import images as cli
from migrator.cli import transfer
from migrator.errors import Cancelled, InvalidArgument, MigratorError, NotFound, Precondition
from migrator.status import from_rpc
from migrator.v1 import image_pb2, image_pb2_grpc
from tests import disk_kit
from tests.disk_kit import EFI, LINUX, SECTOR, chain_folder
from tests.lab.test_images import Bench

pytestmark = [pytest.mark.root, pytest.mark.skipif(os.geteuid() != 0, reason="needs root")]

MIB = 1 << 20
SIZE = 64 * MIB
# mkfs.xfs makes nothing smaller than 300 MiB.
SIZES = {"xfs": 320 * MIB, "xfs of 512": 320 * MIB, "btrfs": 128 * MIB}
MAKE = {
    "ext4": ["mkfs.ext4", "-q", "-F", "-b", "4096"],
    "ext4 of 1 KiB": ["mkfs.ext4", "-q", "-F", "-b", "1024"],
    "ext3": ["mkfs.ext3", "-q", "-F", "-b", "4096"],
    "xfs": ["mkfs.xfs", "-q", "-f", "-s", "size=4096"],
    "xfs of 512": ["mkfs.xfs", "-q", "-f", "-s", "size=512"],
    "btrfs": ["mkfs.btrfs", "-q", "-f"],
}


@pytest.fixture
def bench(tmp_path: Path) -> Iterator["Disks"]:
    if shutil.which("qemu-img") is None:
        pytest.skip("qemu-img is not installed")
    made = Disks(tmp_path)
    yield made
    try:
        assert made.leftovers() == []
        assert list((made.pool / "images/staging").iterdir()) == []
    finally:
        made.close()


class Disks(Bench):
    """A bench that makes disks."""

    def disk(self, kind: str = "ext4", name: str = "disk.raw") -> Path:
        """A raw file with a file system that has a small root file system in it."""
        path = self.folder / name
        path.touch()
        os.truncate(path, SIZES.get(kind, SIZE))
        subprocess.run([*MAKE[kind], str(path)], check=True, capture_output=True)
        self.change(path, kind, populate)
        return path

    def change(self, path: Path, kind: str, work: Callable[[Path], None]) -> None:
        """Work in the file system of a raw file."""
        at = self.folder / "change"
        at.mkdir()
        device = loop.attach(path, block_bytes=512)
        try:
            filesystem.mount(device.path, at, kind.split(maxsplit=1)[0].replace("ext3", "ext4"))
            try:
                work(at)
            finally:
                filesystem.unmount(at)
        finally:
            device.detach()
            at.rmdir()

    def import_(self, path: Path, kind: str = "", name: str = "tiny", fs: str = "", **options: Any) -> Image:
        keep = bool(options.pop("keep_identity", False))
        cancel = options.pop("cancel", None) or Cancel()
        assert isinstance(cancel, Cancel)
        with self.images.reserved(name, fs or "ext4"):
            source = DiskSource(path, recognise(path, kind), **options)
            return self.images.add_disk(
                name, fs, path.name, source, keep_identity=keep, report=self.said.append, cancel=cancel
            )

    def refused(self, reason: str, path: Path, kind: str = "", **options: Any) -> str:
        with pytest.raises(MigratorError) as raised:
            self.import_(path, kind, **options)
        assert raised.value.reason == reason, raised.value
        assert self.images.all() == []
        assert self.leftovers() == []
        return str(raised.value)

    def convert(self, raw: Path, kind: str, name: str) -> Path:
        made = self.folder / name
        subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", kind, raw, made], check=True)
        return made

    def files(self, image: Image) -> dict[str, tuple[object, ...]]:
        with self.mounted(image) as at:
            return tree(at)


def populate(at: Path) -> None:
    for name in ("etc", "etc/ssh", "usr", "usr/bin", "var", "many"):
        (at / name).mkdir()
    (at / "etc/machine-id").write_text("0123456789abcdef0123456789abcdef\n")
    (at / "etc/hostname").write_text("old\n")
    (at / "etc/ssh/ssh_host_rsa_key").write_text("secret\n")
    (at / "usr/bin/tool").write_bytes(os.urandom(3 * MIB))
    (at / "usr/bin/tool").chmod(0o4755)
    os.chown(at / "usr/bin/tool", 12, 34)
    (at / "usr/bin/tool").chmod(0o4755)
    os.setxattr(at / "usr/bin/tool", "user.note", b"kept")
    (at / "usr/bin/link").symlink_to("/usr/bin/tool")
    os.link(at / "usr/bin/tool", at / "usr/bin/hard")
    with (at / "var/sparse").open("wb") as file:
        file.truncate(50 * MIB)
        file.seek(20 * MIB)
        file.write(b"middle")
    for number in range(200):
        (at / f"many/{number}").write_bytes(os.urandom(number * 37))


def tree(at: Path) -> dict[str, tuple[object, ...]]:
    """Everything that should survive, by path."""
    found: dict[str, tuple[object, ...]] = {}
    for path in sorted(at.rglob("*")):
        status = path.lstat()
        content = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() and not path.is_symlink() else ""
        link = str(path.readlink()) if path.is_symlink() else ""
        found[str(path.relative_to(at))] = (
            status.st_mode,
            status.st_uid,
            status.st_gid,
            status.st_nlink,
            content,
            link,
        )
    found.pop("lost+found", None)
    return found


def source_files(bench: Disks, path: Path, kind: str) -> dict[str, tuple[object, ...]]:
    found: dict[str, tuple[object, ...]] = {}
    bench.change(path, kind, lambda at: found.update(tree(at)))
    return found


def digest(path: Path, start: int = 0, length: int | None = None) -> str:
    with path.open("rb") as file:
        file.seek(start)
        return hashlib.sha256(file.read(path.stat().st_size if length is None else length)).hexdigest()


@pytest.mark.parametrize("kind", ["ext4", "ext3", "xfs", "btrfs"])
def test_a_raw_disk(bench: Disks, kind: str) -> None:
    path = bench.disk(kind)
    files = source_files(bench, path, kind)
    image = bench.import_(path, "raw", keep_identity=True)
    assert image.filesystem == kind.replace("ext3", "ext4")
    assert image.size_bytes == SIZES.get(kind, SIZE)
    if kind.startswith("ext"):
        assert digest(image.path) == digest(path)
    assert bench.files(image) == files


@pytest.mark.parametrize(
    ("kind", "fs"), [("ext4 of 1 KiB", ""), ("xfs of 512", ""), ("ext4", "xfs"), ("btrfs", "ext4")]
)
def test_a_file_system_that_does_not_fit_is_copied_into_one_that_does(bench: Disks, kind: str, fs: str) -> None:
    path = bench.disk(kind)
    files = source_files(bench, path, kind)
    image = bench.import_(path, "raw", fs=fs, keep_identity=True)
    assert image.filesystem == (fs or kind.split(maxsplit=1)[0])
    found = bench.files(image)
    # The number of links of a folder is the file system's own affair.
    assert {n: v[:3] + v[4:] for n, v in found.items()} == {n: v[:3] + v[4:] for n, v in files.items()}
    with bench.mounted(image) as at:
        assert os.getxattr(at / "usr/bin/tool", "user.note") == b"kept"
        assert (at / "usr/bin/hard").stat().st_nlink == 2
        assert (at / "var/sparse").stat().st_blocks * 512 < MIB


def test_an_image_forgets_who_it_was_unless_asked(bench: Disks) -> None:
    path = bench.disk()
    with bench.mounted(bench.import_(path, "raw")) as at:
        assert (at / "etc/machine-id").read_text() == ""
        assert not (at / "etc/hostname").exists()
        assert list((at / "etc/ssh").iterdir()) == []
    with bench.mounted(bench.import_(path, "raw", "kept", keep_identity=True)) as at:
        assert (at / "etc/hostname").read_text() == "old\n"
        assert (at / "etc/ssh/ssh_host_rsa_key").exists()


@pytest.mark.parametrize("format_", ["raw", "qcow2", "parallels"])
@pytest.mark.parametrize("table", ["gpt", "mbr"])
def test_a_root_file_system_in_a_partition(bench: Disks, table: str, format_: str) -> None:
    part = bench.disk(name="part.raw")
    whole = bench.folder / "whole.raw"
    start, sectors = 8192, SIZE // SECTOR
    total = start + sectors + 4096
    if table == "gpt":
        pieces = disk_kit.gpt(total, [(2048, 4095, EFI), (start, start + sectors - 1, LINUX)])
    else:
        pieces = {0: disk_kit.mbr([(0x0C, 2048, 2048), (0x83, start, sectors)])}
    with whole.open("wb") as file:
        file.truncate(total * SECTOR)
        for sector, data in pieces.items():
            file.seek(sector * SECTOR)
            file.write(data)
    subprocess.run(
        ["dd", f"if={part}", f"of={whole}", "bs=1M", f"seek={start * SECTOR // MIB}", "conv=notrunc,sparse"],
        check=True,
        capture_output=True,
    )
    path = whole if format_ == "raw" else bench.convert(whole, format_, f"whole.{format_}")
    image = bench.import_(path, "raw" if format_ == "raw" else "", keep_identity=True)
    assert digest(image.path) == digest(part)
    with bench.mounted(image) as at:
        assert (at / "usr/bin/tool").stat().st_size == 3 * MIB


def test_ploop_by_qemu_has_the_right_bytes(bench: Disks) -> None:
    path = bench.disk()
    folder = bench.folder / "root.hdd"
    folder.mkdir()
    bench.convert(path, "parallels", "root.hdd/root.hds")
    top = [(disk_kit.TOP, "Compressed", "root.hds")]
    (folder / "DiskDescriptor.xml").write_bytes(
        disk_kit.descriptor(SIZE, top, [(disk_kit.TOP, disk_kit.NONE)], cluster_sectors=2048)
    )
    image = bench.import_(folder, keep_identity=True)
    assert digest(image.path) == digest(path)
    assert image.allocated_bytes < SIZE // 2
    image = bench.import_(folder / "DiskDescriptor.xml", name="other", keep_identity=True)
    assert digest(image.path) == digest(path)
    assert "give its folder" in bench_refused_beside(bench, folder / "root.hds")


def bench_refused_beside(bench: Disks, path: Path) -> str:
    with pytest.raises(InvalidArgument) as raised:
        bench.import_(path, name="third")
    return str(raised.value)


def test_a_chain_of_three_ploop_deltas_with_a_real_file_system(bench: Disks) -> None:
    """What each state of the file system was, each snapshot gives: bytes and files."""
    path = bench.disk()
    states, trees = [path.read_bytes()], [source_files(bench, path, "ext4")]
    states[0] = path.read_bytes()

    def second(at: Path) -> None:
        (at / "second").write_bytes(os.urandom(2 * MIB))
        (at / "many/7").unlink()

    def third(at: Path) -> None:
        (at / "third").write_bytes(os.urandom(MIB))
        (at / "second").unlink()
        shutil.rmtree(at / "many")

    for work in (second, third):
        bench.change(path, "ext4", work)
        states.append(path.read_bytes())
        trees.append(source_files(bench, path, "ext4"))
        states[-1] = path.read_bytes()
    guids = chain_folder(bench.folder / "root.hdd", states, cluster_sectors=2048, versions=(1, 2, 2))
    for number, (guid, state, files) in enumerate(zip(guids, states, trees, strict=True)):
        image = bench.import_(bench.folder / "root.hdd", name=f"state{number}", snapshot=guid, keep_identity=True)
        assert digest(image.path) == hashlib.sha256(state).hexdigest()
        assert bench.files(image) == files
    newest = bench.import_(bench.folder / "root.hdd", name="newest", keep_identity=True)
    assert digest(newest.path) == hashlib.sha256(states[-1]).hexdigest()


@pytest.mark.parametrize("kind", ["ext4", "xfs", "btrfs"])
def test_a_journal_is_replayed(bench: Disks, kind: str) -> None:
    """A disk taken from under a mounted file system, as a power cut leaves it."""
    path = bench.disk(kind)
    taken = bench.folder / "taken.raw"

    def write(at: Path) -> None:
        (at / "just written").write_bytes(b"x" * 100_000)
        with (at / "just written").open("rb") as file:
            os.fsync(file.fileno())
        (at / "after that").write_bytes(b"y")
        with (at / "after that").open("rb") as file:
            os.fsync(file.fileno())
        shutil.copyfile(path, taken)

    bench.change(path, kind, write)
    with bench.mounted(bench.import_(taken, "raw")) as at:
        assert (at / "just written").read_bytes() == b"x" * 100_000
        assert (at / "after that").exists()


def test_damaged_file_systems_are_refused(bench: Disks) -> None:
    for kind, start, step in (("ext4", 4096, 512), ("xfs", 512, 512), ("btrfs", MIB, 16 * 1024)):
        path = bench.disk(kind, name=f"{kind}.raw")
        with path.open("r+b") as file:
            for at in range(start, min(start + 4096 * step, SIZE - MIB), step):
                file.seek(at)
                file.write(os.urandom(16))
        bench.refused("BAD_IMAGE", path, "raw")


def test_damaged_and_hostile_disks_are_refused_and_nothing_is_left(bench: Disks) -> None:
    path = bench.disk()
    cut = bench.folder / "cut.raw"
    reflink_or_copy(path, cut)
    os.truncate(cut, SIZE // 2)
    assert "cut off" in bench.refused("BAD_IMAGE", cut, "raw")
    hds = bench.convert(path, "parallels", "a.hds")
    os.truncate(hds, hds.stat().st_size - 3 * MIB)
    assert "cut off" in bench.refused("BAD_IMAGE", hds)
    backed = bench.folder / "backed.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-b", path, "-F", "raw", backed], check=True)
    assert "backing file" in bench.refused("BAD_IMAGE", backed)
    folder = bench.folder / "root.hdd"
    folder.mkdir()
    top = [(disk_kit.TOP, "Plain", "../disk.raw")]
    (folder / "DiskDescriptor.xml").write_bytes(disk_kit.descriptor(SIZE, top, []))
    assert "not the name of a file in its folder" in bench.refused("BAD_IMAGE", folder)
    assert "raw" in bench.refused("UNKNOWN_FORMAT", path)
    assert "snapshot" in bench.refused("INVALID_ARGUMENT", path, "raw", snapshot=disk_kit.TOP)
    fresh = bench.folder / "fresh.raw"
    with fresh.open("wb") as file:
        file.truncate(SIZE)
    subprocess.run([*MAKE["ext4"], fresh], check=True)
    assert "the ext4 on it is empty" in bench.refused("BAD_IMAGE", fresh, "raw")
    empty = bench.folder / "empty"
    empty.write_bytes(b"")
    bench.refused("BAD_IMAGE", empty, "raw")
    # A raw disk on which somebody wrote the header of a qcow2 image is a raw disk.
    with path.open("r+b") as file:
        file.write(backed.read_bytes()[:1024])
    assert bench.import_(path, "raw").filesystem == "ext4"


def reflink_or_copy(source: Path, target: Path) -> None:
    try:
        reflink.clone(source, target)
    except OSError:
        shutil.copyfile(source, target)


def test_paths_that_are_not_there(bench: Disks) -> None:
    with pytest.raises(NotFound):
        bench.import_(bench.folder / "none")
    with pytest.raises(InvalidArgument, match="absolute"):
        bench.import_(Path("disk.raw"))
    with pytest.raises(InvalidArgument, match="format"):
        bench.import_(bench.folder, "vmdk")


def test_no_room_is_told_before_anything_is_written(bench: Disks) -> None:
    path = bench.folder / "big.raw"
    with path.open("wb") as file:
        file.truncate(3 << 30)
    subprocess.run([*MAKE["ext4"], str(path)], check=True)
    with path.open("r+b") as file:
        file.seek(1 << 30)
        for _ in range(1100):
            file.write(b"\1" * MIB)
    with pytest.raises(Precondition) as raised:
        bench.import_(path, "raw")
    assert raised.value.reason == "NO_SPACE"


def test_who_leaves_ends_it(bench: Disks) -> None:
    path = bench.disk()
    qcow2 = bench.convert(path, "qcow2", "a.qcow2")
    cancel = Cancel()
    cancel.cancel()
    for source in (path, qcow2):
        with pytest.raises(Cancelled):
            bench.import_(source, "raw" if source == path else "", cancel=cancel)


def test_clones_of_it_can_grow(bench: Disks) -> None:
    for kind in ("ext4", "xfs", "btrfs"):
        image = bench.import_(bench.disk(kind, name=kind), "raw", kind)
        store = VolumeStore(bench.pool / "volumes")
        clone = store.clone(image.path, f"ct-{kind}", 512 * MIB, image.filesystem)
        at = bench.folder / "grown"
        at.mkdir()
        mounted = Volume(clone.path, clone.kind).mount(at)
        try:
            status = os.statvfs(at)
            assert status.f_blocks * status.f_frsize > 420 * MIB
        finally:
            mounted.unmount()
            at.rmdir()


class Served:
    """The service over gRPC, as the command line uses it."""

    def __init__(self, bench: Disks) -> None:
        service = ImageService(bench.images, bench.folder / "cache")
        self._servers = Servers(
            [
                Service(
                    "migrator.v1.ImageService",
                    lambda server: image_pb2_grpc.add_ImageServiceServicer_to_server(service, server),
                )
            ]
        )
        socket = bench.folder / "agent.sock"
        self._servers.listen_local(socket)
        self._servers.start()
        self._channel = channel.connect_local(socket)
        self.stub = image_pb2_grpc.ImageServiceStub(self._channel)

    def upload(self, files: list[Path], name: str = "tiny", **options: object) -> Image | None:
        start = image_pb2.ImportImageRequest(name=name, path=f"/elsewhere/{files[0].name}", **options)  # type: ignore[arg-type]
        answers = list(self.stub.UploadImage(cli._upload(start, files)))
        return answers[-1].image if answers[-1].HasField("image") else None

    def close(self) -> None:
        self._channel.close()
        self._servers.stop(5)


@pytest.fixture
def served(bench: Disks) -> Iterator[Served]:
    made = Served(bench)
    yield made
    made.close()


def test_a_ploop_folder_is_sent_to_another_host(bench: Disks, served: Served) -> None:
    path = bench.disk()
    chain_folder(bench.folder / "root.hdd", [path.read_bytes()], cluster_sectors=2048)
    (bench.folder / "root.hdd/DiskDescriptor.xml.lck").touch()
    (bench.folder / "root.hdd/templates").mkdir()
    files = transfer.files_of(bench.folder / "root.hdd")
    made = served.upload(files, keep_identity=True)
    assert made is not None and made.origin == "DiskDescriptor.xml"
    assert digest(bench.images.get("tiny").path) == digest(path)


def test_a_raw_disk_is_sent_and_shares_its_blocks(bench: Disks, served: Served) -> None:
    path = bench.disk()
    served.upload([path], format="raw", partition=0, keep_identity=True)
    assert digest(bench.images.get("tiny").path) == digest(path)


def test_what_is_sent_is_not_trusted(bench: Disks, served: Served) -> None:
    Request, start = image_pb2.UploadImageRequest, image_pb2.ImportImageRequest(name="tiny", format="raw")

    def refused(*requests: image_pb2.UploadImageRequest) -> str:
        with pytest.raises(grpc.RpcError) as raised:
            list(served.stub.UploadImage(iter(requests)))
        assert list((bench.pool / "images/staging").iterdir()) == []
        return from_rpc(raised.value).reason

    def file(name: str, size_bytes: int = 100) -> image_pb2.UploadImageRequest:
        return Request(file=image_pb2.UploadedFile(name=name, size_bytes=size_bytes))

    def piece(offset: int, data: bytes = b"x") -> image_pb2.UploadImageRequest:
        return Request(piece=image_pb2.UploadedPiece(offset=offset, data=data))

    begin = Request(start=start)
    assert refused() == "BAD_UPLOAD"
    assert refused(file("a")) == "BAD_UPLOAD"
    assert refused(begin) == "BAD_UPLOAD"
    assert refused(begin, piece(0)) == "BAD_UPLOAD"
    for name in ("", ".", "..", "../a", "/etc/passwd", "a/b", "a\0b", "x" * 300, "-rf"):
        assert refused(begin, file(name)) == "BAD_UPLOAD"
    assert refused(begin, file("a"), file("a")) == "BAD_UPLOAD"
    assert refused(begin, file("a", -1)) == "BAD_UPLOAD"
    assert refused(begin, file("a", 1 << 62)) == "BAD_UPLOAD"
    for offset in (-1, 100, 1 << 62):
        assert refused(begin, file("a"), piece(offset)) == "BAD_UPLOAD"
    assert refused(begin, file("a"), begin) == "BAD_UPLOAD"
    assert refused(begin, file("a"), file("b")) == "BAD_UPLOAD"
    assert refused(begin, file("a"), piece(0)) == "BAD_IMAGE"
    assert refused(Request(start=image_pb2.ImportImageRequest(name="tiny")), file("a"), piece(0)) == "UNKNOWN_FORMAT"


def test_a_sender_who_leaves_leaves_nothing(bench: Disks, served: Served) -> None:
    Request = image_pb2.UploadImageRequest
    begun, gone = threading.Event(), threading.Event()

    def requests() -> Iterator[image_pb2.UploadImageRequest]:
        yield Request(start=image_pb2.ImportImageRequest(name="tiny", format="raw"))
        yield Request(file=image_pb2.UploadedFile(name="a", size_bytes=1 << 30))
        yield Request(piece=image_pb2.UploadedPiece(offset=0, data=b"x" * MIB))
        begun.set()
        gone.wait(10)

    call = served.stub.UploadImage(requests())
    assert begun.wait(10)
    call.cancel()
    gone.set()
    deadline = time.monotonic() + 10
    while list((bench.pool / "images/staging").iterdir()):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_what_a_crash_leaves_of_an_import_is_swept(bench: Disks) -> None:
    path = bench.disk("ext4 of 1 KiB")
    at = bench.folder / "mounts/tiny.12345678"
    (at / "old").mkdir(parents=True)
    filesystem.mount(loop.attach(path, block_bytes=512).path, at / "old", "ext4")
    (bench.pool / "images/staging/0123").mkdir()
    (bench.pool / "images/staging/0123/disk.raw").write_bytes(b"x")
    bench.open().sweep()
    assert (bench.folder / "mounts").is_dir() and bench.leftovers() == []
    assert list((bench.pool / "images/staging").iterdir()) == []
    for device in loop.find(path):
        device.detach()


def test_what_cannot_be_swept_keeps_nothing_else_from_it(bench: Disks, monkeypatch: pytest.MonkeyPatch) -> None:
    """The agent starts, and the next start sweeps the rest."""
    monkeypatch.setattr(images, "UNMOUNT_TIMEOUT_S", 0.1)
    path, at = bench.disk("ext4 of 1 KiB"), bench.folder / "mounts"
    for token in ("busy.1", "free.2"):
        (at / token).mkdir()
    filesystem.mount(loop.attach(path, block_bytes=512).path, at / "busy.1", "ext4")
    (bench.pool / "images/staging/0123").mkdir()
    with (at / "busy.1/used").open("w"):
        bench.open().sweep()
        assert [entry.name for entry in at.iterdir()] == ["busy.1"]
        assert (at / "busy.1/used").exists()
        assert list((bench.pool / "images/staging").iterdir()) == []
    bench.open().sweep()
    assert bench.leftovers() == []
    for device in loop.find(path):
        device.detach()
