"""With scripts/criu-shim.c CRIU is told the same of a process' pages, and the kernel is asked for less; and a CRIU that
is to restore is made ready for it when it is asked."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from migrator.memory import pagemap
from tests.contract.memory_kit import eventually

SHIM = Path(__file__).parents[2] / "scripts/criu-shim.c"

# Between the shim and the C library: says which masks the kernel gets.
RECORDER = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
int ioctl(int descriptor, unsigned long request, ...)
{
    int (*next)(int, unsigned long, ...) = dlsym(RTLD_NEXT, "ioctl");
    va_list arguments;
    va_start(arguments, request);
    uint64_t *scan = va_arg(arguments, uint64_t *);
    va_end(arguments);
    if (request == 0xc0606610)
        fprintf(stderr, "%d\\n", (scan[8] & 4) && (scan[9] & 4));
    return next(descriptor, request, scan);
}
"""

# Asks as CRIU does (pagemap-cache.c): not the page of zeros, no page of a file.
ASKER = """
import ctypes, fcntl, json, mmap, os, struct, sys
PAGE, SIZE = 4096, 8 << 20
file = os.open(sys.argv[1], os.O_RDWR)
kinds = {
    "anonymous": mmap.mmap(-1, SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS),
    "file": mmap.mmap(file, SIZE, flags=mmap.MAP_PRIVATE),
    "small": mmap.mmap(-1, SIZE // 4, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS),
}
pagemap = os.open(f"/proc/{os.getpid()}/pagemap", os.O_RDONLY)
found = {}
for name, mapping in kinds.items():
    for at in range(0, len(mapping), 16 * PAGE):
        mapping[at] = 1                 # written
        mapping[at + 3 * PAGE]          # read: the page of zeros, or the file's
    address = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
    regions = (ctypes.c_uint64 * 3000)()
    scan = bytearray(struct.pack(
        "12Q", 96, 0, address, address + len(mapping), 0, ctypes.addressof(regions), 1000, 0, 36, 36, 24, 152))
    count = fcntl.ioctl(pagemap, 0xC0606610, scan)
    rows = [(regions[i] - address, regions[i + 1] - address, regions[i + 2]) for i in range(0, 3 * count, 3)]
    found[name] = rows, struct.unpack("12Q", scan)[4] - address
print(json.dumps(found))
"""


@pytest.mark.skipif(not pagemap.has_scan(), reason="this kernel has no PAGEMAP_SCAN")
def test_the_same_pages_are_found_and_less_is_asked(tmp_path: Path) -> None:
    content = tmp_path / "content"
    content.write_bytes(os.urandom(8 << 20))
    (tmp_path / "recorder.c").write_text(RECORDER)
    for source in (SHIM, tmp_path / "recorder.c"):
        built = tmp_path / f"{source.stem}.so"
        subprocess.run(["gcc", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-o", built, source], check=True)
    plain = _ask(content, tmp_path / "recorder.so")
    shimmed = _ask(content, tmp_path / "criu-shim.so", tmp_path / "recorder.so")
    assert shimmed.stdout == plain.stdout
    rows, end = json.loads(plain.stdout)["anonymous"]
    assert len(rows) == (8 << 20) // (16 << 12)
    assert end == 8 << 20
    # Whether it was asked for pages of files: of the anonymous mapping, of that of a file, of the small one.
    assert plain.stderr.split() == ["1", "1", "1"]
    assert shimmed.stderr.split() == ["0", "1", "1"]


def _ask(content: Path, *libraries: Path) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-c", ASKER, content],
        env={**os.environ, "LD_PRELOAD": ":".join(map(str, libraries))},
        capture_output=True,
        text=True,
        check=True,
    )


# As CRIU does it when it serves one request (cr-service.c).
RESTORER = """
import json, os, socket, sys
asked = socket.socket(fileno=int(sys.argv[1]))
asked.recv(0, socket.MSG_TRUNC | socket.MSG_PEEK)
asked.recv(100)
place = os.lseek(120, 0, os.SEEK_CUR)
os.write(120, b"it")
mounts, other = os.readlink("/proc/self/ns/mnt"), os.readlink("/proc/self/fd/121")
asked.send(json.dumps([mounts, place, other, dict(os.environ)]).encode())
asked.recv(100)
"""


@pytest.fixture
def restorer(tmp_path: Path, shim: Path) -> Iterator[tuple["subprocess.Popen[bytes]", socket.socket]]:
    if os.geteuid() != 0:
        pytest.skip("needs root")
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with closing(ours), closing(theirs):
        running = subprocess.Popen(
            [sys.executable, "-c", RESTORER, str(theirs.fileno())],
            env={**os.environ, "LD_PRELOAD": str(shim), "MIGRATOR_RESTORE": str(tmp_path)},
            pass_fds=[theirs.fileno()],
            stderr=subprocess.PIPE,
        )
        theirs.close()
        ours.settimeout(20)
        with running:
            yield running, ours
            ours.close()


def test_it_is_made_ready_when_it_is_asked(
    restorer: tuple["subprocess.Popen[bytes]", socket.socket], tmp_path: Path
) -> None:
    running, ours = restorer
    eventually("it waits", (tmp_path / f"waits-{running.pid}").exists)
    assert _mounts_of(running.pid) == _mounts_of(os.getpid())
    written, read = tmp_path / "written", tmp_path / "read"
    written.write_bytes(b"as is")
    read.touch()
    (tmp_path / "inherit").write_text(f"120 {os.O_RDWR} 3 {written}\n121 {os.O_RDONLY} 0 {read}\n")
    ours.send(b"restore")
    mounts, place, other, environment = json.loads(ours.recv(1 << 16))
    assert mounts != _mounts_of(os.getpid())
    assert place == 3
    assert written.read_bytes() == b"as it"
    assert other == str(read)
    assert "LD_PRELOAD" not in environment


def test_what_cannot_be_inherited_ends_it(
    restorer: tuple["subprocess.Popen[bytes]", socket.socket], tmp_path: Path
) -> None:
    running, ours = restorer
    (tmp_path / "inherit").write_text(f"120 {os.O_RDWR} 0 {tmp_path}/missing\n")
    ours.send(b"restore")
    assert running.wait(10) == 1
    assert running.stderr is not None
    assert running.stderr.read().decode() == f"criu-shim: {tmp_path}/missing: No such file or directory\n"


def _mounts_of(pid: int) -> str:
    return str(Path(f"/proc/{pid}/ns/mnt").readlink())
