"""What a restore opens and maps, read before it comes to that.

The volumes have just been mounted, and nothing of them is in memory. CRIU opens files one after the other and waits for
the disk with each, and writes to pages of private mappings, which the kernel would read one after the other: 10 ms for
a Redis, 30 for a PostgreSQL.
"""

import os
import stat
from collections import defaultdict
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from pycriu.images import fdinfo_pb2, mm_pb2

from agent.rootfs import opened_in
from blockdev.extents import Range
from migrator.images import entries, read

# Of a mapping: all of what programs have written to, and not all of a large file of constants.
_MOST_BYTES = 2 << 20
_AT_ONCE = 8
# Of mmap(2).
_PROT_EXEC, _MAP_PRIVATE = 0x4, 0x2


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
    threads.submit(_read_all, threads, images, volumes)


def _read_all(threads: ThreadPoolExecutor, images: Path, volumes: Mapping[str, str]) -> None:
    places = sorted(((PurePosixPath(at), Path(here)) for at, here in volumes.items()), key=lambda p: -len(p[0].parts))
    for file in wanted(images):
        inside = PurePosixPath("/", file.path)
        at, here = next(place for place in places if inside.is_relative_to(place[0]))
        threads.submit(_read, here, str(inside.relative_to(at)), file.parts)


def wanted(images: Path) -> Iterator[Wanted]:
    """The files that are open or mapped, by CRIU's images. Of private mappings the contents are wanted, but not code:
    to read it, too, takes longer than it saves."""
    parts: dict[int, set[Range]] = defaultdict(set)
    for name in os.listdir(images):  # noqa: PTH208  # half the time of Path.iterdir
        if not (name.startswith("mm-") and name.endswith(".img")):
            continue
        for message in entries(read(images / name)):
            for vma in mm_pb2.mm_entry.FromString(message).vmas:
                if vma.shmid and vma.flags & _MAP_PRIVATE and not vma.prot & _PROT_EXEC:
                    length = min(vma.end - vma.start, _MOST_BYTES)
                    parts[vma.shmid].add(Range(vma.pgoff, vma.pgoff + length))
    for message in entries(read(images / "files.img")):
        file = fdinfo_pb2.file_entry.FromString(message)
        if file.type == fdinfo_pb2.REG:
            yield Wanted(file.reg.name, frozenset(parts.get(file.id, ())))


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
