"""A dump by CRIU that copies no memory, because all of it was tracked and sent by us.

CRIU leaves out a page that has not changed since a parent dump and is in it. Both are made to hold for every page.
The parent is written here, with a pagemap that claims the whole address space of every process. And for the changes:

- Where the kernel tracks them (CONFIG_MEM_SOFT_DIRTY) it is made to forget them once all have been collected. What CRIU
  itself changes in a process is then dumped: a few pages.
- Where it does not, CRIU is told by its cache of kernel features, /run/criu.kdat, that it does. The cache is changed
  for one CRIU alone, in a mount namespace of its own. Its layout is CRIU's own affair (4.2: a byte at offset 32), so
  the byte is found by trying.

`probe` dumps a process of its own before anything relies on it.
"""

import os
import signal
import struct
import subprocess
import tempfile
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pycriu.images import inventory_pb2, pagemap_pb2
from pycriu.images.magic import by_name

from blockdev.extents import Range, intersect, merge, subtract
from migrator.errors import ExecutionError
from migrator.images import HEADER_BYTES, entries, joined, last_errors
from migrator.memory import ProcessGone, mappings, soft_dirty

CACHE = Path("/run/criu.kdat")
# What CRIU may change in a process that it dumps, and the kernel tells of: system calls are put into its code.
OWN_BYTES = 32 << 10
# has_dirty_track of struct kerndat_s; others are tried if it is elsewhere.
LIKELY_OFFSET = 32
PROBE_TIMEOUT_S = 60.0

# Set in CRIU's environment by who calls `add_pages` afterwards: see scripts/criu-shim.c.
KNOWS_PAGES = {"MIGRATOR_KNOWS_PAGES": "1"}
LARGE_BYTES = 4 << 20
_PARENT, _PRESENT = 1, 4
_PAGE = 4096
_FIRST, _END = 0x10000, 0x7FFFFFFFF000
# Later than any process: CRIU takes one that began after the parent dump for another with the same pid.
_DISTANT_US = 1 << 60

_WITH_CACHE = 'mount --bind "$1" "$2" && shift 2 && exec "$@"'
# With an empty /run, and the cache from or to the pipe: no folder of ours is to be seen there.
_TRY_CACHE = 'mount -t tmpfs tmpfs /run && cat >"$1" && shift && exec "$@" >/dev/null'
_MAKE_CACHE = 'mount -t tmpfs tmpfs /run && "$2" check >/dev/null; cat "$1"'
_UNSHARE = ("unshare", "--mount", "--propagation", "slave", "sh", "-c")


@dataclass(frozen=True)
class Pageless:
    """What `probe` has found to work. `cache` is the changed one, None where CRIU needs none."""

    cache: Path | None

    def command(self, criu: list[str]) -> list[str]:
        """The command line, in a mount namespace where the cache is the changed one; the process stays the same."""
        if self.cache is None:
            return criu
        CACHE.touch()
        return [*_UNSHARE, _WITH_CACHE, "criu", str(self.cache), str(CACHE), *criu]

    def prepare(self, parent: Path, processes: Mapping[int, int]) -> None:
        """Make the parent dump for frozen processes, by pid; each with its pid as CRIU has it.

        All that they wrote has been collected: a method that sees writes by soft-dirty bits knows nothing of them now.
        """
        write_parent(parent, processes.values())
        if self.cache is None:
            for pid in processes:
                with suppress(ProcessGone):
                    soft_dirty.clear(pid)


def write_parent(folder: Path, pids: Iterable[int]) -> None:
    """A parent dump that has every page of these processes, by their pids as CRIU has them. Repeatable, adds to it."""
    template = folder / "pagemap"
    if not template.exists():
        folder.mkdir(parents=True, exist_ok=True)
        whole = (_END - _FIRST) // _PAGE
        _write(
            template,
            "PAGEMAP",
            pagemap_pb2.pagemap_head(pages_id=1),
            pagemap_pb2.pagemap_entry(vaddr=_FIRST, nr_pages=whole, compat_nr_pages=0, flags=_PRESENT),
        )
        (folder / "pages-1.img").touch()
        _write(
            folder / "inventory.img",
            "INVENTORY",
            inventory_pb2.inventory_entry(img_version=2, dump_uptime=_DISTANT_US),
        )
    for pid in pids:
        path = folder / f"pagemap-{pid}.img"
        if not path.exists():
            os.link(template, path)


def add_pages(images: Path, pid: int, populated: list[Range], areas: Iterable[mappings.Mapping]) -> None:
    """Amend the dump of one process with what CRIU was kept from looking through (`KNOWS_PAGES`): the parent has it.

    `populated` is what there is, in order, and `areas` are the mappings; `pid` is the process' as CRIU has it. Where
    CRIU has looked all the same, nothing is added.
    """
    large = [
        Range(area.start, area.end) for area in areas if area.is_anonymous and area.end - area.start >= LARGE_BYTES
    ]
    if not large:
        return
    path = images / f"pagemap-{pid}.img"
    content = path.read_bytes()
    head, *rest = entries(content)
    rows = [pagemap_pb2.pagemap_entry.FromString(message) for message in rest]
    known = [Range(row.vaddr, row.vaddr + (row.nr_pages or row.compat_nr_pages) * _PAGE) for row in rows]
    for start, end in subtract(intersect(populated, large), merge(known)):
        count = (end - start) // _PAGE
        rows.append(pagemap_pb2.pagemap_entry(vaddr=start, nr_pages=count, compat_nr_pages=count, flags=_PARENT))
    rows.sort(key=lambda row: int(row.vaddr))
    path.write_bytes(content[:HEADER_BYTES] + joined([head, *(row.SerializeToString() for row in rows)]))


def probe(criu: str, environment: Mapping[str, str], folder: Path) -> Pageless:
    """Find the byte, dump a small process without pages, and look at what was written. Takes some 0.2 s.

    The changed cache is kept in `folder`. Raises ExecutionError with the reason if it does not work here.
    """
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.TemporaryDirectory(dir=folder, prefix="probe-") as temporary:
        work = Path(temporary)
        if soft_dirty.probe() is None:
            pageless = Pageless(None)
        else:
            kept = folder / "criu.kdat"
            kept.write_bytes(_patched(criu, environment))
            pageless = Pageless(kept)
        _dump_sleeper(criu, environment, pageless, work)
    return pageless


def _patched(criu: str, environment: Mapping[str, str]) -> bytes:
    made = _run([*_UNSHARE, _MAKE_CACHE, "criu", str(CACHE), criu], environment)
    content = made.stdout
    if made.returncode != 0 or not content:
        raise ExecutionError(f"CRIU keeps no cache of kernel features: {made.stderr.decode(errors='replace').strip()}")
    for offset in (LIKELY_OFFSET, *range(len(content))):
        if content[offset] == 0:
            trial = content[:offset] + b"\1" + content[offset + 1 :]
            check = [str(CACHE), criu, "check", "--feature", "mem_dirty_track"]
            if _run([*_UNSHARE, _TRY_CACHE, "criu", *check], environment, trial).returncode == 0:
                return trial
    raise ExecutionError(f"this CRIU's cache of kernel features ({len(content)} bytes) is not understood")


def _dump_sleeper(criu: str, environment: Mapping[str, str], pageless: Pageless, work: Path) -> None:
    images, parent = work / "images", work / "parent"
    images.mkdir()
    # With the cache in its own mount namespace, so that CRIU beside it need not dump that.
    sleeper = subprocess.Popen(
        pageless.command(["sh", "-c", f"exec sleep {PROBE_TIMEOUT_S:g} </dev/null >/dev/null 2>&1"]),
        env=dict(environment),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        # Before it sleeps it is being loaded, which changes its memory.
        while "(sleep) S " not in Path(f"/proc/{sleeper.pid}/stat").read_text():
            if sleeper.poll() is not None:
                raise ExecutionError("a mount namespace with the changed cache could not be made")
            time.sleep(0.001)
        pageless.prepare(parent, {sleeper.pid: sleeper.pid})
        dump = [
            "nsenter",
            "--target",
            str(sleeper.pid),
            "--mount",
            criu,
            "dump",
            "-t",
            str(sleeper.pid),
            "-D",
            str(images),
            "-o",
            "dump.log",
            "--leave-running",
        ]
        dump += ["--track-mem", "--prev-images-dir", "../parent"]
        if _run(dump, environment).returncode != 0:
            raise ExecutionError(f"a dump without pages failed:{last_errors(images / 'dump.log')}")
        pages = sum(path.stat().st_size for path in images.glob("pages-*.img"))
        if pages > (OWN_BYTES if pageless.cache is None else 0):
            raise ExecutionError(f"CRIU wrote {pages} bytes of memory that it was told not to write")
    finally:
        sleeper.send_signal(signal.SIGKILL)
        sleeper.wait()


def _run(
    command: list[str], environment: Mapping[str, str], given: bytes = b""
) -> "subprocess.CompletedProcess[bytes]":
    try:
        return subprocess.run(
            command, env=dict(environment), input=given, capture_output=True, check=False, timeout=PROBE_TIMEOUT_S
        )
    except subprocess.TimeoutExpired as error:
        raise ExecutionError(f"{command[0]} did not end within {PROBE_TIMEOUT_S:g} s") from error


def _write(
    path: Path,
    kind: str,
    *entries: "pagemap_pb2.pagemap_head | pagemap_pb2.pagemap_entry | inventory_pb2.inventory_entry",
) -> None:
    payloads = [entry.SerializeToString() for entry in entries]
    # The inventory alone has no magic of images before its own.
    magics = [by_name[kind]] if kind == "INVENTORY" else [by_name["IMG_COMMON"], by_name[kind]]
    content = b"".join(struct.pack("<I", magic) for magic in magics)
    path.write_bytes(content + joined(payloads))
