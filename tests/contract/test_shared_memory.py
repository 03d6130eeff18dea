"""Shared memory of a real process tree, carried from a tracker to a restore by the CRIU of this machine."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest
from pycriu import rpc_pb2 as rpc

from agent.runtime import PRIVATE_PROGRAMS, SYSTEM_PATH, find_program
from blockdev import fiemap
from blockdev.blocks import Piece
from blockdev.extents import Range
from migrator import memory
from migrator.errors import PeerError
from migrator.images import entries, last_errors
from migrator.memory import Moment
from migrator.shm import images as shared_images
from migrator.shm import left_out, targets
from migrator.shm.copy import SharedCopy
from migrator.shm.store import SharedStore
from migrator.stream import Digests, Meter, Receiver, Sender
from tests.contract.memory_kit import eventually, tree

pytestmark = pytest.mark.root

PROGRAMS = Path(__file__).parents[1] / "lab/programs"
# Answers into a file when there is a question: it must have no pipe to a process that is not dumped.
DRIVER = """
import json, os, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import workload
folder, facts = Path(sys.argv[2]), workload.pool(12)
if sys.argv[3:] and os.fork() == 0:
    time.sleep(1000)
while True:
    if (folder / "ask").exists():
        (folder / "ask").unlink()
        (folder / "new").write_text(json.dumps(facts()))
        (folder / "new").rename(folder / "answer")
    time.sleep(0.005)
"""


class Pool:
    """The workload `pool`, in a namespace of its own for System V memory; a child that stays has all of it, too."""

    def __init__(self, folder: Path, *, has_child: bool) -> None:
        self.folder = folder
        command = ["unshare", "--ipc", "setsid", sys.executable, "-c", DRIVER, str(PROGRAMS), str(folder)]
        command += ["child"] * has_child
        nothing = subprocess.DEVNULL
        self.running = subprocess.Popen(command, stdin=nothing, stdout=nothing, stderr=nothing, cwd="/")
        self.pid = self.running.pid

    def ask(self) -> dict[str, Any]:
        (self.folder / "ask").touch()
        answer = self.folder / "answer"
        eventually("it answers", answer.exists, 20)
        try:
            return dict(json.loads(answer.read_text()))
        finally:
            answer.unlink()

    def pids(self) -> list[int]:
        return tree(self.pid)

    def freeze(self) -> None:
        os.killpg(self.pid, signal.SIGSTOP)
        eventually("it stops", lambda: all(_state(pid) in "TZ" for pid in self.pids()))

    def close(self) -> None:
        left = self.pids()
        os.killpg(self.pid, signal.SIGKILL)
        self.running.wait()
        # Others are reaped by whoever takes orphans, as the restored one is.
        eventually("it is gone", lambda: not any(Path(f"/proc/{pid}").exists() for pid in left))


def _state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0]


@pytest.fixture(params=[False, True], ids=["alone", "child"])
def pool(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Pool]:
    with ExitStack() as stack:
        folder = tmp_path / "pool"
        folder.mkdir()
        made = stack.enter_context(closing(Pool(folder, has_child=request.param)))
        made.ask()
        yield made


def _restore(images: Path, folder: Path, amended: shared_images.Amended) -> rpc.criu_resp:
    """By an RPC, as runc has it done: what it inherits it gets by scripts/criu-shim.c, with the request."""
    (folder / "restore.conf").write_text(amended.options())
    (folder / "inherit").write_text(amended.listed())
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        criu = subprocess.Popen(
            [find_program("criu"), "swrk", str(theirs.fileno())],
            env={"PATH": f"{PRIVATE_PROGRAMS}:{SYSTEM_PATH}", "MIGRATOR_RESTORE": str(folder)},
            pass_fds=[theirs.fileno()],
        )
        theirs.close()
        descriptor = os.open(images, os.O_RDONLY | os.O_DIRECTORY)
        options = rpc.criu_opts(
            images_dir_fd=descriptor, log_file="restore.log", shell_job=True, config_file=str(folder / "restore.conf")
        )
        ours.send(rpc.criu_req(type=rpc.RESTORE, opts=options).SerializeToString())
        answer = rpc.criu_resp.FromString(ours.recv(1 << 16))
        os.close(descriptor)
        ours.close()
        criu.wait(20)
    return answer


def test_it_is_restored_from_what_was_sent(pool: Pool, tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    before = pool.ask()
    assert before["wrong"] == []
    store = SharedStore()
    with closing(store), closing(memory.make(pool.pids, memory.choose()[0])) as tracker:
        copy = SharedCopy(tracker)
        for _ in range(3):
            copy.add(tracker.collect(), Moment.RUNNING)
            transfer(copy, store)
        pool.freeze()
        left_out.write(tmp_path / "left-out", copy.left_out())
        dump = [find_program("criu"), "dump", "-t", str(pool.pid), "-D", str(images), "-o", "dump.log"]
        dumped = subprocess.run(
            [*dump, "--leave-stopped", "--shell-job"],
            env={"PATH": f"{PRIVATE_PROGRAMS}:{SYSTEM_PATH}", left_out.FILE: str(tmp_path / "left-out")},
            check=False,
        )
        assert dumped.returncode == 0, last_errors(images / "dump.log")
        for image in images.glob("pagemap-shmem-*.img"):
            assert len(list(entries(image.read_bytes()))) == 1, f"{image.name} has pages"
        copy.add(tracker.collect(Moment.LAST), Moment.LAST)
        transfer(copy, store)
        amended = shared_images.amend(images, store)
        pool.close()
        assert _restore(images, tmp_path, amended).success, last_errors(images / "restore.log")
        amended.seal()
    os.killpg(pool.pid, signal.SIGCONT)
    after = pool.ask()
    assert after["wrong"] == []
    assert after["same"] == before["same"]


def transfer(copy: SharedCopy, store: SharedStore) -> None:
    """As source and destination do it."""
    sender, receiver = Sender("m", 1, Digests(), Meter()), Receiver(Digests())
    for request in copy.requests(sender):
        for piece in receiver.pieces(request):
            store.write(request.target.removeprefix("shared/"), piece)


@pytest.mark.parametrize("name", [b"", b"a b/\xff%2F", b"/dev/zero", b"x" * 249])
def test_names_survive_the_wire(name: bytes) -> None:
    for target in (targets.Target(7, is_system_v=False, name=name), targets.Target(0, is_system_v=True)):
        assert targets.parse(str(target).removeprefix("shared/")) == target


@pytest.mark.parametrize(
    "rest", ["", "memfd", "memfd/", "memfd/x/a", "sysv/1/a", "sysv/-1", "memfd/4294967296/a", "memfd/1/%00", "file/1/a"]
)
def test_nothing_else_is_taken(rest: str) -> None:
    with closing(SharedStore()) as store, pytest.raises(PeerError):
        store.write(rest, Piece(0, 4096, bytes(4096)))


def test_holes_stay_holes_and_numbers_are_used_again() -> None:
    with closing(SharedStore()) as store:
        store.write("memfd/5/one", Piece(1 << 30, 4096, b"x" * 4096))
        store.write("memfd/5/one", Piece(1 << 20, 4096, b"x" * 4096))
        store.write("memfd/5/one", Piece(0, 1 << 29, None))
        descriptor = store.memfd(5)
        assert descriptor is not None
        assert list(fiemap.allocated(descriptor, 1 << 31)) == [Range(1 << 30, (1 << 30) + 4096)]
        store.write("memfd/5/another", Piece(0, 4096, b"y" * 4096))
        descriptor = store.memfd(5)
        assert descriptor is not None
        assert os.fstat(descriptor).st_size == 4096
        assert store.system_v(5) is None


def test_crius_question_is_answered(tmp_path: Path, shim: Path) -> None:
    """Only of those that are in the table, as they are in it, and from then on."""
    descriptors = [os.memfd_create(name) for name in ("left out", "not", "changed since")]
    for descriptor in descriptors:
        os.pwrite(descriptor, b"x", 8192)
    ask = (
        "import os, sys\n"
        "def seek(n):\n"
        "    try: return os.lseek(n, 0, os.SEEK_DATA)\n"
        "    except OSError as error: return -error.errno\n"
        "for line in sys.stdin:\n"
        "    print(*map(seek, map(int, sys.argv[1:])), *(os.lseek(int(n), 5, 0) for n in sys.argv[1:]), flush=True)\n"
    )
    table = tmp_path / "left-out"
    with subprocess.Popen(
        [sys.executable, "-c", ask, *map(str, descriptors)],
        env={**os.environ, "LD_PRELOAD": str(shim), left_out.FILE: str(table)},
        pass_fds=descriptors,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as asking:
        assert asking.stdin is not None and asking.stdout is not None
        print("", file=asking.stdin, flush=True)
        assert asking.stdout.readline().split() == ["8192", "8192", "8192", "5", "5", "5"]
        stats = [os.fstat(descriptor) for descriptor in descriptors]
        eventually("time goes on", lambda: time.time_ns() - stats[2].st_ctime_ns > 10**8)
        os.pwrite(descriptors[2], b"x", 8192)
        left_out.write(table, [stats[0], stats[2]])
        print("", file=asking.stdin, flush=True)
        assert asking.stdout.readline().split() == ["-6", "8192", "8192", "5", "5", "5"]
    for descriptor in descriptors:
        os.close(descriptor)
