"""Writes seen by protecting pages: asynchronous userfaultfd, and PAGEMAP_SCAN, which tells and protects in one step.

A mapping that is new, was moved, or came with exec or fork is not registered, which the scan says (EPERM): all that is
populated in it counts as written, and it is registered. Linux 6.7.
"""

import contextlib
import errno
import mmap
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from blockdev.extents import Range, intersect, merge, subtract
from migrator.errors import MigratorError
from migrator.memory import injection, machine, pagemap, userfault
from migrator.memory.everything import Everything
from migrator.memory.mappings import Mapping
from migrator.memory.own import address_of
from migrator.memory.pagemap import PAGE_BYTES, Pagemap, Region, Wanted
from migrator.memory.userfault import agree, register, unregister
from migrator.memory.watching import MemoryReplaced, Scan, Watch, addresses

# A mapping that is worth a look of its own, which is shorter where no file is mapped.
_LARGE_BYTES = 1 << 20
# Closer to each other than this, two parts are looked at in one go.
_NEAR_BYTES = 1 << 20
_YAMA = Path("/proc/sys/kernel/yama/ptrace_scope")
_YAMA_FORBIDS = 3


class WriteProtectWatch:
    """One process, with the userfaultfd taken out of it."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        # Private mappings at the last look. One that is registered but was none of these then, was taken for the shared
        # one that it has replaced in the middle of a look.
        self._looked_at: list[Range] = []
        # These, as the caller gave them, and their rows now that all of them are known.
        self._areas: Sequence[Mapping] = ()
        self._rows: list[_Row] = []

    def scan(self, source: Pagemap, areas: Sequence[Mapping], populated: list[Range] | None = None) -> Scan:
        """See Watch."""
        rows = self._rows if areas is self._areas else self._new_rows(areas)
        found = [self._known(source, row, populated) if row.is_known else None for row in rows]
        self._register_rows(
            [area for row, known in zip(rows, found, strict=True) if known is None for area in row.areas]
        )
        result = Scan()
        for row, known in zip(rows, found, strict=True):
            if known is None:
                for area in row.areas:
                    result.add(self._new(source, area, row.wanted), all_written=True)
            else:
                result.extend(known)
        return result

    def _new_rows(self, areas: Sequence[Mapping]) -> list["_Row"]:
        unknown = subtract([Range(area.start, area.end) for area in areas], self._looked_at)
        rows = list(_rows(areas, unknown))
        self._rows = list(_rows(areas, [])) if unknown else rows
        self._areas, self._looked_at = areas, merge(Range(area.start, area.end) for area in areas)
        return rows

    def scan_shared(self, source: Pagemap, area: Mapping) -> list[Range]:
        """See Watch."""
        try:
            return addresses(source.scan(area.start, area.end, pagemap.SHARED_WRITTEN, protect=True))
        except PermissionError:
            return addresses(self._new(source, area, pagemap.SHARED))

    def finish(self) -> None:
        """What was found was protected in the same step."""

    def close(self) -> None:
        """The kernel takes the protection away."""
        os.close(self._descriptor)

    def _known(self, source: Pagemap, row: "_Row", populated: list[Range] | None) -> Scan | None:
        """What is in a row of mappings; None if one is not registered. By then others of the row may have been
        protected anew: what was written in them is not known any more."""
        start, end = row.areas[0].start, row.areas[-1].end
        found = Scan()
        try:
            if populated is None or not row.is_large:
                found.add(source.scan(start, end, row.wanted, protect=True))
                return found
            # Seven times as fast: only where pages are not protected, or not there, does the kernel look at them.
            unprotected = source.scan(start, end, pagemap.UNPROTECTED, registered=True)
            for part in merge(Range(first, min(last + _NEAR_BYTES, end)) for first, last, _ in unprotected):
                found.add(source.scan(part.start, part.end, row.wanted, protect=True))
        except PermissionError:
            return None
        found.populated = merge([*intersect(populated, [Range(start, end)]), *found.populated])
        return found

    def _register_rows(self, areas: Sequence[Mapping]) -> None:
        """Register mappings, adjoining ones together: mremap(2) fails for a row of which only a part is registered,
        and may have moved a part of it (Linux 6.17)."""
        for start, end in merge(Range(area.start, area.end) for area in areas):
            with contextlib.suppress(OSError):  # what it is about comes out when they are registered one by one
                register(self._descriptor, start, end)

    def _new(self, source: Pagemap, area: Mapping, wanted: Wanted) -> list[Region]:
        """Register a mapping, and all that is populated in it, protected where that is possible.

        What mremap(2) joins to a registered mapping takes the registration away from all of it, and leaves the pages
        marked as protected (Linux 6.18; before 6.13 what it moves, too). Such a page can be written unseen once it has
        been written without a registration: taking one away, there, takes the marks away.
        """
        try:
            register(self._descriptor, area.start, area.end)
            found = list(source.scan(area.start, area.end, wanted, protect=True))
            if not all(region.categories & pagemap.WRITTEN for region in found):
                unregister(self._descriptor, area.start, area.end)
                register(self._descriptor, area.start, area.end)
                found = list(source.scan(area.start, area.end, wanted, protect=True))
            return found
        except OSError as error:
            if error.errno in (errno.ENOMEM, errno.ESRCH):
                raise MemoryReplaced from error
            # Unmapped meanwhile (EINVAL), of a kind that cannot be protected (EINVAL, EPERM), another's (EBUSY).
            if error.errno not in (errno.EINVAL, errno.EPERM, errno.EBUSY):
                raise
            # As new the next time, too: marks may be left on it, and what another protects must not be taken from it.
            self._looked_at, self._areas = subtract(self._looked_at, [Range(area.start, area.end)]), ()
            return list(source.scan(area.start, area.end, wanted))


class WriteProtect:
    """The method. A process first seen frozen cannot be made to open a userfaultfd: all of it counts as written, and
    it is taken up when it runs."""

    name = "write-protect"
    needs_pause = False
    tells_all = False

    def __init__(self) -> None:
        # At which a process forked in the wrong moment may have inherited the descriptor.
        self._numbers_inside: set[int] = set()

    def watch(self, pid: int, *, running: bool) -> Watch:
        """See Method."""
        if not running:
            return Everything(temporary=True)
        injected = injection.open_userfaultfd(pid, self._numbers_inside)
        self._numbers_inside.add(injected.number_inside)
        try:
            agree(injected.descriptor)
        except BaseException:
            os.close(injected.descriptor)
            raise
        return WriteProtectWatch(injected.descriptor)


class _Row(NamedTuple):
    """Mappings without a gap between them. A look costs as much as some hundred pages, and a program has hundreds."""

    areas: list[Mapping]
    is_known: bool
    wanted: Wanted

    @property
    def is_large(self) -> bool:
        return self.wanted == pagemap.ANONYMOUS


def _rows(areas: Sequence[Mapping], unknown: list[Range]) -> Iterator[_Row]:
    row: list[Mapping] = []
    for area in areas:
        known = not _has_part_of(area, unknown)
        alone = not known or (area.is_anonymous and area.end - area.start >= _LARGE_BYTES)
        if row and (alone or row[-1].end != area.start):
            yield _Row(row, is_known=True, wanted=pagemap.PRIVATE)
            row = []
        if alone:
            yield _Row([area], known, pagemap.ANONYMOUS if area.is_anonymous else pagemap.PRIVATE)
        else:
            row.append(area)
    if row:
        yield _Row(row, is_known=True, wanted=pagemap.PRIVATE)


def _has_part_of(area: Mapping, ranges: list[Range]) -> bool:
    return any(part.start < area.end and area.start < part.end for part in ranges)


def probe() -> str | None:
    """None if it works here, else why not: tried on a page of this process, which is not traced for it."""
    try:
        machine.this()
        if _YAMA.exists() and int(_YAMA.read_text()) >= _YAMA_FORBIDS:
            return f"{_YAMA} forbids ptrace until the next boot"
        descriptor = userfault.create()
    except (MigratorError, OSError) as error:
        return str(error)
    try:
        return _try(descriptor)
    except OSError as error:
        return f"asynchronous write protection needs Linux 6.7: {error}"
    finally:
        os.close(descriptor)


def _try(descriptor: int) -> str | None:
    agree(descriptor)
    with mmap.mmap(-1, PAGE_BYTES, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as page, Pagemap(os.getpid()) as source:
        page[0] = 1
        address = address_of(page)
        register(descriptor, address, address + PAGE_BYTES)
        seen = []
        for value in (None, 2):
            if value is not None:
                page[0] = value
            found = source.scan(address, address + PAGE_BYTES, pagemap.PRIVATE_WRITTEN, protect=True)
            seen.append(len(list(found)))
            seen.append(len(list(source.scan(address, address + PAGE_BYTES, pagemap.PRIVATE_WRITTEN))))
        userfault.unregister(descriptor, address, address + PAGE_BYTES)
    return None if seen == [1, 0, 1, 0] else f"the kernel does not report writes as expected: {seen}"
