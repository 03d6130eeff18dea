"""A process' mappings, and which of them hold memory that has to be carried (proc_pid_maps(5))."""

import functools
from pathlib import Path
from typing import NamedTuple

from migrator.memory.errors import ProcessGone

# The kernel's own: it makes them anew in the restored process.
_OF_THE_KERNEL = frozenset(("[vdso]", "[vvar]", "[vvar_vclock]", "[vsyscall]", "[uprobes]"))
_AIO_RING = "/[aio]"
# From look to look hardly any changes, and each takes 5 us.
LINES_KEPT = 1 << 16


class Mapping(NamedTuple):
    """One line of /proc/PID/maps. `device` is (major, minor)."""

    start: int
    end: int
    permissions: str
    offset: int
    device: tuple[int, int]
    inode: int
    name: str

    @property
    def is_aio_ring(self) -> bool:
        """The ring of an AIO context: the kernel writes to it past the page tables, and CRIU takes it as private."""
        return self.name.startswith(_AIO_RING)

    @property
    def is_private(self) -> bool:
        """Memory of this process alone: anonymous, or pages of a file that it has copied by writing."""
        return self.permissions[3] == "p" and self.name not in _OF_THE_KERNEL

    @property
    def is_anonymous(self) -> bool:
        """No file is mapped, so that no page can be one of a file."""
        return self.is_private and self.inode == 0

    @property
    def is_shared(self) -> bool:
        """Of an object that others may map too: shared anonymous, memfd, System V, or a file."""
        return self.permissions[3] == "s" and (self.inode != 0 or self.is_system_v) and not self.is_aio_ring

    @property
    def is_system_v(self) -> bool:
        """Of System V memory, whose inode number is its id: the first one's is 0."""
        return self.name.startswith("/SYSV")


def read(pid: int) -> list[Mapping]:
    """All of a process, in order. Raises ProcessGone."""
    return parse(text(pid))


def text(pid: int) -> bytes:
    """For `parse`. Raises ProcessGone."""
    try:
        return Path(f"/proc/{pid}/maps").read_bytes()
    except (FileNotFoundError, ProcessLookupError) as error:
        raise ProcessGone(f"process {pid} is gone") from error


def parse(lines: bytes) -> list[Mapping]:
    """All that the text of /proc/PID/maps names. Of what ends a line elsewhere the kernel escapes \\n alone."""
    return [parse_line(line) for line in lines.decode(errors="surrogateescape").split("\n") if line]


@functools.lru_cache(LINES_KEPT)
def parse_line(line: str) -> Mapping:
    """One line of /proc/PID/maps; a name keeps the kernel's escapes and its ` (deleted)`."""
    fields = line.split(maxsplit=5)
    start, end = fields[0].split("-")
    major, minor = fields[3].split(":")
    return Mapping(
        int(start, 16),
        int(end, 16),
        fields[1],
        int(fields[2], 16),
        (int(major, 16), int(minor, 16)),
        int(fields[4]),
        fields[5] if len(fields) > 5 else "",
    )
