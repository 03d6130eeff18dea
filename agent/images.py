"""Images: read-only volumes that containers are cloned from, made of root file system tarballs or of disk images.

An image is unpacked under a name of its own in a folder of unfinished ones and gets its own name when it is complete;
what a crash leaves there is removed at the next start.
"""

import os
import re
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import structlog

from agent import disk_images, tarball
from agent.database import Database
from agent.disk_images import DiskSource
from agent.image_sizes import SLACK_BYTES, SMALLEST_BYTES, size_for
from agent.rootfs import opened_in
from agent.salvage import tried
from agent.tarball import Cancel, Tarball
from blockdev import durable, filesystem, loop, pool
from blockdev.volume import SUFFIX, Volume, VolumeStore
from migrator.errors import AlreadyExists, Busy, InvalidArgument, NotFound, Precondition
from migrator.units import format_size

SCHEMA = """
CREATE TABLE IF NOT EXISTS images (
    name TEXT PRIMARY KEY,
    filesystem TEXT NOT NULL,
    create_time_ms INTEGER NOT NULL,
    origin TEXT NOT NULL
) STRICT
"""
NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,39}")
# What must not be the same in all containers of an image, or is made anew for each.
EMPTIED = ("/etc", "machine-id")
REMOVED = (
    ("/etc", r"hostname|resolv\.conf|ssh/"),
    ("/etc/ssh", r"ssh_host_.*_key(\.pub)?"),
    ("/var/lib/dbus", r"machine-id"),
    ("/var/lib/systemd", r"random-seed|credential\.secret"),
)

# How long a start of the agent waits for somebody who is still in what is to be cleared away.
UNMOUNT_TIMEOUT_S = 5.0

log = structlog.get_logger()
Report = Callable[[str], None]


@dataclass(frozen=True)
class Image:
    """One image. `origin` is for people."""

    name: str
    path: Path
    filesystem: str
    create_time_ms: int
    origin: str

    @property
    def size_bytes(self) -> int:
        """The smallest disk that a container of it can have."""
        return self.path.stat().st_size

    @property
    def allocated_bytes(self) -> int:
        """What it takes on the host."""
        return self.path.stat().st_blocks * 512


class Images:
    """The images of one host; thread-safe. Call `sweep` once before use."""

    def __init__(self, database: Database, folder: Path, mount_folder: Path) -> None:
        self._database = database
        self._folder = folder
        self._mounts = mount_folder
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        mount_folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        mount_folder.chmod(0o700)  # what is unpacked below may be setuid
        self._unfinished = VolumeStore(folder / "unfinished")
        self._staging = folder / "staging"
        self._staging.mkdir(exist_ok=True, mode=0o700)
        self._making: set[str] = set()
        self._lock = threading.Lock()

    def get(self, name: str) -> Image:
        """Raises NotFound."""
        for image in self.all():
            if image.name == name:
                return image
        raise NotFound(f"there is no image {name} on this host: see `migrator image ls`", reason="IMAGE_NOT_FOUND")

    def all(self) -> list[Image]:
        """By name."""
        rows = self._database.rows("SELECT * FROM images ORDER BY name")
        return [
            Image(r["name"], self._path(r["name"]), r["filesystem"], r["create_time_ms"], r["origin"]) for r in rows
        ]

    def delete(self, name: str) -> None:
        """Raises NotFound. Containers cloned from it keep what they share with it."""
        image = self.get(name)
        with self._database.transaction() as cursor:
            cursor.execute("DELETE FROM images WHERE name = ?", (name,))
        image.path.unlink(missing_ok=True)

    def check_new(self, name: str, kind: str) -> None:
        """Raises InvalidArgument, AlreadyExists."""
        if not NAME.fullmatch(name):
            raise InvalidArgument(
                f"{name!r} cannot be an image's name: 1 to 40 lower case letters, digits, dots, dashes and underscores"
            )
        if kind not in SMALLEST_BYTES:
            raise InvalidArgument(f"file system {kind!r} is not one of {', '.join(SMALLEST_BYTES)}")
        if any(image.name == name for image in self.all()):
            raise AlreadyExists(f"there is an image {name} already: remove it first", reason="IMAGE_EXISTS")

    @contextmanager
    def reserved(self, name: str, kind: str) -> Iterator[None]:
        """Nobody else makes an image of this name meanwhile. Raises as `check_new`, and Busy."""
        with self._lock:
            self.check_new(name, kind)
            if name in self._making:
                raise Busy(f"image {name} is being made by another call")
            self._making.add(name)
        try:
            yield
        finally:
            with self._lock:
                self._making.discard(name)

    def add(self, name: str, kind: str, origin: str, source: Tarball, *, report: Report, cancel: Cancel) -> Image:
        """Unpack a tarball into a new image; the name is `reserved`. Nothing is left if it fails.

        Raises InvalidArgument, Precondition (NO_SPACE), Cancelled.
        """
        report(f"measuring {source.path.name}")
        content_bytes = tarball.measure(source, cancel, limit_bytes=self._free_bytes())
        size_bytes = size_for(content_bytes, kind)
        while True:
            self.check_room(max(content_bytes, size_bytes - SLACK_BYTES))
            report(f"unpacking {format_size(content_bytes)} into {kind} of {format_size(size_bytes)}")
            try:
                return self._make(name, kind, origin, source, size_bytes=size_bytes, cancel=cancel)
            except tarball.Full:
                # Many small files take more than they hold.
                size_bytes *= 2

    def add_disk(
        self,
        name: str,
        kind: str,
        origin: str,
        source: DiskSource,
        *,
        keep_identity: bool,
        report: Report,
        cancel: Cancel,
    ) -> Image:
        """Make an image of a disk's root file system; of this kind, or of the kind that it is if that is empty.

        As `add`; also InvalidArgument (BAD_IMAGE).
        """
        token = f"{name}.{secrets.token_hex(4)}"
        names = (token, f"{token}.new")
        with self.staging() as scratch, self.mount_point(token) as at, ExitStack() as undo:
            for unfinished in names:
                undo.callback(self._unfinished.delete, unfinished)
            volume = disk_images.make_volume(
                source, self._unfinished, names, (at, scratch), kind, self.check_room, report, cancel
            )
            if not keep_identity:
                mounted = volume.mount(at)
                try:
                    normalise(at)
                    filesystem.sync(at)
                finally:
                    mounted.unmount()
            return self._finish(name, origin, volume)

    @contextmanager
    def staging(self) -> Iterator[Path]:
        """An empty folder in the pool for files that are on their way, removed with all that is in it."""
        folder = self._staging / secrets.token_hex(8)
        folder.mkdir(mode=0o700)
        try:
            yield folder
        finally:
            shutil.rmtree(folder)

    @contextmanager
    def mount_point(self, token: str) -> Iterator[Path]:
        """An empty folder to mount something at; a crash leaves neither the folder nor what is mounted there."""
        at = self._mounts / token
        at.mkdir(mode=0o700)
        try:
            yield at
        finally:
            at.rmdir()

    def check_room(self, needed_bytes: int) -> None:
        """Raises Precondition (NO_SPACE) if the pool has not so much room."""
        free = self._free_bytes()
        if needed_bytes > free:
            raise Precondition(
                f"no room for the image: it takes up to {format_size(needed_bytes)}, {format_size(free)} are free in "
                f"{self._folder}; remove images or containers, or make the pool larger",
                reason="NO_SPACE",
            )

    def sweep(self) -> None:
        """Remove what an interrupted life of the agent has left, or as much of it as can be."""
        for at in self._mounts.iterdir():
            with tried(f"mount point {at}"):
                for mounted in (at / "old", at / "new", at):
                    if filesystem.is_mounted(mounted):
                        filesystem.unmount(mounted, UNMOUNT_TIMEOUT_S)
                shutil.rmtree(at)
        for path, device in loop.find_all(path for path in self._staging.rglob("*") if path.is_file()):
            with tried(f"{device.path} of {path}"):
                device.detach()
        shutil.rmtree(self._staging)
        self._staging.mkdir(mode=0o700)
        with tried(f"unfinished images in {self._unfinished.folder}"):
            self._unfinished.sweep()
        for name in self._unfinished.names():
            log.warning("remove unfinished image", file=name)
            with tried(f"unfinished image {name}"):
                self._unfinished.delete(name)
        known = {image.name for image in self.all()}
        for path in self._folder.glob(f"*{SUFFIX}"):
            if path.name.removesuffix(SUFFIX) not in known:
                log.warning("remove image without a record", path=str(path))
                path.unlink()

    # Inside

    def _make(self, name: str, kind: str, origin: str, source: Tarball, *, size_bytes: int, cancel: Cancel) -> Image:
        token = f"{name}.{secrets.token_hex(4)}"
        with ExitStack() as undo:
            undo.callback(self._unfinished.delete, token)
            volume = self._unfinished.create(token, size_bytes, kind)
            with self.mount_point(token) as at:
                mounted = volume.mount(at)
                try:
                    tarball.unpack(source, at, cancel)
                    normalise(at)
                    filesystem.sync(at)
                finally:
                    mounted.unmount()
            return self._finish(name, origin, volume)

    def _finish(self, name: str, origin: str, volume: Volume) -> Image:
        """Give a complete volume its place and its record."""
        image = Image(name, self._path(name), volume.kind, time.time_ns() // 1_000_000, origin)
        volume.path.chmod(0o400)
        # A record without an image would be worse than an image without a record, which `sweep` removes.
        durable.sync(volume.path)
        volume.path.rename(image.path)
        durable.sync(self._folder)
        try:
            with self._database.transaction() as cursor:
                cursor.execute(
                    "INSERT INTO images VALUES (?, ?, ?, ?)", (name, image.filesystem, image.create_time_ms, origin)
                )
        except BaseException:
            image.path.unlink()
            raise
        return image

    def _free_bytes(self) -> int:
        return pool.room(self._folder).available_bytes

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}{SUFFIX}"


def normalise(root: Path) -> None:
    """Make an unpacked root file system one that any number of containers can start from."""
    folder, name = EMPTIED
    with _folder_in(root, folder) as parent:
        if name in _names(parent):
            os.unlink(name, dir_fd=parent)
            os.close(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o444, dir_fd=parent))
    for folder, pattern in REMOVED:
        with _folder_in(root, folder) as parent:
            for entry in _names(parent):
                if re.fullmatch(pattern, entry):
                    os.unlink(entry, dir_fd=parent)


def _names(folder: int | None) -> list[str]:
    if folder is None:
        return []
    with os.scandir(folder) as entries:
        return [entry.name for entry in entries]


@contextmanager
def _folder_in(root: Path, folder: str) -> Iterator[int | None]:
    try:
        opened = opened_in(root, folder, os.O_RDONLY | os.O_DIRECTORY)
        with opened as descriptor:
            yield descriptor
    except (FileNotFoundError, NotADirectoryError):
        yield None
