"""Named network namespaces, as `ip netns` has them: a file in /run/netns that the namespace is mounted on.

Work inside one is done by a thread of its own that enters it and ends: setns(2) with CLONE_NEWNET is per thread, and
forking is not safe in a process with gRPC in it. What such a thread opens (sockets) stays in the namespace.
"""

import ctypes
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from migrator.errors import InvalidArgument

FOLDER = Path("/run/netns")

_CLONE_NEWNET = 0x40000000
_CLONE_NEWNS = 0x00020000
_MS_BIND = 0x1000
_MS_REC = 0x4000
_MS_SLAVE = 1 << 19
_MS_SHARED = 1 << 20
_MNT_DETACH = 2

_libc = ctypes.CDLL(None, use_errno=True)
_T = TypeVar("_T")


def path_of(name: str) -> Path:
    """Where the namespace called `name` is, or would be."""
    if not name or name in (".", "..") or "/" in name or "\0" in name:
        raise InvalidArgument(f"{name!r} cannot be the name of a network namespace")
    return FOLDER / name


def create(name: str) -> Path:
    """Make an empty network namespace. Raises FileExistsError if the name is taken, OSError."""
    path = path_of(name)
    FOLDER.mkdir(parents=True, exist_ok=True)
    if not _is_mount_point(FOLDER):
        _mount(FOLDER, FOLDER, _MS_BIND | _MS_REC)
        _mount(None, FOLDER, _MS_SHARED | _MS_REC)
    path.touch(mode=0o444, exist_ok=False)

    def make() -> None:
        _call(_libc.unshare(_CLONE_NEWNET), f"unshare(CLONE_NEWNET) for {path}")
        _mount(Path(f"/proc/self/task/{threading.get_native_id()}/ns/net"), path, _MS_BIND)

    try:
        _in_thread(make)
    except BaseException:
        path.unlink()
        raise
    return path


def remove(name: str) -> None:
    """Remove the name; the namespace goes with its last process. Repeatable."""
    path = path_of(name)
    if not path.exists():
        return
    if _is_mount_point(path):
        _call(_libc.umount2(os.fsencode(path), _MNT_DETACH), f"umount2({path})")
    path.unlink(missing_ok=True)


def names() -> list[str]:
    """All named network namespaces of this host, whoever made them."""
    return sorted(path.name for path in FOLDER.iterdir()) if FOLDER.is_dir() else []


def inside(name: str, work: Callable[[], _T]) -> _T:
    """Run `work` in the namespace, in a thread that ends with it. Raises OSError, and what `work` raises."""

    def there() -> _T:
        enter(name)
        return work()

    return _in_thread(there)


def enter(name: str) -> None:
    """For this thread, and what it starts. Raises OSError."""
    descriptor = os.open(path_of(name), os.O_RDONLY | os.O_CLOEXEC)
    try:
        _call(_libc.setns(descriptor, _CLONE_NEWNET), f"setns({path_of(name)})")
    finally:
        os.close(descriptor)


def own_mounts() -> None:
    """What this process mounts from now on is seen nowhere else and goes with it. Raises OSError."""
    _call(_libc.unshare(_CLONE_NEWNS), "unshare(CLONE_NEWNS)")
    _mount(None, Path("/"), _MS_SLAVE | _MS_REC)


def _in_thread(work: Callable[[], _T]) -> _T:
    results: list[_T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:  # handed to the caller below
            errors.append(error)

    thread = threading.Thread(target=run, name="network namespace", daemon=True)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]


def _is_mount_point(path: Path) -> bool:
    """Also of a bind mount within one file system, which os.path.ismount does not see."""
    wanted = str(path.resolve())
    with Path("/proc/thread-self/mountinfo").open() as lines:
        return any(line.split()[4] == wanted for line in lines)


def _mount(source: Path | None, target: Path, flags: int) -> None:
    raw = os.fsencode(source) if source else b"none"
    _call(_libc.mount(raw, os.fsencode(target), b"none", ctypes.c_ulong(flags), None), f"mount({source}, {target})")


def _call(result: int, what: str) -> None:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
