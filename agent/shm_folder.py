"""A container's /dev/shm: a tmpfs of the host's that is bound into it, and what is in there, on its way.

CRIU would carry a tmpfs of the container's own, and starts tar and gzip for it inside the freeze, empty or not.
"""

import json
import os
import stat
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn

from blockdev import extents, filesystem, kernel
from migrator.errors import ExecutionError, PeerError
from migrator.images import read

SIZE_BYTES = 64 << 20
INDEX, DATA = "shm.json", "shm.img"

_MOUNT_FLAGS = 2 | 4 | 8  # MS_NOSUID, MS_NODEV, MS_NOEXEC of mount(2)


def mount(at: Path, size_bytes: int = 0) -> None:
    """An empty one, whatever was there."""
    unmount(at)
    at.mkdir(mode=0o700, exist_ok=True)
    kernel.mount("shm", at, "tmpfs", _MOUNT_FLAGS, f"size={size_bytes or SIZE_BYTES},mode=1777")


def unmount(at: Path) -> None:
    """Repeatable."""
    while os.path.ismount(at):
        filesystem.unmount(at)


def pack(at: Path, images: Path) -> None:
    """Write what is in there beside CRIU's images. Sockets are CRIU's.

    Of a container that runs meanwhile it may be of different moments. Nothing outside is read, whatever the container
    does. Raises OSError and ExecutionError for what is not there any more.
    """
    entries = [{"name": "."} | _described(at.lstat())]
    inodes: dict[int, str] = {}
    with (images / DATA).open("wb", buffering=0) as data:
        for root, folders, files, descriptor in os.fwalk(at, onerror=_fail):
            folders.sort()
            for own in sorted([*folders, *files]):
                entry = _entry(descriptor, own, data.fileno(), inodes, str((Path(root) / own).relative_to(at)))
                if entry is not None:
                    entries.append(entry)
    (images / INDEX).write_text(json.dumps(entries))


def _entry(folder: int, own: str, data: int, inodes: dict[int, str], name: str) -> dict[str, Any] | None:
    """`own` is its name in the folder, and `inodes` the first names of the files so far. None for a socket."""
    status = os.stat(own, dir_fd=folder, follow_symlinks=False)
    entry = {"name": name} | _described(status)
    if stat.S_ISSOCK(status.st_mode):
        return None
    if stat.S_ISLNK(status.st_mode):
        return entry | {"target": os.readlink(own, dir_fd=folder)}
    if not stat.S_ISREG(status.st_mode):
        return entry
    if (first := inodes.setdefault(status.st_ino, name)) != name:
        return entry | {"same_as": first}
    # By now it may be a link, or a pipe without a writer.
    file = os.open(own, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
    try:
        opened = os.fstat(file)
        if (opened.st_dev, opened.st_ino) != (status.st_dev, status.st_ino):
            raise ExecutionError(f"{name!r} in /dev/shm is another file now")
        return entry | {"size": opened.st_size, "runs": _copy_out(file, opened.st_size, data)}
    finally:
        os.close(file)


def _fail(error: OSError) -> NoReturn:
    raise error


def _described(status: os.stat_result) -> dict[str, Any]:
    return {"mode": status.st_mode, "owner": [status.st_uid, status.st_gid], "mtime_ns": status.st_mtime_ns}


def unpack(images: Path, at: Path) -> None:
    """Make all of it anew in an empty tmpfs. The images are a peer's: raises PeerError for what `pack` never writes."""
    made: dict[str, str] = {}
    try:
        entries = json.loads(read(images / INDEX))
        with (images / DATA).open("rb", buffering=0) as data:
            for entry in entries:
                _make(at, entry, data.fileno(), made)
        # From the last to the first: what is made in a folder changes its time.
        for entry in reversed(entries):
            os.utime(at / entry["name"], ns=(entry["mtime_ns"], entry["mtime_ns"]), follow_symlinks=False)
    except (KeyError, TypeError, ValueError, OSError, ExecutionError) as error:
        raise PeerError(f"what was in /dev/shm is not understood: {error}") from error


def _copy_out(file: int, size: int, data: int) -> list[list[int]]:
    """Where its data was, start and end."""
    runs = []
    for start, end in extents.sought(file, size):
        _copy(file, start, end - start, data)
        runs.append([start, end])
    return runs


def _make(at: Path, entry: dict[str, Any], data: int, made: dict[str, str]) -> None:
    name, mode = str(entry["name"]), int(entry["mode"])
    kind, path = stat.S_IFMT(mode), at / name
    if name == ".":
        kind = stat.S_IFDIR
    elif ".." in PurePosixPath(name).parts or made.get(str(PurePosixPath(name).parent)) != "folder" or name in made:
        raise PeerError(f"{name!r} cannot be in /dev/shm")
    elif "same_as" in entry:
        if made.get(str(entry["same_as"])) != "file":
            raise PeerError(f"{name!r} is a link to {entry['same_as']!r}, which is no file in /dev/shm")
        os.link(at / str(entry["same_as"]), path)
        made[name] = "file"
        return
    elif kind == stat.S_IFDIR:
        path.mkdir()
    elif kind == stat.S_IFLNK:
        path.symlink_to(str(entry["target"]))
    elif kind == stat.S_IFIFO:
        os.mkfifo(path)
    elif kind == stat.S_IFREG:
        _copy_in(path, entry, data)
    else:
        raise PeerError(f"{name!r} in /dev/shm is no file, folder, link or pipe")
    made[name] = {stat.S_IFDIR: "folder", stat.S_IFREG: "file"}.get(kind, "other")
    uid, gid = entry["owner"]
    os.chown(path, uid, gid, follow_symlinks=False)
    if kind != stat.S_IFLNK:
        path.chmod(stat.S_IMODE(mode))


def _copy_in(path: Path, entry: dict[str, Any], data: int) -> None:
    with path.open("xb", buffering=0) as file:
        os.ftruncate(file.fileno(), entry["size"])
        for start, end in entry["runs"]:
            if not 0 <= start < end <= entry["size"]:
                raise PeerError(f"{path.name}: {start} to {end} is not in a file of {entry['size']} bytes")
            file.seek(start)
            _copy(data, os.lseek(data, 0, os.SEEK_CUR), end - start, file.fileno())
            os.lseek(data, end - start, os.SEEK_CUR)


def _copy(source: int, offset: int, length: int, target: int) -> None:
    """From there to where the target is."""
    while length:
        count = os.sendfile(target, source, offset, length)
        if count == 0:
            raise ExecutionError("what was in /dev/shm ends too early")
        offset += count
        length -= count
