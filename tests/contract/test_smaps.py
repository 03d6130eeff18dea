"""What CRIU is given instead of /proc/PID/smaps says the same, of processes of many kinds."""

import errno
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from blockdev.errors import BlockError
from migrator import memory
from migrator.smaps import FOLDER, Smaps, SmapsFolder

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
    SmapsFolder(smaps, tmp_path / "made").write([program])
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


def test_one_that_is_gone_is_left_out(smaps: Smaps, program: int, tmp_path: Path) -> None:
    SmapsFolder(smaps, tmp_path / "made").write([1 << 22, program])
    assert {path.name for path in (tmp_path / "made").iterdir()} == {f"{program}", f"{program}.modes"}


@pytest.mark.parametrize("full_at", ["{pid}", "{pid}.modes"])
def test_what_could_be_written_only_in_part_is_left_out(
    smaps: Smaps, program: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full_at: str
) -> None:
    write_whole = Path.write_bytes

    def write(path: Path, content: bytes) -> int:
        if path.name != full_at.format(pid=program):
            return write_whole(path, content)
        write_whole(path, content[: len(content) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(Path, "write_bytes", write)
    SmapsFolder(smaps, tmp_path / "made").write([program])
    assert not (tmp_path / "made" / str(program)).exists()


def test_criu_gets_it_by_the_shim(smaps: Smaps, program: int, tmp_path: Path, shim: Path) -> None:
    """By openat(2) in the folder of a process; of one without a file, and any other file, it gets the real one."""
    SmapsFolder(smaps, tmp_path / "made").write([program])
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


def test_it_is_written_again_where_something_has_changed(smaps: Smaps, tmp_path: Path) -> None:
    changing = """
import mmap, sys
kept = [mmap.mmap(-1, 16 << 20)]
kept[0].write(bytes(range(256)) * (len(kept[0]) // 256))
for line in sys.stdin:
    exec(line)
    print("done", flush=True)
"""
    folder = SmapsFolder(smaps, tmp_path / "made")
    with subprocess.Popen(
        [sys.executable, "-c", changing], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as program:
        assert program.stdin is not None
        assert program.stdout is not None
        written = tmp_path / "made" / str(program.pid)
        said = set()
        for change in ("pass", "pass", "kept[0].madvise(mmap.MADV_RANDOM)", "kept.append(mmap.mmap(-1, 4 << 20))"):
            program.stdin.write(change + "\n")
            program.stdin.flush()
            assert program.stdout.readline() == "done\n"
            folder.write([program.pid])
            assert written.read_bytes().decode().split("\n")[:-1] == of_kernel(program.pid)
            said.add((written.read_bytes(), written.stat().st_ino))
        assert len(said) == 3
        program.stdin.close()
        program.wait()
        # Another may get its pid.
        folder.write([program.pid])
        assert not written.exists()


def test_criu_gets_the_modes_of_mapped_files_by_the_shim(
    smaps: Smaps, program: int, tmp_path: Path, shim: Path
) -> None:
    """Of the process whose smaps it reads, in order; of anything else it gets what the kernel says."""
    SmapsFolder(smaps, tmp_path / "made").write([program])
    asker = """
import ctypes, json, os, sys
libc = ctypes.CDLL(None, use_errno=True)
process = os.open(f"/proc/{sys.argv[1]}", os.O_RDONLY | os.O_DIRECTORY)
maps = open(f"/proc/{sys.argv[1]}/maps", newline="\\n").read().split("\\n")[:-1]
folder = os.open("map_files", os.O_RDONLY | os.O_DIRECTORY, dir_fd=process)
asked = sys.argv[2] == "smaps" and os.open("smaps", os.O_RDONLY, dir_fd=process)
found = []
for first, end in [line.split()[0].split("-") for line in maps] + [("1000", "2000")]:
    name = f"{int(first, 16):x}-{int(end, 16):x}"
    status = ctypes.create_string_buffer(144)
    failed = libc.fstatat64(folder, name.encode(), status, 0x100)
    mode, inode = int.from_bytes(status[24:28], "little"), int.from_bytes(status[8:16], "little")
    found.append([name, ctypes.get_errno() if failed else mode & 0o170600, bool(inode)])
print(json.dumps(found))
"""
    told = []
    for how in ("smaps", "not"):
        environment = {**os.environ, "LD_PRELOAD": str(shim), FOLDER: str(tmp_path / "made")}
        done = subprocess.run(
            [sys.executable, "-c", asker, str(program), how],
            env=environment,
            text=True,
            capture_output=True,
            check=True,
        )
        told.append(json.loads(done.stdout))
    ours, kernels = told
    assert [row[:2] for row in ours] == [row[:2] for row in kernels]
    assert {mode & 0o600 for _, mode, inode in kernels if inode} == {0o400, 0o600}
    assert not any(inode for *_, inode in ours)
    assert any(inode for *_, inode in kernels)
