"""Writes seen by soft-dirty bits: /proc/PID/clear_refs and bit 55 of /proc/PID/pagemap, where the kernel has them.

Documented in the kernel's Documentation/admin-guide/mm/soft-dirty.rst. Telling and clearing are two steps: what a
running process writes between them would be lost, so it must not run meanwhile. A new mapping is soft-dirty as a whole.
"""

import mmap
import os
from collections.abc import Sequence

from blockdev.extents import Range
from migrator.memory.errors import ProcessGone
from migrator.memory.mappings import Mapping
from migrator.memory.own import address_of
from migrator.memory.pagemap import ENTRY_SOFT_DIRTY, PAGE_BYTES, SOFT_DIRTY, Pagemap
from migrator.memory.watching import Scan, Watch, addresses

_CLEAR = b"4"


class SoftDirtyWatch:
    """One process. The first look finds everything."""

    def __init__(self, pid: int) -> None:
        self._pid, self._cleared = pid, False

    def scan(self, source: Pagemap, areas: Sequence[Mapping], populated: list[Range] | None = None) -> Scan:
        """See Watch."""
        result = Scan()
        for area in areas:
            result.add(source.populated(area), SOFT_DIRTY, all_written=not self._cleared)
        return result

    def scan_shared(self, source: Pagemap, area: Mapping) -> list[Range]:
        """See Watch."""
        found = source.populated(area)
        return addresses([region for region in found if not self._cleared or region.categories & SOFT_DIRTY])

    def finish(self) -> None:
        """Clear the bits."""
        clear(self._pid)
        self._cleared = True

    def close(self) -> None:
        """Bits that are set or not matter to nobody else."""


class SoftDirty:
    """The method."""

    name = "soft-dirty"
    needs_pause = True
    tells_all = False

    def watch(self, pid: int, *, running: bool) -> Watch:
        """See Method."""
        return SoftDirtyWatch(pid)


def clear(pid: int) -> None:
    """Forget what a process wrote. Raises ProcessGone."""
    try:
        descriptor = os.open(f"/proc/{pid}/clear_refs", os.O_WRONLY | os.O_CLOEXEC)
    except (FileNotFoundError, ProcessLookupError) as error:
        raise ProcessGone(f"process {pid} is gone") from error
    try:
        os.write(descriptor, _CLEAR)
    except ProcessLookupError as error:
        raise ProcessGone(f"process {pid} is gone") from error
    finally:
        os.close(descriptor)


def probe() -> str | None:
    """None if the kernel keeps these bits, else why not: a page just written has its bit set."""
    with mmap.mmap(-1, PAGE_BYTES, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as page, Pagemap(os.getpid()) as source:
        page[0] = 1
        address = address_of(page)
        (entry,) = source.entries(address, address + PAGE_BYTES)
    if entry & ENTRY_SOFT_DIRTY:
        return None
    return "the kernel keeps no soft-dirty bits (CONFIG_MEM_SOFT_DIRTY)"
