"""What is in a container's /dev/shm, packed and unpacked on real tmpfs."""

import json
import os
import socket
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from agent import shm_folder
from agent.shm_folder import DATA, INDEX
from migrator.errors import ExecutionError, PeerError

pytestmark = [pytest.mark.root, pytest.mark.skipif(os.geteuid() != 0, reason="needs root")]

SPARSE_BYTES = 1 << 36


@pytest.fixture
def at(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts by name."""
    made = []

    def mount(name: str) -> Path:
        made.append(tmp_path / name)
        shm_folder.mount(made[-1])
        return made[-1]

    yield mount
    for folder in made:
        shm_folder.unmount(folder)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    return folder


def seen(folder: Path) -> dict[str, tuple[Any, ...]]:
    found = {}
    for path in (folder, *folder.rglob("*")):
        status = path.lstat()
        what: object = None
        if stat.S_ISREG(status.st_mode):
            with path.open("rb") as file:
                what = (status.st_size, status.st_blocks, status.st_nlink, file.read(1 << 20))
        elif stat.S_ISLNK(status.st_mode):
            what = path.readlink()
        owner = (status.st_uid, status.st_gid)
        found[str(path.relative_to(folder))] = (status.st_mode, *owner, status.st_mtime_ns, what)
    return found


def test_everything_is_there_again(at: Callable[[str], Path], images: Path) -> None:
    here, there = at("here"), at("there")
    (here / "empty").touch()
    (here / "text").write_bytes(b"content")
    os.link(here / "text", here / "zz-linked")
    os.mkfifo(here / "pipe", 0o620)
    (here / "folder").mkdir(0o2770)
    (here / "folder" / "own").write_bytes(os.urandom(10_000))
    os.chown(here / "folder" / "own", 999, 998)
    (here / "folder" / "own").chmod(0o4711)
    (here / "dangling").symlink_to("/nowhere/at all")
    (here / os.fsdecode(b"not \xff utf-8")).touch()
    with (here / "sparse").open("wb") as sparse:
        sparse.truncate(SPARSE_BYTES)
        for offset in (4096, SPARSE_BYTES - 8192):
            sparse.seek(offset)
            sparse.write(b"x" * 4096)
    os.utime(here / "folder", ns=(1, 1_234_567_890))
    here.chmod(0o1733)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(here / "socket"))
        shm_folder.pack(here, images)
    (here / "socket").unlink()
    shm_folder.unpack(images, there)
    before, after = seen(here), seen(there)
    before["."] = (*before["."][:3], after["."][3], None)  # its time changed with the socket
    assert after == before


def test_an_empty_one(at: Callable[[str], Path], images: Path) -> None:
    here, there = at("here"), at("there")
    shm_folder.pack(here, images)
    shm_folder.unpack(images, there)
    assert seen(there) == seen(here)
    assert stat.S_IMODE(there.stat().st_mode) == 0o1777


@pytest.mark.parametrize("kind", ["pipe", "link", "device"])
def test_nothing_else_is_read_in_the_place_of_a_file(
    at: Callable[[str], Path], images: Path, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A container that runs exchanges a file for something else, just before it is opened."""
    here = at("here")
    (tmp_path / "secret").write_bytes(b"the host's own")
    (here / "file").write_bytes(b"the container's")
    opened = os.open

    def exchange(path: str, flags: int, *arguments: int, dir_fd: int | None = None) -> int:
        if path == "file":
            (here / "file").unlink()
            match kind:
                case "pipe":
                    os.mkfifo(here / "file")
                case "link":
                    (here / "file").symlink_to(tmp_path / "secret")
                case "device":
                    os.mknod(here / "file", stat.S_IFBLK | 0o600, os.makedev(7, 0))
        return opened(path, flags, *arguments, dir_fd=dir_fd)

    monkeypatch.setattr(os, "open", exchange)
    with pytest.raises((OSError, ExecutionError)):
        shm_folder.pack(here, images)
    assert b"host" not in (images / DATA).read_bytes()


def test_mounting_again_empties_it(at: Callable[[str], Path]) -> None:
    (at("here") / "left").touch()
    here = at("here")
    assert list(here.iterdir()) == []
    shm_folder.unmount(here)
    assert not os.path.ismount(here)
    shm_folder.unmount(here)


ROOT = {"name": ".", "mode": 0o41777, "owner": [0, 0], "mtime_ns": 1}


@pytest.mark.parametrize(
    "entry",
    [
        {"name": "../out", "mode": 0o100600, "size": 1, "runs": []},
        {"name": "/tmp/out", "mode": 0o100600, "size": 1, "runs": []},
        {"name": "link/out", "mode": 0o100600, "size": 1, "runs": []},
        {"name": "none/out", "mode": 0o100600, "size": 1, "runs": []},
        {"name": "device", "mode": 0o020600},
        {"name": "link", "mode": 0o100600, "size": 1, "runs": []},
        {"name": "long", "mode": 0o100600, "size": 10, "runs": [[0, 20]]},
        {"name": "back", "mode": 0o100600, "size": 10, "runs": [[5, 5]]},
        {"name": "short", "mode": 0o100600, "size": 10, "runs": [[0, 10]]},
        {"name": "hard", "mode": 0o100600, "same_as": "link"},
        {"name": "hard", "mode": 0o100600, "same_as": "../../etc/passwd"},
        {"name": "nothing", "mode": 0o100600},
        {"mode": 0o100600},
    ],
)  # fmt: skip
def test_what_no_peer_may_send(
    at: Callable[[str], Path], images: Path, tmp_path: Path, entry: dict[str, object]
) -> None:
    there = at("there")
    link = {"name": "link", "mode": 0o120777, "owner": [0, 0], "mtime_ns": 1, "target": str(tmp_path)}
    (images / INDEX).write_text(json.dumps([ROOT, link, {"owner": [0, 0], "mtime_ns": 1} | entry]))
    (images / DATA).write_bytes(b"")
    before = set(tmp_path.rglob("*"))
    with pytest.raises(PeerError):
        shm_folder.unpack(images, there)
    assert {path for path in set(tmp_path.rglob("*")) - before if there not in path.parents} == set()


@pytest.mark.parametrize("index", ["", "{}", "[1]", "nonsense"])
def test_no_index(at: Callable[[str], Path], images: Path, index: str) -> None:
    (images / INDEX).write_text(index)
    (images / DATA).write_bytes(b"")
    if index == "{}":
        shm_folder.unpack(images, at("there"))
        return
    with pytest.raises(PeerError):
        shm_folder.unpack(images, at("there"))
