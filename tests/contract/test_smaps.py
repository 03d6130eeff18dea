"""What CRIU is given instead of /proc/PID/smaps says the same, of processes of many kinds."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from blockdev.errors import BlockError
from migrator import memory
from migrator.smaps import FOLDER, Smaps

pytestmark = pytest.mark.root

MIB = 1 << 20

# 64 MiB with mappings of all kinds, in threads' stacks, too.
MANY = f"""
import ctypes, mmap, sys, threading
kept = []
def made(flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, advice=None, length={MIB}):
    kept.append(mmap.mmap(-1, length, flags=flags))
    kept[-1].write(bytes(range(256)) * (length // 256))
    if advice is not None:
        kept[-1].madvise(advice)
for advice in (None, 1, 2, 10, 14, 15, 16, 18):  # of linux/mman.h
    made(advice=advice, length=7 * {MIB})
made(mmap.MAP_SHARED | mmap.MAP_ANONYMOUS)
made(mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000)  # MAP_NORESERVE
try:
    made(mmap.MAP_ANONYMOUS | 0x08)  # MAP_DROPPABLE
except OSError:
    pass  # before Linux 6.11
file = open(sys.executable, "rb")
kept += [mmap.mmap(file.fileno(), {MIB}, prot=mmap.PROT_READ, flags=how) for how in (1, 2)]
# Of all that may end a line the kernel escapes \\n alone.
named = open(sys.argv[1] + "/a\\r\\u2028\\x85 b\\nc", "w+b")
named.write(bytes(4096))
named.flush()
kept.append(mmap.mmap(named.fileno(), 4096))
made()
ctypes.CDLL(None).mlock(ctypes.c_void_p(ctypes.addressof(ctypes.c_char.from_buffer(kept[-1]))), {MIB})
end = threading.Event()
for _ in range(5):
    threading.Thread(target=end.wait, daemon=True).start()
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def smaps() -> Iterator[Smaps]:
    try:
        made = Smaps()
    except (OSError, BlockError) as error:
        pytest.skip(f"this kernel: {error}")
    with closing(made):
        yield made


@pytest.fixture
def program(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    command = [sys.executable, "-c", MANY, str(tmp_path_factory.mktemp("mapped"))]
    running = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert running.stdin is not None
    assert running.stdout is not None
    try:
        assert running.stdout.readline() == b"ready\n"
        yield running.pid
    finally:
        running.stdin.close()
        running.wait()
        running.stdout.close()


def of_kernel(pid: int) -> list[str]:
    """What CRIU takes from it: mappings and their flags."""
    lines = Path(f"/proc/{pid}/smaps").read_bytes().decode().split("\n")
    return [line for line in lines if (line[:1] and line[0] in "0123456789abcdef") or line.startswith("VmFlags")]


def test_it_says_what_the_kernel_says(smaps: Smaps, program: int, tmp_path: Path) -> None:
    smaps.write(tmp_path / "made", [program])
    written = (tmp_path / "made" / str(program)).read_bytes().decode().split("\n")[:-1]
    assert written == of_kernel(program)
    assert any("\r\u2028\x85 b\\012c" in line for line in written)
    with closing(memory.make(lambda: [program], "none")) as tracker:
        assert tracker.collect().processes
    said = {word for line in written if line.startswith("VmFlags") for word in line.split()[1:]}
    assert said >= {"lo", "nr", "dc", "dd", "sr", "rr", "hg", "nh", "wf", "sh", "gd"} - missing(program)


def missing(pid: int) -> set[str]:
    """Flags that this kernel does not have: huge pages may be left out of it."""
    kernel = {word for line in of_kernel(pid) if line.startswith("VmFlags") for word in line.split()[1:]}
    return {"hg", "nh"} - kernel


def test_small_processes_and_those_that_are_gone_are_left_out(smaps: Smaps, tmp_path: Path) -> None:
    with subprocess.Popen(["sleep", "60"]) as small:
        smaps.write(tmp_path / "made", [small.pid, 1 << 22])
        assert list((tmp_path / "made").iterdir()) == []
        small.kill()


def test_criu_gets_it_by_the_shim(smaps: Smaps, program: int, tmp_path: Path, shim: Path) -> None:
    """By openat(2) in the folder of a process; of one without a file, and any other file, it gets the real one."""
    smaps.write(tmp_path / "made", [program])
    asker = """
import os, sys
for pid, name in (sys.argv[1], "smaps"), (sys.argv[1], "maps"), (str(os.getpid()), "smaps"):
    folder = os.open(f"/proc/{pid}", os.O_RDONLY | os.O_DIRECTORY)
    with open(os.open(name, os.O_RDONLY, dir_fd=folder)) as file:
        print("Rss:" in (text := file.read()), "VmFlags:" in text)
"""
    found = {}
    for folder in (tmp_path / "made", None):
        added = {"LD_PRELOAD": str(shim)} | ({FOLDER: str(folder)} if folder else {})
        done = subprocess.run(
            [sys.executable, "-c", asker, str(program)], env={**os.environ, **added}, text=True, capture_output=True,
            check=True,
        )  # fmt: skip
        found[folder] = done.stdout.splitlines()
    assert found[tmp_path / "made"] == ["False True", "False False", "True True"]
    assert found[None] == ["True True", "False False", "True True"]
