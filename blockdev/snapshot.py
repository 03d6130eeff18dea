"""Snapshots on disk: a folder each, with an image for every volume. A folder has its name only when it is complete.

They are whole files that share their extents with the volumes and with each other: any of them may be deleted.
"""

import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from blockdev import durable, live_clone, reflink
from blockdev.errors import BlockError
from blockdev.live_clone import Source
from blockdev.tracker import WriteTracker
from blockdev.volume import SUFFIX, UNFINISHED, MountedVolume

ID = re.compile(r"[0-9a-f]{16}")
_DELETED = ".old"


class SnapshotStore:
    """The snapshots of one folder, which is in the same file system as the volumes."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.folder = folder

    def take(
        self,
        identifier: str,
        volumes: Sequence[tuple[Path, MountedVolume]],
        track: Callable[[Path], WriteTracker] | None,
        check: Callable[[], None] = lambda: None,
    ) -> float:
        """Snapshot mounted volumes (image and mount) as they are at one moment. Returns the longest freeze in seconds.

        `track` and `check` are for `live_clone.clone`.
        """
        with self.new(identifier) as folder:
            sources = [Source(image, at, self.image_in(folder, index)) for index, (image, at) in enumerate(volumes)]
            return live_clone.clone(sources, track, check)

    def copy(self, identifier: str, images: Sequence[Path]) -> None:
        """Snapshot volumes at rest."""
        with self.new(identifier) as folder:
            for index, image in enumerate(images):
                reflink.clone(image, self.image_in(folder, index))
                durable.sync(self.image_in(folder, index))

    @contextmanager
    def new(self, identifier: str) -> Iterator[Path]:
        """A folder to put durable images into: the snapshot at the end of the block, and gone if that fails."""
        unfinished = self.begin(identifier)
        try:
            yield unfinished
            self.finish(identifier)
        except BaseException:
            self.abandon(identifier)
            raise

    def begin(self, identifier: str) -> Path:
        """A folder to put durable images into, named by `image_in`. `finish` or `abandon` it."""
        unfinished = self._unfinished(identifier)
        unfinished.mkdir(mode=0o700)
        return unfinished

    def finish(self, identifier: str) -> None:
        """It is a snapshot from now on."""
        unfinished = self._unfinished(identifier)
        durable.sync(unfinished)
        unfinished.rename(self._path(identifier))
        durable.sync(self.folder)

    def abandon(self, identifier: str) -> None:
        """Delete what was begun; repeatable."""
        unfinished = self._unfinished(identifier)
        if unfinished.exists():
            shutil.rmtree(unfinished)

    @staticmethod
    def image_in(folder: Path, index: int) -> Path:
        """Where the image of a volume is in a snapshot's folder."""
        return folder / f"{index}{SUFFIX}"

    def images(self, identifier: str) -> list[Path]:
        """In the order of the volumes. Raises BlockError if there is no such snapshot."""
        path = self._path(identifier)
        if not path.is_dir():
            raise BlockError(f"there is no snapshot {identifier} in {self.folder}")
        return [self.image_in(path, index) for index in range(len(list(path.iterdir())))]

    def allocated_bytes(self, identifier: str) -> list[int]:
        """What each image takes on the host, shared or not; empty if there is no such snapshot any more."""
        try:
            return [image.stat().st_blocks * 512 for image in self.images(identifier)]
        except (BlockError, FileNotFoundError):
            return []

    def delete(self, identifier: str) -> None:
        """Repeatable."""
        path = self._path(identifier)
        deleted = path.with_name(path.name + _DELETED)
        if path.exists():
            path.rename(deleted)
        if deleted.exists():
            shutil.rmtree(deleted)

    def identifiers(self) -> list[str]:
        """All that are complete."""
        return sorted(path.name for path in self.folder.iterdir() if ID.fullmatch(path.name))

    def sweep(self) -> None:
        """Delete what an interrupted creation or deletion has left."""
        for suffix in (UNFINISHED, _DELETED):
            for path in self.folder.glob(f"*{suffix}"):
                shutil.rmtree(path)

    def _unfinished(self, identifier: str) -> Path:
        path = self._path(identifier)
        return path.with_name(path.name + UNFINISHED)

    def _path(self, identifier: str) -> Path:
        if not ID.fullmatch(identifier):
            raise BlockError(f"{identifier!r} cannot be a snapshot's identifier")
        return self.folder / identifier
