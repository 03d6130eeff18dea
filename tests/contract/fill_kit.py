"""A bare process moved by CRIU without pages: what the source of a migration would do, in short, for tests of the
fill.
"""

import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from pycriu import images as criu_images

from migrator import pageless
from migrator.fill.images import prepare
from migrator.fill.keeper import Places
from migrator.fill.launch import launch
from migrator.fill.status import State, Status
from migrator.fill.store import PAGE_BYTES, path_of

CRIU = "/usr/local/lib/migrator/bin/criu"
CGROUPS = Path("/sys/fs/cgroup/unified") if Path("/sys/fs/cgroup/unified").is_dir() else Path("/sys/fs/cgroup")


class Room:
    """A mount namespace in which CRIU believes that it can track memory, and the victim's program."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.pageless = pageless.probe(CRIU, os.environ, folder / "pageless")
        self._holder = subprocess.Popen(self.pageless.command(["sleep", "infinity"]), stdout=subprocess.DEVNULL)
        while Path(f"/proc/{self._holder.pid}/comm").read_text() != "sleep\n":
            time.sleep(0.005)
        source = Path(__file__).with_name("fill_victim.c")
        subprocess.run(["cc", "-O2", "-pthread", "-o", folder / "victim", source], check=True)

    def close(self) -> None:
        self._holder.kill()
        self._holder.wait()

    def start(self, command: Sequence[str], **environment: str) -> subprocess.Popen[bytes]:
        null = subprocess.DEVNULL
        return subprocess.Popen(
            self._inside(["sh", "-c", 'exec "$@" </dev/null >/dev/null 2>&1', "sh", *command]),
            stdin=null, stdout=null, stderr=null, start_new_session=True,
            env={**os.environ, **environment},
        )  # fmt: skip

    def run(self, command: Sequence[str], *, check: bool = True) -> subprocess.CompletedProcess[bytes]:
        done = subprocess.run(self._inside(command), check=False, capture_output=True)
        assert not check or done.returncode == 0, (command, done.stdout[-1000:], done.stderr[-1000:])
        return done

    def _inside(self, command: Sequence[str]) -> list[str]:
        return ["nsenter", "-t", str(self._holder.pid), "-m", *command]


class Victim:
    """A process tree that is dumped, with its pages in a store, and restored."""

    def __init__(self, room: Room, folder: Path, scenario: str, mib: int, **environment: str) -> None:
        self.room = room
        self.out, self.go = folder / "out", folder / "go"
        self.images, self.store, self.work, self._before = (folder / name for name in ("fin", "store", "work", "pre"))
        for path in (self.images, self.store, self.work, self._before):
            path.mkdir()
        self.cgroup = Path(tempfile.mkdtemp(prefix="migrator-fill-", dir=CGROUPS))
        self.places = Places(self.images, self.store, self.work, self.work / "status", [self.cgroup])
        self._fill: subprocess.Popen[bytes] | None = None
        program = [str(room.folder / "victim"), str(self.out), str(self.go), scenario, str(mib)]
        self.process = room.start(program, **environment)
        self.count = int(environment.get("PROCESSES", "1"))
        self.wait_for("ready", self.count)
        self.pids = [self.process.pid, *_children(self.process.pid)]

    def close(self) -> None:
        for pid in self.pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for pid in self.members():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.kill()
        self.process.wait()
        if self._fill is not None:
            self._fill.kill()
            self._fill.wait()
        deadline = time.monotonic() + 10
        while self.members() and time.monotonic() < deadline:
            time.sleep(0.01)
        self.cgroup.rmdir()

    def members(self) -> list[int]:
        return [int(pid) for pid in (self.cgroup / "cgroup.procs").read_text().split()]

    def lines(self, start: str) -> list[str]:
        text = self.out.read_text() if self.out.exists() else ""
        return [line for line in text.splitlines() if line.startswith(start)]

    def wait_for(self, start: str, count: int = 1, timeout_s: float = 30) -> list[str]:
        deadline = time.monotonic() + timeout_s
        while len(self.lines(start)) < count:
            assert time.monotonic() < deadline, f"no {start!r}: {self.status}, {self.log()}"
            time.sleep(0.005)
        return self.lines(start)

    def stored_bytes(self) -> int:
        """Pages that are still in the store, also of files that have no name there any more."""
        return sum(path.stat().st_blocks * 512 for path in self.images.glob("parent/pages-*.img"))

    def dump(self, *, whole: bool = False) -> None:
        """CRIU's images of the tree, stopped, and its pages in the store as the rounds would have put them there.

        `whole`: CRIU has dumped all memory by itself, and the store has nothing.
        """
        options = ["--leave-stopped", "--manage-cgroups=ignore"]
        if not whole:
            self.room.pageless.prepare(self._before, {pid: pid for pid in self.pids})
            options += ["--track-mem", "--prev-images-dir", "../pre"]
        self.room.run([CRIU, "dump", "-t", str(self.process.pid), "-D", str(self.images), *options])
        written = sum(path.stat().st_size for path in self.images.glob("pages-*.img"))
        own = pageless.OWN_BYTES if self.room.pageless.cache is None else 0
        assert whole or written <= own * len(self.pids)
        for pid in [] if whole else self.pids:
            self._send(pid)
        for pid in self.pids:
            os.kill(pid, signal.SIGKILL)
        self.process.wait()
        while any(Path(f"/proc/{pid}").exists() for pid in self.pids):
            time.sleep(0.005)

    def _send(self, pid: int) -> None:
        with (self.images / f"pagemap-{pid}.img").open("rb") as file:
            entries = criu_images.load(file)["entries"][1:]
        store = os.open(path_of(self.store, pid), os.O_RDWR | os.O_CREAT)
        memory = os.open(f"/proc/{pid}/mem", os.O_RDONLY)
        zeros = bytes(PAGE_BYTES)
        for start, end in _mappings(pid):
            # Left from earlier rounds in memory that was thrown away since.
            os.pwrite(store, b"stale" * 800, start)
            os.pwrite(store, b"stale" * 800, end - PAGE_BYTES)
        for entry in entries:
            at, end = entry["vaddr"], entry["vaddr"] + entry["nr_pages"] * PAGE_BYTES
            while at < end:
                data = os.pread(memory, min(1 << 20, end - at), at)
                if zeros in data:
                    for page in range(0, len(data), PAGE_BYTES):
                        if data[page : page + PAGE_BYTES] != zeros or page == 0 or page == len(data) - PAGE_BYTES:
                            os.pwrite(store, data[page : page + PAGE_BYTES], at + page)
                else:
                    os.pwrite(store, data, at)
                at += len(data)
        os.close(memory)
        os.close(store)

    def launch(self) -> int:
        self._fill = launch(self.places)
        return self._fill.pid

    def restore(self) -> float:
        """Prepare, restore and let it run; gives the seconds that CRIU took."""
        prepare(self.images, self.store)
        self.go.touch()
        enter = f"echo $$ >{self.cgroup}/cgroup.procs && exec {CRIU} "
        arguments = f"restore -D {self.images} -W {self.work} --lazy-pages -d --manage-cgroups=ignore -o restore.log"
        start = time.perf_counter()
        done = self.room.run(["sh", "-c", enter + arguments], check=False)
        assert done.returncode == 0, (self.work / "restore.log").read_text()[-2000:]
        return time.perf_counter() - start

    @property
    def status(self) -> Status:
        return Status.read(self.places.status)

    def log(self) -> str:
        path = self.work / "fill.log"
        return path.read_text() if path.exists() else ""

    def wait_until_filled(self, timeout_s: float = 30) -> Status:
        deadline = time.monotonic() + timeout_s
        while (status := self.status).state not in (State.DONE, State.FAILED):
            assert time.monotonic() < deadline, f"not filled: {status}, {self.log()}"
            time.sleep(0.005)
        return status


@contextmanager
def room() -> Iterator[Room]:
    """A room for victims, on tmpfs."""
    with tempfile.TemporaryDirectory(prefix="migrator-fill-", dir="/dev/shm") as folder:
        made = Room(Path(folder))
        try:
            yield made
        finally:
            made.close()


@contextmanager
def victim(room: Room, scenario: str, mib: int, **environment: str) -> Iterator[Victim]:
    """A victim with its pattern written."""
    with tempfile.TemporaryDirectory(dir=room.folder) as folder:
        made = Victim(room, Path(folder), scenario, mib, **environment)
        try:
            yield made
        finally:
            made.close()


def _children(pid: int) -> list[int]:
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            found += [int(child), *_children(int(child))]
    return found


def _mappings(pid: int) -> Iterator[tuple[int, int]]:
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        fields = line.split()
        start, end = (int(number, 16) for number in fields[0].split("-"))
        name = fields[5] if len(fields) > 5 else ""
        if fields[1][3] == "p" and not name.startswith(("[vvar", "[vsyscall")):
            yield start, end


def children(pid: int) -> list[int]:
    """Of a process itself."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def workers(keeper: int) -> list[int]:
    """Processes that it has forked: the guard is the first, and ends by itself."""
    return children(keeper)[1:]


def kill_workers(keeper: int, times: int, pause_s: float) -> None:
    """One after the other, with a moment for the next."""
    for _ in range(times):
        for worker in workers(keeper):
            os.kill(worker, signal.SIGKILL)
        time.sleep(pause_s)
