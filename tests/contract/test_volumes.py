"""Volumes with every kind of file system: made, cloned, grown, mounted, adopted, deleted; and the pool under them."""

import ctypes
import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from blockdev import filesystem, kernel, loop, pool, reflink
from blockdev.errors import BlockError
from blockdev.volume import MOUNT, SUFFIX, UNFINISHED, MountedVolume, Volume, VolumeStore
from tests.failing import shut_down

pytestmark = pytest.mark.root

MIB = 1 << 20
# Of inotify(7).
IN_CLOSE_WRITE = 0x8
SIZE = 320 * MIB
GROWN = 448 * MIB
KINDS = filesystem.KINDS


@pytest.fixture
def store(pool_folder: Path) -> Iterator[VolumeStore]:
    """A store on a pool, empty before and after each test."""
    store = VolumeStore(pool_folder / "volumes")
    try:
        yield store
    finally:
        store.sweep()
        for name in store.names():
            store.delete(name)


@pytest.fixture
def mounts(tmp_path: Path) -> Iterator["Mounts"]:
    with ExitStack() as stack:
        yield Mounts(tmp_path, stack)


class Mounts:
    """Mounts volumes for the time of a test."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self._folder, self._stack = folder, stack

    def __call__(self, volume: Volume, name: str) -> MountedVolume:
        at = self._folder / name
        at.mkdir(exist_ok=True)
        mounted = volume.mount(at)
        self._stack.callback(lambda: mounted.unmount() if os.path.ismount(at) else None)
        return mounted


def _free_bytes(at: Path) -> int:
    found = os.statvfs(at)
    return found.f_bavail * found.f_frsize


@pytest.mark.parametrize("kind", KINDS)
def test_a_volume_keeps_what_is_written(store: VolumeStore, mounts: Mounts, kind: str) -> None:
    volume = store.create("ct101", SIZE, kind)
    assert volume.size_bytes == SIZE
    assert volume.allocated_bytes < SIZE / 4
    mounted = mounts(volume, "at")
    assert mounted.device.direct_io
    (mounted.at / "file").write_text("text")
    os.mknod(mounted.at / "null", 0o20666, os.makedev(1, 3))
    (mounted.at / "null").write_text("device files work")
    mounted.unmount()
    assert not os.path.ismount(mounted.at)
    assert loop.find(volume.path) == []
    again = mounts(store.open("ct101", kind), "at")
    assert (again.at / "file").read_text() == "text"


@pytest.mark.parametrize("kind", KINDS)
def test_a_frozen_volume_unmounts(store: VolumeStore, mounts: Mounts, kind: str) -> None:
    volume = store.create("ct101", SIZE, kind)
    mounted = mounts(volume, "at")
    (mounted.at / "file").write_text("text")
    assert filesystem.freeze(mounted.at)
    assert not filesystem.freeze(mounted.at)
    mounted.unmount()
    assert loop.find(volume.path) == []
    again = mounts(volume, "at")
    assert not filesystem.thaw(again.at)
    assert (again.at / "file").read_text() == "text"


@pytest.mark.parametrize("kind", KINDS)
def test_clones_are_grown_and_mounted_beside_their_image(store: VolumeStore, mounts: Mounts, kind: str) -> None:
    image = store.create("debian", SIZE, kind)
    filled = mounts(image, "image")
    (filled.at / "release").write_text("12")
    filled.unmount()

    same = store.clone(image.path, "ct101", SIZE, kind)
    larger = store.clone(image.path, "ct102", GROWN, kind)
    assert (same.size_bytes, larger.size_bytes) == (SIZE, GROWN)
    every = [mounts(volume, name) for volume, name in ((image, "image"), (same, "same"), (larger, "larger"))]
    for number, mounted in enumerate(every):
        assert (mounted.at / "release").read_text() == "12"
        (mounted.at / "own").write_text(str(number))
    assert _free_bytes(every[2].at) > _free_bytes(every[1].at) + (GROWN - SIZE) * 3 // 4
    for mounted in every:
        filesystem.sync(mounted.at)
    assert [(mounted.at / "own").read_text() for mounted in every] == ["0", "1", "2"]
    for mounted, name in zip(every, ("debian", "ct101", "ct102"), strict=True):
        assert store.find_mounted(name, mounted.at) == mounted
        assert store.find_mounted("debian" if name != "debian" else "ct101", mounted.at) is None


@pytest.mark.parametrize("kind", KINDS)
def test_a_clone_of_a_mounted_image_is_grown(store: VolumeStore, mounts: Mounts, kind: str) -> None:
    image = store.create("debian", SIZE, kind)
    mounted = mounts(image, "image")
    (mounted.at / "release").write_text("12")
    filesystem.freeze(mounted.at)
    try:
        clone = store.clone(image.path, "ct101", GROWN, kind)
    finally:
        filesystem.thaw(mounted.at)
    assert (mounts(clone, "clone").at / "release").read_text() == "12"
    assert store.names() == ["ct101", "debian"]
    assert list(store.folder.glob(f"*{MOUNT}")) == []


def test_a_clone_cannot_be_smaller(store: VolumeStore) -> None:
    image = store.create("debian", SIZE, "ext4")
    with pytest.raises(BlockError, match="cannot be cloned"):
        store.clone(image.path, "ct101", SIZE - 4096, "ext4")
    assert store.names() == ["debian"]


def test_a_mounted_volume_is_found_only_where_it_is(store: VolumeStore, mounts: Mounts, tmp_path: Path) -> None:
    mounted = mounts(store.create("ct101", SIZE, "ext4"), "at")
    assert store.find_mounted("ct101", mounted.at) == mounted
    assert store.find_mounted("ct101", tmp_path) is None
    assert store.find_mounted("ct102", mounted.at) is None


def test_a_received_volume_is_empty(store: VolumeStore) -> None:
    volume = store.receive("ct101", SIZE, "ext4")
    assert (volume.size_bytes, volume.allocated_bytes) == (SIZE, 0)


def test_what_is_not_there_takes_nothing(store: VolumeStore) -> None:
    """As of a container that is being removed while all are listed."""
    volume = store.create("ct101", SIZE, "ext4")
    assert store.allocated_bytes("ct101") == volume.allocated_bytes > 0
    store.delete("ct101")
    assert store.allocated_bytes("ct101") == 0


def test_deleting_is_repeatable_and_detaches(store: VolumeStore) -> None:
    volume = store.create("ct101", SIZE, "ext4")
    device = loop.attach(volume.path)
    store.delete("ct101")
    assert not (Path("/sys/block") / device.path.name / "loop").exists()
    store.delete("ct101")
    assert store.names() == []
    with pytest.raises(BlockError, match="no volume"):
        store.open("ct101")


def test_a_taken_name_is_refused_and_kept(store: VolumeStore) -> None:
    volume = store.create("ct101", SIZE, "ext4")
    before = volume.path.stat().st_ino
    with pytest.raises(BlockError, match="already"):
        store.create("ct101", SIZE, "ext4")
    assert volume.path.stat().st_ino == before


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "a/b", "A", "-a", ".a", "a\n", "a\0", "ä", "a" * 64])
def test_names_that_are_no_names_are_refused(store: VolumeStore, name: str) -> None:
    for call in (store.open, store.delete, lambda n: store.create(n, SIZE, "ext4")):
        with pytest.raises(BlockError, match="cannot be the name"):
            call(name)


def test_nothing_is_left_of_a_volume_that_cannot_be_made(store: VolumeStore) -> None:
    with pytest.raises(BlockError, match="not one of"):
        store.create("ct101", SIZE, "reiserfs")
    with pytest.raises(BlockError, match="making xfs"):
        store.create("ct101", MIB, "xfs")
    assert list(store.folder.iterdir()) == []


def test_what_an_interruption_left_is_swept(store: VolumeStore) -> None:
    store.create("ct101", SIZE, "ext4")
    left = store.folder / f"ct102{SUFFIX}{UNFINISHED}"
    left.write_bytes(bytes(MIB))
    device = loop.attach(left)
    at = store.folder / f"{left.name}{MOUNT}"
    at.mkdir()
    store.sweep()
    assert store.names() == ["ct101"]
    assert [path.name for path in store.folder.iterdir()] == [f"ct101{SUFFIX}"]
    assert not (Path("/sys/block") / device.path.name / "loop").exists()


def test_an_interrupted_growth_is_swept(store: VolumeStore) -> None:
    left = store.folder / f"ct102{SUFFIX}{UNFINISHED}"
    store.create("ct101", SIZE, "xfs").path.rename(left)
    at = store.folder / f"{left.name}{MOUNT}"
    at.mkdir()
    Volume(left, "xfs").mount(at)
    store.sweep()
    assert list(store.folder.iterdir()) == []
    assert not os.path.ismount(at)


def test_a_pool_is_made_adopted_and_closed(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root")
    image = tmp_path / pool.FILE
    # Where the folder itself can clone, there would be no pool.
    with image.open("xb") as file:
        os.truncate(file.fileno(), 512 * MIB)
    filesystem.make(image, "xfs")
    try:
        folder = pool.ensure(tmp_path, 512 * MIB)
        assert os.path.ismount(folder) and reflink.supported(folder)
        (folder / "kept").write_text("text")
        assert pool.ensure(tmp_path, 512 * MIB) == folder
        assert len(loop.find(image)) == 1
        filesystem.unmount(folder)
        assert pool.ensure(tmp_path, 512 * MIB) == folder
        assert len(loop.find(image)) == 1
        pool.close(tmp_path)
        assert not os.path.ismount(folder) and loop.find(image) == []
        pool.close(tmp_path)
        assert (pool.ensure(tmp_path, 512 * MIB) / "kept").read_text() == "text"
    finally:
        pool.close(tmp_path)


def test_a_pool_that_is_too_small_is_refused(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root")
    kernel.mount("none", tmp_path, "tmpfs")  # which cannot clone
    try:
        with pytest.raises(BlockError, match="too small"):
            pool.ensure(tmp_path, MIB)
        assert not (tmp_path / pool.FILE).exists()
    finally:
        kernel.umount(tmp_path)


def test_what_a_crash_left_attached_is_released_and_what_is_mounted_is_not(store: VolumeStore, mounts: Mounts) -> None:
    mounted = mounts(store.create("used", SIZE, "ext4"), "at")
    left = loop.attach(store.create("left", SIZE, "ext4").path)
    assert mounted.device.is_mounted() and not left.is_mounted()
    assert store.release() == ["left"]
    assert not Path(f"/sys/block/loop{left.number}/loop").exists()
    assert os.path.ismount(mounted.at)
    assert store.release() == []


def test_one_that_cannot_be_released_keeps_no_other_from_it(
    store: VolumeStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "RELEASE_TIMEOUT_S", 0.2)
    left = [loop.attach(store.create(name, SIZE, "ext4").path) for name in ("one", "two", "three")]
    user = os.open(left[1].path, os.O_RDONLY)
    try:
        with pytest.raises(BlockError, match="still in use"):
            store.release()
        assert [bool(loop.find(store.open(name).path)) for name in ("one", "two", "three")] == [False, True, False]
    finally:
        os.close(user)


def test_a_volume_that_is_mounted_in_another_namespace_is_not_let_go(
    store: VolumeStore, mounts: Mounts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "RELEASE_TIMEOUT_S", 0.2)
    mounted = mounts(store.create("ct101", SIZE, "ext4"), "at")
    entered = subprocess.Popen(
        ["unshare", "--mount", "--propagation", "private", "sh", "-c", "echo entered; exec sleep 60"],
        stdout=subprocess.PIPE,
    )
    with entered:
        try:
            assert entered.stdout is not None and entered.stdout.readline() == b"entered\n"
            with pytest.raises(BlockError, match="still in use"):
                mounted.unmount()
            assert not os.path.ismount(mounted.at)
            for _ in range(2):
                with pytest.raises(BlockError, match=f"still mounted, by {mounted.device.path}"):
                    store.let_go("ct101")
        finally:
            entered.kill()
    deadline = time.monotonic() + 10
    while loop.find(store.open("ct101").path):
        assert time.monotonic() < deadline, "it is still attached"
        time.sleep(0.01)
    store.let_go("ct101")
    loop.attach(store.open("ct101").path)
    store.let_go("ct101")
    assert loop.find(store.open("ct101").path) == []
    store.let_go("nothing")


def test_looking_for_a_device_wakes_nobody(store: VolumeStore, mounts: Mounts) -> None:
    """udev looks into a device, and keeps it in use meanwhile, when somebody closes it who could have written to it."""
    mounted = mounts(store.create("ct101", SIZE, "ext4"), "at")
    libc = ctypes.CDLL(None, use_errno=True)
    watch = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        assert libc.inotify_add_watch(watch, os.fsencode(mounted.device.path), IN_CLOSE_WRITE) > 0
        assert store.find_mounted("ct101", mounted.at) == mounted
        assert store.release() == []
        mounted.device.refresh_size()
        with pytest.raises(BlockingIOError):
            os.read(watch, 4096)
    finally:
        os.close(watch)


@pytest.mark.parametrize("kind", ["ext4", "xfs"])
def test_a_file_system_that_has_shut_down_is_found_and_unmounted(store: VolumeStore, mounts: Mounts, kind: str) -> None:
    """As after an I/O error of the disk. An XFS does not let anybody open or stat its root then."""
    mounted = mounts(store.create("ct101", SIZE, kind), "at")
    (mounted.at / "file").write_text("text")
    filesystem.sync(mounted.at)
    shut_down(mounted.at)
    assert filesystem.is_mounted(mounted.at)
    assert store.find_mounted("ct101", mounted.at) == mounted
    mounted.unmount()
    assert not filesystem.is_mounted(mounted.at)
    assert loop.find(store.open("ct101").path) == []
    again = mounts(store.open("ct101", kind), "at")
    assert (again.at / "file").read_text() == "text"
