"""CRIU's images of shared memory, amended at the destination: memfds are handed to CRIU instead of being made by it.

CRIU takes a descriptor that it inherits (`inherit-fd`) for a memfd's file by the memfd's name (criu/memfd.c, 4.2). So
each open file of a memfd gets an inode entry of its own in the images, with a name that only its descriptor has; the
object behind it is the one in the store, with all that was sent. Shared anonymous memory is a memfd in the images.

CRIU makes System V memory itself, and reads its contents from images; so it does for memfds in odd cases (open for
writing only, or with flags). For these the pages are copied here.
"""

import fcntl
import os
import secrets
from collections import defaultdict
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from pycriu.images import fdinfo_pb2, fown_pb2, ipc_shm_pb2, memfd_pb2, mm_pb2, pagemap_pb2

from blockdev import extents
from blockdev.extents import Range
from migrator.errors import ExecutionError
from migrator.images import HEADER_BYTES, entries, read, replace
from migrator.memory.pagemap import PAGE_BYTES
from migrator.shm.store import SharedStore

# Above what CRIU has open when it is asked to restore, and below what it moves up.
_FIRST_INHERITED = 100
_VMA_MEMFD = 1 << 14
_PRESENT = 4
_NOBODY = fown_pb2.fown_entry(uid=0, euid=0, signum=0, pid_type=0, pid=0)
_O_LARGEFILE = 0o100000
_PIECE_BYTES = 1 << 20
# Of one entry of a pagemap, which CRIU counts in an int.
_LARGEST_ENTRY_BYTES = 64 << 20


@dataclass(frozen=True)
class Inherited:
    """One open file for CRIU to inherit: what CRIU knows it by, of which descriptor here, how, and its position."""

    key: str
    descriptor: int
    is_writable: bool
    position: int


@dataclass(frozen=True)
class Seals:
    """What may no longer be done to an object, in force once everything is mapped."""

    descriptor: int
    seals: int


@dataclass(frozen=True)
class Amended:
    """What the restore needs besides the images."""

    inherited: list[Inherited]
    seals: list[Seals]

    def options(self) -> str:
        """Lines for a configuration file of CRIU's."""
        return "".join(f"inherit-fd fd[{number}]:{file.key}\n" for number, file in self._numbered())

    def listed(self) -> str:
        """For scripts/criu-shim.c, which opens them. This process holds the store until every task is restored."""
        return "".join(
            f"{number} {os.O_RDWR if file.is_writable else os.O_RDONLY} {file.position} "
            f"/proc/{os.getpid()}/fd/{file.descriptor}\n"
            for number, file in self._numbered()
        )

    def _numbered(self) -> Iterator[tuple[int, Inherited]]:
        return enumerate(self.inherited, _FIRST_INHERITED)

    def seal(self) -> None:
        """When every task is restored: some seals forbid what restoring needs."""
        for item in self.seals:
            fcntl.fcntl(item.descriptor, fcntl.F_ADD_SEALS, item.seals)


def amend(images: Path, store: SharedStore) -> Amended:
    """Point the images to the store's objects, and give the objects the size and mode that they have to have.

    Raises ExecutionError where the images do not fit together.
    """
    for image in images.glob("ipcns-shm-*.img"):
        for number in _system_v_ids(image):
            if (descriptor := store.system_v(number)) is not None:
                _write_pages(images, number, descriptor)
    return _amend_memfds(images, store)


def _amend_memfds(images: Path, store: SharedStore) -> Amended:
    inherited: list[Inherited] = []
    seals: list[Seals] = []
    inodes = _read_inodes(images / "memfd.img")
    known = {inode.inode_id: store.memfd(inode.shmid) for inode in inodes if not _has_pages(images, inode.shmid)}
    if not any(known.values()):
        return Amended(inherited, seals)
    header, files = _read_files(images / "files.img")
    opened = _by_inode(files)
    stored: dict[int, int] = {}
    for inode in inodes:
        descriptor = known.get(inode.inode_id)
        if descriptor is None:
            continue
        if all(_is_plain(file.memfd) for file in opened[inode.inode_id]):
            stored[inode.inode_id] = descriptor
        else:
            os.ftruncate(descriptor, inode.size)
            _write_pages(images, inode.shmid, descriptor)
    files += _split_mapped(images, files, stored)
    opened = _by_inode(files)
    next_id = max(inode.inode_id for inode in inodes) + 1
    token = secrets.token_hex(8)
    amended = []
    for inode in inodes:
        descriptor = stored.get(inode.inode_id)
        if descriptor is None:
            amended.append(inode)
            continue
        _dress(descriptor, inode)
        if inode.seals:
            seals.append(Seals(descriptor, inode.seals))
        for file in opened[inode.inode_id]:
            clone = memfd_pb2.memfd_inode_entry()
            clone.CopyFrom(inode)
            clone.inode_id, clone.name = next_id, f"migrator-{token}-{next_id}"
            file.memfd.inode_id = next_id
            amended.append(clone)
            is_writable = file.memfd.flags & os.O_ACCMODE == os.O_RDWR
            inherited.append(Inherited(f"/memfd:{clone.name}", descriptor, is_writable, file.memfd.pos))
            next_id += 1
    replace(images / "files.img", header, [file.SerializeToString() for file in files])
    head = read(images / "memfd.img")[:HEADER_BYTES]
    replace(images / "memfd.img", head, [inode.SerializeToString() for inode in amended])
    return Amended(inherited, seals)


def _by_inode(files: list[fdinfo_pb2.file_entry]) -> Mapping[int, list[fdinfo_pb2.file_entry]]:
    """The open files of memfds."""
    found = defaultdict(list)
    for file in files:
        if file.type == fdinfo_pb2.MEMFD:
            found[file.memfd.inode_id].append(file)
    return found


def _split_mapped(
    images: Path, files: list[fdinfo_pb2.file_entry], stored: Container[int]
) -> list[fdinfo_pb2.file_entry]:
    """Have the mappings be of open files of their own, one for each access mode, and return these.

    CRIU takes for a mapping any open file of the same memfd that it has met before, that of a descriptor with another
    mode and a position, too (criu/file-ids.c, 4.2), which it opens itself as the mapping needs it.
    """
    inodes = {file.id: file.memfd.inode_id for file in files if file.type == fdinfo_pb2.MEMFD}
    made: dict[tuple[int, int], fdinfo_pb2.file_entry] = {}
    next_id = max(file.id for file in files) + 1
    for path in images.glob("mm-*.img"):
        content = read(path)
        spaces = [mm_pb2.mm_entry.FromString(message) for message in entries(content)]
        vmas = (vma for space in spaces for vma in space.vmas)
        memfds = [vma for vma in vmas if vma.status & _VMA_MEMFD and inodes.get(vma.shmid) in stored]
        for vma in memfds:
            kind = inodes[vma.shmid], vma.fdflags & os.O_ACCMODE
            if kind not in made:
                inode, flags = kind
                file = memfd_pb2.memfd_file_entry(id=next_id, flags=flags, pos=0, fown=_NOBODY, inode_id=inode)
                made[kind] = fdinfo_pb2.file_entry(type=fdinfo_pb2.MEMFD, id=next_id, memfd=file)
                next_id += 1
            vma.shmid = made[kind].id
        if memfds:
            replace(path, content[:HEADER_BYTES], [space.SerializeToString() for space in spaces])
    return list(made.values())


def _is_plain(file: memfd_pb2.memfd_file_entry) -> bool:
    """Whether a descriptor that was only opened is all there is to it."""
    return file.flags & ~_O_LARGEFILE in (os.O_RDONLY, os.O_RDWR) and not file.fown.pid


def _dress(descriptor: int, inode: memfd_pb2.memfd_inode_entry) -> None:
    os.ftruncate(descriptor, inode.size)
    os.fchown(descriptor, inode.uid, inode.gid)
    if inode.HasField("mode"):
        os.fchmod(descriptor, inode.mode & 0o7777)


def _read_inodes(path: Path) -> list[memfd_pb2.memfd_inode_entry]:
    try:
        content = read(path)
    except FileNotFoundError:
        return []
    return [memfd_pb2.memfd_inode_entry.FromString(message) for message in entries(content)]


def _read_files(path: Path) -> tuple[bytes, list[fdinfo_pb2.file_entry]]:
    content = read(path)
    return content[:HEADER_BYTES], [fdinfo_pb2.file_entry.FromString(message) for message in entries(content)]


def _system_v_ids(path: Path) -> Iterator[int]:
    for message in entries(read(path)):
        yield ipc_shm_pb2.ipc_shm_entry.FromString(message).desc.id


def _has_pages(images: Path, number: int) -> bool:
    """Whether CRIU has dumped the contents itself: it knew the object and the source did not."""
    path = images / f"pagemap-shmem-{number}.img"
    return path.exists() and len(list(entries(read(path)))) > 1


def _write_pages(images: Path, number: int, descriptor: int) -> None:
    """The object's contents as CRIU's images, beginning from those without any that CRIU has written."""
    path = images / f"pagemap-shmem-{number}.img"
    try:
        content = read(path)
    except FileNotFoundError:
        return  # of no size
    messages = list(entries(content))
    if len(messages) != 1:
        return
    pages = images / f"pages-{pagemap_pb2.pagemap_head.FromString(messages[0]).pages_id}.img"
    size = os.fstat(descriptor).st_size
    output = os.open(pages, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        for data in extents.sought(descriptor, size):
            whole = Range(data.start, -(-data.end // PAGE_BYTES) * PAGE_BYTES)
            for part in extents.pieces([whole], _LARGEST_ENTRY_BYTES):
                count = part.length // PAGE_BYTES
                entry = pagemap_pb2.pagemap_entry(
                    vaddr=part.start, nr_pages=count, compat_nr_pages=count, flags=_PRESENT
                )
                messages.append(entry.SerializeToString())
                _copy(descriptor, part, output)
    finally:
        os.close(output)
    replace(path, content[:HEADER_BYTES], messages)


def _copy(source: int, part: Range, output: int) -> None:
    for piece in extents.pieces([part], _PIECE_BYTES):
        data = os.pread(source, piece.length, piece.start).ljust(piece.length, b"\0")
        if os.write(output, data) != len(data):
            raise ExecutionError("the folder of CRIU's images is full")
