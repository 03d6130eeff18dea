"""Files between this machine and an agent, in pieces and without their holes."""

import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

from blockdev import fiemap
from migrator.errors import AlreadyExists, InvalidArgument, PeerError

PIECE_BYTES = 1 << 20
# A block of zeros is left out: what is sent to is empty.
_ZEROS = bytes(PIECE_BYTES)


def pieces(file: int, size_bytes: int) -> Iterator[tuple[int, bytes]]:
    """Offset and bytes of what is no hole and not all zeros."""
    for part in fiemap.allocated(file, size_bytes):
        for at in range(part.start, part.end, PIECE_BYTES):
            wanted = min(PIECE_BYTES, part.end - at)
            data = os.pread(file, wanted, at)
            if len(data) != wanted:
                raise InvalidArgument("the file became shorter while it was read")
            if data != _ZEROS[:wanted]:
                yield at, data


def files_of(path: Path) -> list[Path]:
    """The file, or the regular files of a folder. Raises InvalidArgument."""
    if not path.exists():
        raise InvalidArgument(f"there is no {path} on this machine")
    if path.is_dir():
        found = sorted(entry for entry in path.iterdir() if stat.S_ISREG(entry.lstat().st_mode))
        if not found:
            raise InvalidArgument(f"{path} has no files in it")
        return found
    if not path.is_file():
        raise InvalidArgument(f"{path} is not a file")
    return [path]


class Download:
    """Files that an agent sends, under names that are checked; they appear at `path` when all are complete.

    A `folder` gets them all; otherwise there is one file, and `path` is its name. `discard` removes what there is.
    """

    def __init__(self, path: Path, *, is_folder: bool) -> None:
        if path.exists() or path.is_symlink():
            raise AlreadyExists(f"{path} is there already: choose another name or remove it", reason="FILE_EXISTS")
        if not path.absolute().parent.is_dir():
            raise InvalidArgument(f"there is no folder {path.absolute().parent}")
        self._path = path
        self._is_folder = is_folder
        self._unfinished = path.with_name(f".{path.name}.{os.getpid()}.partial")
        self._file = -1
        self._size_bytes = 0
        self.written_bytes = 0
        if is_folder:
            self._unfinished.mkdir()

    def begin(self, name: str, size_bytes: int) -> None:
        """The next file."""
        self._close()
        if self._is_folder:
            if not name or "/" in name or name in (".", ".."):
                raise PeerError(f"the agent sends a file named {name!r}")
            target = self._unfinished / name
        else:
            target = self._unfinished
        self._file = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        self._size_bytes = size_bytes
        os.truncate(self._file, size_bytes)

    def write(self, offset: int, data: bytes) -> None:
        """Bytes of the file that was begun last."""
        if self._file < 0 or offset < 0 or offset + len(data) > self._size_bytes:
            raise PeerError("the agent sends bytes outside of the file that it announced")
        done = 0
        while done < len(data):
            done += os.pwrite(self._file, data[done:], offset + done)
        self.written_bytes += len(data)

    def finish(self) -> None:
        """All is there: sync it and give it its name."""
        self._close()
        self._unfinished.rename(self._path)

    def discard(self) -> None:
        """Remove what has arrived; nothing to do after `finish`."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
        if self._is_folder:
            shutil.rmtree(self._unfinished, ignore_errors=True)
        else:
            self._unfinished.unlink(missing_ok=True)

    def _close(self) -> None:
        if self._file >= 0:
            os.fsync(self._file)
            os.close(self._file)
            self._file = -1
