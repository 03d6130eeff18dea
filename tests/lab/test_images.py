"""Images from tarballs, friendly and hostile, and from packages. Nothing is left where one could not be made."""

import io
import os
import subprocess
import tarfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from agent import images, tarball, template
from agent.database import Database
from agent.images import Image, Images
from agent.tarball import Cancel
from blockdev import filesystem, pool
from blockdev.volume import Volume
from migrator.errors import AlreadyExists, Busy, Cancelled, InvalidArgument, MigratorError, NotFound, Precondition

pytestmark = [pytest.mark.root, pytest.mark.skipif(os.geteuid() != 0, reason="needs root")]

POOL_BYTES = 1 << 30
Fill = Callable[[tarfile.TarFile], None]


class Bench:
    """An image store in a pool of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.state = folder / "state"
        self.state.mkdir()
        self.pool = pool.ensure(self.state, POOL_BYTES)
        self.database = Database(self.state / "agent.db", [images.SCHEMA])
        self.images = self.open()
        self.said: list[str] = []

    def open(self) -> Images:
        return Images(self.database, self.pool / "images", self.folder / "mounts")

    def tarball(self, fill: Fill, mode: str = "w") -> Path:
        path = self.folder / "rootfs.tar"
        with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
            fill(archive)
        return path

    def add(self, path: Path, name: str = "tiny", kind: str = "ext4", cancel: Cancel | None = None) -> Image:
        with self.images.reserved(name, kind):
            source = tarball.recognise(path)
            return self.images.add(name, kind, path.name, source, report=self.said.append, cancel=cancel or Cancel())

    def mounted(self, image: Image) -> "Mounted":
        return Mounted(image, self.folder / "look")

    def leftovers(self) -> list[str]:
        unfinished = [path.name for path in (self.pool / "images/unfinished").iterdir()]
        attached = subprocess.run(
            ["losetup", "-l", "-n", "-O", "BACK-FILE"], check=True, capture_output=True, text=True
        )
        loops = [line for line in attached.stdout.splitlines() if str(self.pool / "images") in line]
        return unfinished + [path.name for path in (self.folder / "mounts").iterdir()] + loops

    def close(self) -> None:
        self.database.close()
        pool.close(self.state)


class Mounted:
    """An image's files, to look at."""

    def __init__(self, image: Image, at: Path) -> None:
        self._volume = Volume(image.path, image.filesystem)
        self._at = at

    def __enter__(self) -> Path:
        self._at.mkdir()
        self._mounted = self._volume.mount(self._at)
        return self._at

    def __exit__(self, *_: object) -> None:
        self._mounted.unmount()
        self._at.rmdir()


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path)
    yield made
    made.close()


def put(archive: tarfile.TarFile, name: str, content: bytes = b"", **attributes: object) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for key, value in attributes.items():
        setattr(info, key, value)
    archive.addfile(info, io.BytesIO(content))


def folder(archive: tarfile.TarFile, name: str) -> None:
    put(archive, name, type=tarfile.DIRTYPE, mode=0o755)


def link(archive: tarfile.TarFile, name: str, target: str, kind: bytes = tarfile.SYMTYPE) -> None:
    put(archive, name, type=kind, linkname=target)


def ordinary(archive: tarfile.TarFile) -> None:
    for name in ("etc", "etc/ssh", "var", "var/lib", "var/lib/dbus", "bin", "dev"):
        folder(archive, name)
    put(archive, "bin/tool", b"x" * 5000, mode=0o4755, uid=0, gid=7)
    put(archive, "bin/other", b"y", mode=0o755, uid=1234, gid=4321, pax_headers={"SCHILY.xattr.user.note": "kept"})
    link(archive, "bin/absolute", "/bin/tool")
    put(archive, "dev/null", type=tarfile.CHRTYPE, devmajor=1, devminor=3, mode=0o666)
    put(archive, "etc/machine-id", b"0123456789abcdef0123456789abcdef\n")
    put(archive, "etc/resolv.conf", b"nameserver 192.0.2.1\n")
    put(archive, "etc/hostname", b"builder\n")
    put(archive, "etc/ssh/ssh_host_ed25519_key", b"secret")
    put(archive, "etc/ssh/sshd_config", b"")


@pytest.mark.parametrize("kind", ["ext4", "xfs", "btrfs"])
def test_a_tarball_becomes_an_image(bench: Bench, kind: str) -> None:
    image = bench.add(bench.tarball(ordinary), kind=kind)
    assert (image.name, image.filesystem) == ("tiny", kind)
    assert image.allocated_bytes < image.size_bytes
    with bench.mounted(image) as at:
        tool = (at / "bin/tool").stat()
        assert (tool.st_size, tool.st_mode & 0o7777, tool.st_gid) == (5000, 0o4755, 7)
        assert (at / "bin/other").stat().st_uid == 1234
        assert os.getxattr(at / "bin/other", "user.note") == b"kept"
        assert (at / "bin/absolute").readlink() == Path("/bin/tool")
        assert (at / "dev/null").is_char_device()
        assert (at / "etc/machine-id").read_bytes() == b""
        assert sorted(path.name for path in (at / "etc").iterdir()) == ["machine-id", "ssh"]
        assert [path.name for path in (at / "etc/ssh").iterdir()] == ["sshd_config"]
    assert bench.leftovers() == []
    assert [found.name for found in bench.images.all()] == ["tiny"]


@pytest.mark.parametrize("command", [["gzip", "-k"], ["zstd", "-q"]])
def test_compressed_tarballs(bench: Bench, command: list[str]) -> None:
    path = bench.tarball(ordinary)
    subprocess.run([*command, str(path)], check=True)
    packed = next(found for found in bench.folder.iterdir() if found.name.startswith("rootfs.tar."))
    bench.add(packed)
    damaged = bench.folder / "damaged"
    damaged.write_bytes(packed.read_bytes()[:-20])
    with pytest.raises(InvalidArgument, match="cannot be"):
        bench.add(damaged, "damaged")
    assert bench.leftovers() == []


def through_a_link(archive: tarfile.TarFile, outside: str) -> None:
    link(archive, "door", outside)
    put(archive, "door/planted", b"evil")


def through_a_relative_link(archive: tarfile.TarFile, outside: str) -> None:
    folder(archive, "a")
    link(archive, "a/door", "../" * 20 + outside.lstrip("/"))
    put(archive, "a/door/planted", b"evil")


def through_two_links(archive: tarfile.TarFile, outside: str) -> None:
    link(archive, "one", "..")
    link(archive, "two", "one/" + "../" * 20 + outside.lstrip("/"))
    put(archive, "two/planted", b"evil")


def by_dots(archive: tarfile.TarFile, outside: str) -> None:
    put(archive, "../" * 20 + outside.lstrip("/") + "/planted", b"evil")


def by_an_absolute_path(archive: tarfile.TarFile, outside: str) -> None:
    put(archive, f"{outside}/planted", b"evil")


def over_a_file_behind_a_link(archive: tarfile.TarFile, outside: str) -> None:
    link(archive, "file", f"{outside}/precious")
    put(archive, "file", b"evil")


def by_a_hard_link(archive: tarfile.TarFile, outside: str) -> None:
    link(archive, "file", f"{outside}/precious", tarfile.LNKTYPE)
    put(archive, "file", b"evil")


def by_a_hard_link_through_a_link(archive: tarfile.TarFile, outside: str) -> None:
    link(archive, "door", outside)
    link(archive, "file", "door/precious", tarfile.LNKTYPE)
    put(archive, "file", b"evil")


def folders_behind_links(archive: tarfile.TarFile, outside: str) -> None:
    """What is normalised after unpacking must not be reached through links either."""
    link(archive, "etc", outside)
    put(archive, "ok", b"")


@pytest.mark.parametrize(
    "attack",
    [
        through_a_link,
        through_a_relative_link,
        through_two_links,
        by_dots,
        by_an_absolute_path,
        over_a_file_behind_a_link,
        by_a_hard_link,
        by_a_hard_link_through_a_link,
        folders_behind_links,
    ],
)
def test_a_hostile_tarball_does_not_leave_its_folder(
    bench: Bench, attack: Callable[[tarfile.TarFile, str], None]
) -> None:
    outside = bench.folder / "outside"
    outside.mkdir()
    for name in ("precious", "machine-id", "resolv.conf"):
        (outside / name).write_bytes(b"precious")
    try:
        bench.add(bench.tarball(lambda archive: attack(archive, str(outside))))
    except MigratorError as error:
        assert error.reason == "BAD_TARBALL"
        assert bench.images.all() == []
    assert sorted(path.name for path in outside.iterdir()) == ["machine-id", "precious", "resolv.conf"]
    assert all(path.read_bytes() == b"precious" and path.stat().st_nlink == 1 for path in outside.iterdir())
    assert bench.leftovers() == []


def test_a_bomb_is_refused(bench: Bench) -> None:
    bomb = bench.folder / "bomb.tar.zst"
    script = f"head -c 3G /dev/zero | zstd -q -1 -o {bomb}"
    subprocess.run(["sh", "-c", script], check=True)
    with pytest.raises(Precondition) as raised:
        bench.add(bomb)
    assert raised.value.reason == "NO_SPACE"
    assert bench.leftovers() == []


def test_many_small_files_get_the_room_that_they_need(bench: Bench) -> None:
    def fill(archive: tarfile.TarFile) -> None:
        for number in range(20_000):
            put(archive, f"{number}", b"x")

    image = bench.add(bench.tarball(fill))
    with bench.mounted(image) as at:
        assert sum(1 for path in at.iterdir() if path.is_file()) == 20_000


@pytest.mark.parametrize("content", [b"", b"hello" * 1000, b"\x1f\x8bnonsense", b"\x28\xb5\x2f\xfdnonsense"])
def test_what_is_no_tarball(bench: Bench, content: bytes) -> None:
    path = bench.folder / "file"
    path.write_bytes(content)
    with pytest.raises(InvalidArgument):
        bench.add(path)
    assert bench.leftovers() == []


def test_an_empty_tarball_is_no_image(bench: Bench) -> None:
    with pytest.raises(InvalidArgument):
        bench.add(bench.tarball(lambda archive: None))
    assert bench.leftovers() == []


def test_files_that_cannot_be_read(bench: Bench) -> None:
    os.mkfifo(bench.folder / "pipe")
    with pytest.raises(InvalidArgument, match="not a file"):
        bench.add(bench.folder / "pipe")
    with pytest.raises(NotFound):
        bench.add(bench.folder / "none")
    with pytest.raises(InvalidArgument, match="absolute"):
        bench.add(Path("rootfs.tar"))


def test_names(bench: Bench) -> None:
    path = bench.tarball(ordinary)
    for name in ("", "../x", "A", "a/b", "x" * 41):
        with pytest.raises(InvalidArgument):
            bench.add(path, name)
    bench.add(path)
    with pytest.raises(AlreadyExists):
        bench.add(path)
    with bench.images.reserved("other", "ext4"), pytest.raises(Busy):
        bench.add(path, "other")
    bench.images.delete("tiny")
    with pytest.raises(NotFound):
        bench.images.get("tiny")
    bench.add(path)


def test_who_leaves_ends_it(bench: Bench) -> None:
    slow = bench.folder / "slow.tar.zst"
    subprocess.run(["sh", "-c", f"head -c 700M /dev/urandom | zstd -q --fast -o {slow}"], check=True)
    cancel = Cancel()
    timer = threading.Timer(0.05, cancel.cancel)
    timer.start()
    with pytest.raises(Cancelled):
        bench.add(slow, cancel=cancel)
    timer.join()
    assert bench.leftovers() == []


def test_what_a_crash_leaves_is_swept(bench: Bench) -> None:
    store = bench.images._unfinished
    volume = store.create("tiny.12345678", 64 << 20, "ext4")
    at = bench.folder / "mounts/tiny.12345678"
    at.mkdir()
    volume.mount(at)
    (bench.pool / "images/stray.img").touch()
    bench.open().sweep()
    assert bench.leftovers() == []
    assert not (bench.pool / "images/stray.img").exists()
    assert not os.path.ismount(at)
    filesystem.sync(bench.pool)


def test_a_template_is_built_and_kept(bench: Bench) -> None:
    if subprocess.run(["mmdebstrap", "--version"], check=False, capture_output=True).returncode != 0:
        pytest.skip("mmdebstrap is not installed")
    cache = bench.folder / "cache"
    said: list[str] = []

    def build() -> tarball.Tarball:
        return template.build(cache, "bookworm", ["busybox-static"], said.append, Cancel())

    try:
        first = build()
    except Precondition as error:
        pytest.skip(str(error))
    made = first.path.stat().st_ino
    assert build().path.stat().st_ino == made
    assert "cache" in said[-1]
    with bench.images.reserved("base", "ext4"):
        image = bench.images.add("base", "ext4", "test", first, report=said.append, cancel=Cancel())
    with bench.mounted(image) as at:
        assert (at / "bin/busybox").exists()
        assert not (at / "etc/apt/apt.conf.d/00host").exists()
        assert not list((at / "var/cache/apt/archives").glob("*.deb"))
    assert not list(cache.glob("build-*"))


@pytest.mark.parametrize(
    ("suite", "packages"),
    [("--help", []), ("Book worm", []), ("bookworm", ["a,b"]), ("bookworm", ["--x"]), ("../x", [])],
)
def test_what_cannot_be_built(suite: str, packages: list[str], tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument):
        template.build(tmp_path, suite, packages, lambda text: None, Cancel())
