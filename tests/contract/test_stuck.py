"""What hangs in the kernel is given up in time, named, and does no harm when it comes to an end after all."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from agent.cgroup import Cgroup
from blockdev import bounded, filesystem, stuck
from blockdev.volume import MountedVolume, VolumeStore
from migrator.errors import ExecutionError

pytestmark = pytest.mark.root

# Writes to a file from memory that is not there until it is told: it holds the file system's lock all that time.
WRITER = """
import ctypes, fcntl, mmap, os, struct, sys, threading
memory = mmap.mmap(-1, 1 << 20)
start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
libc = ctypes.CDLL(None)
# Not of user mode alone: it is the kernel that reads it.
faults = libc.syscall({"x86_64": 323, "aarch64": 282}[os.uname().machine], os.O_CLOEXEC)
fcntl.ioctl(faults, 0xC018AA3F, bytearray(struct.pack("3Q", 0xAA, 0, 0)))
fcntl.ioctl(faults, 0xC020AA00, bytearray(struct.pack("4Q", start, 1 << 20, 1, 0)))
file = os.open(sys.argv[1], os.O_CREAT | os.O_WRONLY)
threading.Thread(target=lambda: libc.write(file, ctypes.c_void_p(start), 4096), daemon=True).start()
print("writing", flush=True)
sys.stdin.read()
os.close(faults)
"""

# One thread waits for a frozen file system in a page fault, and another one for the first, in the kernel.
HOLDER = """
import ctypes, mmap, os, sys, threading, time
descriptor = os.open(sys.argv[1], os.O_RDWR)
memory = mmap.mmap(descriptor, 1 << 20)
start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
libc = ctypes.CDLL(None)
print("ready", flush=True)
sys.stdin.readline()
threading.Thread(target=lambda: libc.memset(ctypes.c_void_p(start), 1, 1), daemon=True).start()
time.sleep(0.2)
threading.Thread(target=lambda: libc.mprotect(ctypes.c_void_p(start), 1 << 20, 1), daemon=True).start()
print("stuck", flush=True)
sys.stdin.readline()
"""


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[MountedVolume]:
    at = tmp_path / "at"
    at.mkdir()
    made = VolumeStore(tmp_path / "volumes").create("stuck", 64 << 20, "ext4").mount(at)
    try:
        yield made
    finally:
        made.unmount()


@contextmanager
def running(program: str, *arguments: str) -> Iterator["subprocess.Popen[str]"]:
    command = [sys.executable, "-c", program, *arguments]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            process.stdout.readline()
            yield process
        finally:
            process.kill()


def eventually(what: str, probe: Callable[[], bool], within_s: float = 20.0) -> None:
    deadline = time.monotonic() + within_s
    while not probe():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


def test_a_freeze_that_hangs_is_given_up_and_thawed_when_it_ends(mounted: MountedVolume) -> None:
    with running(WRITER, str(mounted.at / "file")) as writer:
        eventually("it writes", (mounted.at / "file").exists)
        time.sleep(0.2)
        with pytest.raises(bounded.Overdue, match=r"FIFREEZE of .* has not come back within 0.5 s") as caught:
            filesystem.freeze(mounted.at, 0.5)
        assert "waits in" in str(caught.value), caught.value
        with pytest.raises(bounded.Overdue, match="an earlier FIFREEZE"):
            filesystem.thaw(mounted.at)
        assert writer.stdin is not None
        writer.stdin.close()
        eventually("it has ended", lambda: not bounded._hanging)
        writer.wait(20)
    (mounted.at / "other").write_text("it is not frozen")
    assert filesystem.freeze(mounted.at) and filesystem.thaw(mounted.at)


def test_a_task_that_cannot_be_frozen_is_named(mounted: MountedVolume) -> None:
    file = mounted.at / "file"
    file.write_bytes(bytes(1 << 20))
    group = Cgroup("/migrator-test-stuck")
    group.freezer.mkdir(exist_ok=True)
    try:
        with running(HOLDER, str(file)) as holder:
            assert holder.stdin is not None and holder.stdout is not None
            (group.freezer / "cgroup.procs").write_text(str(holder.pid))
            filesystem.freeze(mounted.at)
            holder.stdin.write("go\n")
            holder.stdin.flush()
            holder.stdout.readline()
            try:
                eventually("it hangs", lambda: len(stuck.find([holder.pid])) > 1)
                with pytest.raises(ExecutionError, match=r"did not freeze within 0.5 s and run on") as caught:
                    group.freeze(0.5)
                assert f"({Path(sys.executable).name}) waits in" in str(caught.value)
                assert not group.is_frozen()
            finally:
                filesystem.thaw(mounted.at)
    finally:
        group.destroy()


def test_what_does_not_hang_is_not_named() -> None:
    assert stuck.words([os.getpid()]) == "no task is in an uninterruptible wait by now"
