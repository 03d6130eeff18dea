"""A dump without memory, by the CRIU of this machine."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from agent.runtime import find_program
from migrator.memory import pagemap

pytestmark = pytest.mark.root

# With a tmpfs on /run, as every host has it.
_TRY = """
import os, sys
from pathlib import Path
from migrator import pageless
print(pageless.probe(sys.argv[1], dict(os.environ), Path(sys.argv[2])).cache)
"""


def probe(criu: str, folder: Path, setup: str = "mount -t tmpfs tmpfs /run") -> "subprocess.CompletedProcess[str]":
    inside = ["sh", "-c", f'{setup} && exec "$@"', "sh", sys.executable, "-c", _TRY, criu, str(folder)]
    return subprocess.run(
        ["unshare", "--mount", "--propagation", "private", *inside], capture_output=True, text=True, check=False
    )


def test_probe_dumps_without_pages(tmp_path: Path) -> None:
    done = probe(find_program("criu"), tmp_path / "kept")
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).stat().st_size > 100
    assert [path.name for path in (tmp_path / "kept").iterdir()] == ["criu.kdat"], "nothing else is left"


def test_probe_says_why_it_does_not_work(tmp_path: Path) -> None:
    """A CRIU that cannot be talked into it, as on a kernel of which it believes nothing."""
    stubborn = tmp_path / "criu"
    stubborn.write_text(f'#!/bin/sh\n[ "$1 $2" = "check --feature" ] && exit 1\nexec {find_program("criu")} "$@"\n')
    stubborn.chmod(0o755)
    done = probe(str(stubborn), tmp_path / "kept")
    assert "is not understood" in done.stderr
    assert not list((tmp_path / "kept").iterdir())


# A process with large mappings of which a part is populated, dumped as it is and without a look at these.
_DUMP = """
import json, mmap, os, subprocess, sys, time
from pathlib import Path
from blockdev.extents import Range, merge
from migrator import pageless
from migrator.images import entries
from migrator.memory import mappings
from migrator.memory.pagemap import Pagemap
from pycriu.images import pagemap_pb2

criu, folder = sys.argv[1], Path(sys.argv[2])
way = pageless.probe(criu, dict(os.environ), folder / "kept")
victim = '''
import mmap, time
kept = [mmap.mmap(-1, 32 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) for _ in range(3)]
for step, part in zip((4096, 3 * 4096, 1 << 20), kept):
    for at in range(0, len(part) // 2, step):
        part[at] = 1
open("ready", "w").close()
time.sleep(600)
'''
quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
# Of its files CRIU wants to find the mounts in the namespace that it dumps.
command = ["sh", "-c", 'exec "$0" "$@" </dev/null >/dev/null 2>&1', sys.executable, "-c", victim]
running = subprocess.Popen(way.command(command), cwd=folder, start_new_session=True, **quiet)
try:
    deadline = time.monotonic() + 20
    while not (folder / "ready").exists():
        assert running.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    areas = mappings.read(running.pid)

    def pages(name, more):
        images = folder / name
        images.mkdir()
        way.prepare(folder / "parent", {running.pid: running.pid})
        command = ["nsenter", "--target", str(running.pid), "--mount", criu, "dump", "-t", str(running.pid)]
        command += ["-D", str(images), "-o", "dump.log", "--leave-running", "--track-mem"]
        command += ["--prev-images-dir", "../parent"]
        subprocess.run(command, env={**os.environ, **more}, check=True, **quiet)
        return found(images)

    def found(images):
        rows = entries((images / f"pagemap-{running.pid}.img").read_bytes())
        next(rows)
        rows = map(pagemap_pb2.pagemap_entry.FromString, rows)
        return merge(Range(row.vaddr, row.vaddr + row.nr_pages * 4096) for row in rows)

    plain, known = pages("plain", {}), pages("known", pageless.KNOWS_PAGES)
    with Pagemap(running.pid) as source:
        populated = [region for area in areas if area.is_private for region in source.populated(area)]
    populated = merge(Range(region.start, region.end) for region in populated)
    pageless.add_pages(folder / "known", running.pid, populated, areas)
    print(json.dumps([plain, known, found(folder / "known")]))
finally:
    running.kill()
"""


@pytest.mark.skipif(not pagemap.has_scan(), reason="this kernel has no PAGEMAP_SCAN")
def test_what_criu_does_not_look_at_is_added(tmp_path: Path) -> None:
    inside = ["sh", "-c", 'mount -t tmpfs tmpfs /run && exec "$@"', "sh", sys.executable, "-c", _DUMP]
    done = subprocess.run(
        ["unshare", "--mount", "--propagation", "private", *inside, find_program("criu"), str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    plain, known, completed = json.loads(done.stdout)
    assert sum(end - start for start, end in plain) > 16 << 20
    assert sum(end - start for start, end in known) < 16 << 20, "scripts/criu-shim.c is not in front of CRIU"
    assert completed == plain
