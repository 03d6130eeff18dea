"""Files inside a container's root file system, which belongs to the container and may hold any symbolic link.

Paths are resolved by openat2 with RESOLVE_IN_ROOT (Linux 5.6): no link leads out of the root.
"""

import ctypes
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from migrator.errors import InvalidArgument

_OPENAT2 = 437  # the same number on every architecture
_RESOLVE_NO_MAGICLINKS = 0x02
_RESOLVE_IN_ROOT = 0x10
_FILE_LIMIT_BYTES = 1 << 20

_libc = ctypes.CDLL(None, use_errno=True)


@contextmanager
def opened_in(root: Path, path: str, flags: int = os.O_RDONLY) -> Iterator[int]:
    """Descriptor of `path` with `root` as the root directory. Raises OSError naming both."""
    how = struct.pack("=QQQ", flags | os.O_CLOEXEC, 0, _RESOLVE_IN_ROOT | _RESOLVE_NO_MAGICLINKS)
    top = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        descriptor = _libc.syscall(_OPENAT2, top, os.fsencode(path), how, len(how))
        if descriptor < 0:
            number = ctypes.get_errno()
            raise OSError(number, f"openat2: {os.strerror(number)}", f"{root}:{path}")
    finally:
        os.close(top)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def read_text(root: Path, path: str) -> str:
    """A small text file; empty if it is not there or not a regular file's folder."""
    try:
        with opened_in(root, path, os.O_RDONLY | os.O_NONBLOCK) as descriptor:
            return os.read(descriptor, _FILE_LIMIT_BYTES).decode(errors="replace")
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return ""


def write_text(root: Path, folder: str, name: str, text: str) -> None:
    """Replace `folder/name` by a new regular file (0644); a link of that name is removed, not followed."""
    with opened_in(root, folder, os.O_RDONLY | os.O_DIRECTORY) as parent:
        with suppress(FileNotFoundError):
            os.unlink(name, dir_fd=parent)
        descriptor = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644, dir_fd=parent)
        with os.fdopen(descriptor, "w") as file:
            file.write(text)


def write_identity(root: Path, hostname: str, addresses: list[str], resolver: str) -> None:
    """/etc/hostname, /etc/hosts and /etc/resolv.conf of a new container. Addresses are without prefix length."""
    with opened_in(root, "/", os.O_RDONLY | os.O_DIRECTORY) as top, suppress(FileExistsError):
        os.mkdir("etc", 0o755, dir_fd=top)
    own = addresses or ["127.0.1.1"]
    hosts = ["127.0.0.1\tlocalhost", "::1\tlocalhost ip6-localhost ip6-loopback", *(f"{a}\t{hostname}" for a in own)]
    write_text(root, "/etc", "hostname", f"{hostname}\n")
    write_text(root, "/etc", "hosts", "\n".join(hosts) + "\n")
    write_text(root, "/etc", "resolv.conf", resolver)


@dataclass(frozen=True)
class User:
    """Who a process runs as."""

    uid: int = 0
    gid: int = 0
    groups: tuple[int, ...] = field(default=())
    home: str = "/"


def find_user(root: Path, wanted: str) -> User:
    """`user`, `user:group`, `uid` or `uid:gid` by the container's own /etc/passwd and /etc/group; empty is root."""
    name, _, group = (wanted or "0").partition(":")
    passwd = [line.split(":") for line in read_text(root, "/etc/passwd").splitlines() if line.count(":") >= 6]
    groups = [line.split(":") for line in read_text(root, "/etc/group").splitlines() if line.count(":") >= 3]
    entry = next((e for e in passwd if name in (e[0], e[2])), None)
    if entry is None and not name.isdecimal():
        raise InvalidArgument(f"user {name!r} is not in the container's /etc/passwd: use a name that is, or a number")
    uid, gid, home = (_number(entry[2]), _number(entry[3]), entry[5]) if entry else (_number(name), 0, "/")
    if group:
        listed = next((g for g in groups if group in (g[0], g[2])), None)
        if listed is None and not group.isdecimal():
            raise InvalidArgument(f"group {group!r} is not in the container's /etc/group: use one that is, or a number")
        return User(uid, _number(listed[2] if listed else group), (), home or "/")
    others = {_number(g[2]) for g in groups if entry and entry[0] in g[3].split(",")}
    return User(uid, gid, tuple(sorted(others - {gid})), home or "/")


def _number(text: str) -> int:
    if not text.isdecimal() or int(text) > 0xFFFFFFFE:
        raise InvalidArgument(f"{text!r} is not a user or group number")
    return int(text)
