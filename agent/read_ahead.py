"""What a restore opens and maps, read before it comes to that.

The volumes have just been mounted, and nothing of them is in memory. CRIU opens files one after the other and waits for
the disk with each, and writes to pages of private mappings, which the kernel would read one after the other: 10 ms for
a Redis, 30 for a PostgreSQL. No more than that is read: CRIU would wait for the disk behind it.
"""

import os
import stat
from collections import defaultdict
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import structlog
from pycriu.images import fdinfo_pb2, mm_pb2, pagemap_pb2

from agent.rootfs import opened_in
from blockdev import extents
from blockdev.extents import Range
from migrator.images import entries, read
from migrator.memory.pagemap import PAGE_BYTES

log = structlog.get_logger()

# Of pages in a row: what is longer the kernel reads ahead by itself.
_MOST_BYTES = 2 << 20
_AT_ONCE = 8
_MAP_PRIVATE = 0x2  # of mmap(2)


@dataclass(frozen=True)
class Wanted:
    """A file by its path in the container, and what of it will be read; none of one that is only opened."""

    path: str
    parts: frozenset[Range]


def begin(images: Path, volumes: Mapping[str, str]) -> None:
    """Have threads read what is wanted, and return. `volumes` says where the container's mount points are here.

    Nothing depends on it: what is wrong with an image, CRIU will say.
    """
    threads = ThreadPoolExecutor(_AT_ONCE)
    threads.submit(_read_all, threads, images, volumes).add_done_callback(_tell)


def _tell(done: "Future[None]") -> None:
    if error := done.exception():
        log.info("a restore has to read from the disk what could have been read before", why=repr(error))


def _read_all(threads: ThreadPoolExecutor, images: Path, volumes: Mapping[str, str]) -> None:
    places = sorted(((PurePosixPath(at), Path(here)) for at, here in volumes.items()), key=lambda p: -len(p[0].parts))
    for file in wanted(images):
        inside = PurePosixPath("/", file.path)
        at, here = next(place for place in places if inside.is_relative_to(place[0]))
        threads.submit(_read, here, str(inside.relative_to(at)), file.parts).add_done_callback(_tell)


def wanted(images: Path) -> Iterator[Wanted]:
    """The files that are open or mapped, by CRIU's images. Of private mappings those pages are wanted that CRIU will
    write to: what a process has only looked at is left to it, since to read that, too, takes longer than it saves."""
    parts: dict[int, set[Range]] = defaultdict(set)
    for name in os.listdir(images):  # noqa: PTH208  # half the time of Path.iterdir
        if name.startswith("mm-") and name.endswith(".img"):
            for file, part in _written(images, name.removeprefix("mm-")):
                parts[file].add(part)
    for message in entries(read(images / "files.img")):
        file = fdinfo_pb2.file_entry.FromString(message)
        if file.type == fdinfo_pb2.REG:
            yield Wanted(file.reg.name, frozenset(parts.get(file.id, ())))


def _written(images: Path, process: str) -> Iterator[tuple[int, Range]]:
    """Files by number, and what of them a process has pages of its own in the place of: no more than it has mappings
    and ranges of pages, which in an image that is none may lie over each other."""
    _head, *rest = entries(read(images / f"pagemap-{process}"))
    found = [pagemap_pb2.pagemap_entry.FromString(message) for message in rest]
    pages = extents.merge(
        Range(entry.vaddr, entry.vaddr + (entry.nr_pages or entry.compat_nr_pages) * PAGE_BYTES) for entry in found
    )
    at = 0
    for message in entries(read(images / f"mm-{process}")):
        for vma in mm_pb2.mm_entry.FromString(message).vmas:
            if vma.start < at:
                return
            at = vma.end
            if vma.shmid and vma.flags & _MAP_PRIVATE:
                for start, end in extents.intersect(pages, [Range(vma.start, vma.end)]):
                    first = vma.pgoff + start - vma.start
                    yield vma.shmid, Range(first, first + min(end - start, _MOST_BYTES))


def _read(root: Path, path: str, parts: frozenset[Range]) -> None:
    # Whatever it is that does not work: CRIU will say so.
    with suppress(OSError), opened_in(root, path, os.O_PATH) as found:
        if not parts or not stat.S_ISREG(os.fstat(found).st_mode):
            return
        descriptor = os.open(f"/proc/self/fd/{found}", os.O_RDONLY | os.O_CLOEXEC)
        try:
            for start, end in parts:
                os.posix_fadvise(descriptor, start, end - start, os.POSIX_FADV_WILLNEED)
        finally:
            os.close(descriptor)
