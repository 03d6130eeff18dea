"""A ploop folder as one disk: the deltas of a chain over each other, the newest that has a cluster decides."""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from blockdev import extents
from blockdev.extents import Range
from blockdev.formats import descriptor
from blockdev.formats.delta import Delta, is_delta, read_delta
from blockdev.formats.descriptor import DeltaFile
from blockdev.formats.disk import RawDisk, check_size, open_file, read_exactly
from blockdev.formats.errors import FormatError

# All tables of a chain together: each entry takes four bytes of memory.
MOST_ENTRIES = 1 << 26


class PloopDisk:
    """Deltas from the lowest to the newest, over a plain file if there is one. Descriptors stay the caller's."""

    def __init__(self, deltas: list[Delta], plain: RawDisk | None, cluster_bytes: int, size_bytes: int) -> None:
        self._deltas = list(reversed(deltas))
        self._plain = plain
        self._cluster_bytes = cluster_bytes
        self._size_bytes = size_bytes

    @property
    def size_bytes(self) -> int:
        return self._size_bytes

    def read(self, offset: int, length: int) -> bytes:
        if offset < 0 or offset + length > self._size_bytes:
            raise FormatError(f"bytes {offset} to {offset + length} are not on the disk, which has {self._size_bytes}")
        step = self._cluster_bytes if self._deltas else max(1, length)
        found = [self._read(piece) for piece in extents.pieces([Range(offset, offset + length)], step)]
        return b"".join(found)

    def ranges(self, start: int, end: int) -> Iterator[Range]:
        end = min(end, self._size_bytes)
        if not self._deltas:
            # The size of its clusters is only the descriptor's word.
            yield from () if self._plain is None else self._plain.ranges(start, end)
            return
        pending: Range | None = None
        for piece in extents.pieces([Range(start, end)], self._cluster_bytes):
            cluster = piece.start // self._cluster_bytes
            if any(delta.offset(cluster) is not None for delta in self._deltas):
                parts: Iterator[Range] = iter((piece,))
            elif self._plain is not None:
                parts = self._plain.ranges(piece.start, piece.end)
            else:
                continue
            for part in parts:
                if pending is not None and pending.end == part.start:
                    pending = Range(pending.start, part.end)
                else:
                    if pending is not None:
                        yield pending
                    pending = part
        if pending is not None:
            yield pending

    def _read(self, piece: Range) -> bytes:
        cluster, within = divmod(piece.start, self._cluster_bytes)
        for delta in self._deltas:
            at = delta.offset(cluster)
            if at is not None:
                return read_exactly(delta.descriptor, at + within, piece.length, delta.name)
        if self._plain is None:
            return bytes(piece.length)
        available = max(0, min(piece.end, self._plain.size_bytes) - piece.start)
        return (self._plain.read(piece.start, available) if available else b"").ljust(piece.length, b"\0")


@contextmanager
def opened(folder: Path, snapshot: str = "") -> Iterator[PloopDisk]:
    """The disk of a folder with DiskDescriptor.xml, as it is now or as it was at a snapshot. Raises FormatError."""
    with ExitStack() as resources:
        try:
            top = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise FormatError(f"{folder} cannot be opened: {error.strerror}") from error
        resources.callback(os.close, top)
        file = open_file(descriptor.FILE, top)
        resources.callback(os.close, file)
        length = min(os.fstat(file).st_size, descriptor.LARGEST_BYTES + 1)
        described = descriptor.parse(read_exactly(file, 0, length, descriptor.FILE))
        chain = described.chain(snapshot)
        opened_files: list[tuple[DeltaFile, int]] = []
        for delta in chain:
            number = open_file(delta.file, top)
            resources.callback(os.close, number)
            opened_files.append((delta, number))
        newest = not snapshot or descriptor.parse_guid(snapshot) == described.top
        yield _assemble(opened_files, described.cluster_bytes, described.size_bytes if newest else None)


@contextmanager
def opened_delta(path: Path) -> Iterator[PloopDisk]:
    """The disk of a single delta that stands for itself. Raises FormatError."""
    file = open_file(str(path))
    try:
        head = os.pread(file, 16, 0)
        if not is_delta(head):
            raise FormatError(f"{path} is no ploop image: it begins with {head!r}")
        delta = read_delta(file, os.fstat(file).st_size, path.name)
        yield PloopDisk([delta], None, delta.cluster_bytes, delta.size_bytes)
    finally:
        os.close(file)


def _assemble(files: list[tuple[DeltaFile, int]], cluster_bytes: int, described_bytes: int | None) -> PloopDisk:
    """The disk is as large as its newest delta says; for the newest state the descriptor has to say the same."""
    plain: RawDisk | None = None
    deltas: list[Delta] = []
    for file, number in files:
        if file.is_plain:
            plain = RawDisk(number, file.file)
            continue
        delta = read_delta(number, os.fstat(number).st_size, file.file)
        if delta.cluster_bytes != cluster_bytes:
            raise FormatError(f"{file.file} has clusters of {delta.cluster_bytes} bytes, the disk of {cluster_bytes}")
        deltas.append(delta)
        if sum(len(each.entries) for each in deltas) > MOST_ENTRIES:
            raise FormatError(f"the tables of {len(files)} deltas are too large to be real")
    if cluster_bytes <= 0:
        raise FormatError("the disk has clusters without length")
    size_bytes = deltas[-1].size_bytes if deltas else plain.size_bytes if plain else 0
    check_size(size_bytes, files[-1][0].file)
    if described_bytes is not None and not abs(described_bytes - size_bytes) < cluster_bytes:
        raise FormatError(
            f"{descriptor.FILE} gives the disk {described_bytes} bytes, {files[-1][0].file} gives it {size_bytes}"
        )
    return PloopDisk(deltas, plain, cluster_bytes, size_bytes)
