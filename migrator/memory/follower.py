"""The MemoryTracker: follows the processes of a container by one method of seeing writes."""

import os
import stat
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Self

from blockdev import extents
from blockdev.blocks import Batch
from blockdev.extents import Range
from migrator.memory import descriptors, mappings, processes, reading
from migrator.memory.errors import NotNow, ProcessGone, Untrackable
from migrator.memory.everything import Everything
from migrator.memory.mappings import Mapping
from migrator.memory.pagemap import Pagemap
from migrator.memory.processes import ProcessKey
from migrator.memory.shared import Change, ObjectKey, SharedObject, is_memory, key_of
from migrator.memory.tracker import Collected, Moment, Pids, ProcessChange, SharedChange
from migrator.memory.watching import MemoryReplaced, Method, Scan, Watch

# exec between two tries, and again, and again.
_TRIES = 3
# Of all objects: page tables for it are 16 MiB of this process' memory, if there is something in every part of it.
_MOST_MAPPED_BYTES = 8 << 30


@dataclass(frozen=True)
class _Layout:
    """The mappings of a process, and the text that they were read from: mostly it is the same at the next look."""

    text: bytes
    areas: list[Mapping]
    private: list[Mapping]
    shared: list[Mapping]
    aio_rings: list[Mapping]

    @classmethod
    def of(cls, text: bytes) -> Self:
        areas = mappings.parse(text)
        return cls(
            text,
            areas,
            [area for area in areas if area.is_private],
            [area for area in areas if area.is_shared],
            [area for area in areas if area.is_aio_ring],
        )


_NO_LAYOUT = _Layout(b"", [], [], [], [])


@dataclass
class _Followed:
    """A process, what was there at the last look, and whether looks since a paused one may have missed something."""

    watch: Watch
    layout: _Layout = _NO_LAYOUT
    populated: list[Range] = field(default_factory=list)
    may_have_missed: bool = False
    # Since a STOPPED look.
    stands_still: bool = False
    # What it has open and mapped, if it has stood still since that was asked.
    opened: descriptors.Open | None = None
    mapped: _Layout | None = None
    # What `collect_ahead` has told of, and the LAST collect has not to look at.
    ahead: "_Found | None" = None
    direct_devices: set[int] = field(default_factory=set)


@dataclass
class _Found:
    """What one process contributes to a collect."""

    scan: Scan
    shared: dict[ObjectKey, list[Range]]
    direct_io: bool


class Follower:
    """See MemoryTracker. `pids` gives the pids (thread group ids) of the container as they are now."""

    def __init__(self, pids: Pids, method: Method) -> None:
        self._pids, self._method = pids, method
        self._followed: dict[ProcessKey, _Followed] = {}
        self._objects: dict[ObjectKey, SharedObject] = {}
        # What page tables said of them when the container was stopped, in case that it goes on.
        self._unseen: dict[ObjectKey, list[Range]] = defaultdict(list)
        # With the container stopped, those that `compare` has told of.
        self._compared: set[ObjectKey] = set()
        # Device numbers whose files are no memory: disks, and devices that are mapped.
        self._no_memory: set[int] = set()

    @property
    def name(self) -> str:
        return self._method.name

    @property
    def needs_pause(self) -> bool:
        return self._method.needs_pause

    def start(self) -> None:
        """See MemoryTracker."""
        for process in self._processes():
            if process not in self._followed:
                try:
                    self._followed[process] = _Followed(self._method.watch(process.pid, running=True))
                except (ProcessGone, NotNow):
                    continue  # a collect tries again

    def collect(self, moment: Moment = Moment.RUNNING) -> Collected:
        """See MemoryTracker."""
        result = Collected()
        candidates: dict[ObjectKey, list[Range]] = defaultdict(list)
        alive = set()
        for process in self._processes():
            try:
                followed = self._follow(process, moment, result)
                ahead, followed.ahead = followed.ahead, None
                found = ahead if ahead and moment is Moment.LAST else self._look(process, followed, moment, result)
            except ProcessGone:
                continue
            alive.add(process)
            for key, ranges in chain(found.shared.items(), ahead.shared.items() if ahead else ()):
                candidates[key].extend(ranges)
            result.processes.append(change := _change(process, followed, found, moment))
            # Of one that is not watched yet page tables say nothing.
            if moment is Moment.STOPPED and change.watched:
                result.unseen.extend(chain.from_iterable(found.shared.values()))
            if found.direct_io:
                result.direct_io.append(process)
        for process in [process for process in self._followed if process not in alive]:
            self._followed.pop(process).watch.close()
            result.ended.append(process)
        self._look_at_objects(candidates, moment, result)
        return result

    def drain(self, seconds: float = 1.0) -> list[str]:
        """See MemoryTracker. A read by the process itself has ended when it is frozen; AIO and io_uring have not."""
        devices: set[int] = set()
        for process in self._processes():
            followed = self._followed.get(process)
            try:
                layout = _layout(process.pid, followed.layout if followed else _NO_LAYOUT)
                opened = descriptors.look(process.pid, direct=False)
                if followed:
                    followed.opened, followed.mapped = opened, layout
                if layout.aio_rings or opened.io_uring:
                    devices |= descriptors.look(process.pid, direct=True).direct_devices
                    # Its files may have been closed since.
                    devices |= followed.direct_devices if followed else set()
            except ProcessGone:
                continue
        return descriptors.wait_drained(devices, seconds)

    def read(self, process: ProcessKey, ranges: Iterable[Range]) -> Iterator[Batch]:
        """See MemoryTracker."""
        return reading.read_process(process, ranges)

    def read_shared(self, key: ObjectKey, ranges: Iterable[Range]) -> Iterator[Batch]:
        """See MemoryTracker."""
        return self._objects[key].read(ranges)

    def populated(self, process: ProcessKey) -> list[Range]:
        """See MemoryTracker."""
        return self._followed[process].populated

    def areas(self, process: ProcessKey) -> list[Mapping]:
        """See MemoryTracker."""
        return self._followed[process].layout.areas

    def get_ready(self) -> None:
        """See MemoryTracker."""
        room = _MOST_MAPPED_BYTES
        for item in self._objects.values():
            room -= item.get_ready(room)

    def compare(self) -> list[SharedChange]:
        """See MemoryTracker."""
        self._unseen.clear()
        self._compared = set(self._objects)
        return [self._told(item, item.look([], at_all=True)) for item in self._objects.values()]

    def collect_ahead(self, process: ProcessKey) -> ProcessChange | None:
        """See MemoryTracker."""
        followed = self._followed.get(process)
        if followed is None or not followed.stands_still:
            return None
        try:
            found = self._look(process, followed, Moment.LAST, Collected())
        except ProcessGone:
            return None
        followed.ahead = replace(found, scan=Scan(found.scan.populated))
        return _change(process, followed, found, Moment.LAST)

    def status(self, key: ObjectKey) -> os.stat_result:
        """See MemoryTracker."""
        return os.fstat(self._objects[key].descriptor)

    def close(self) -> None:
        """See MemoryTracker."""
        for followed in self._followed.values():
            followed.watch.close()
        for item in self._objects.values():
            item.close()
        self._followed.clear()
        self._objects.clear()

    def _processes(self) -> list[ProcessKey]:
        found = []
        for pid in sorted(set(self._pids())):
            try:
                found.append(processes.key(pid))
            except ProcessGone:
                continue
        return found

    def _follow(self, process: ProcessKey, moment: Moment, result: Collected) -> _Followed:
        followed = self._followed.get(process)
        if followed is None:
            followed = self._followed[process] = _Followed(self._watch(process, moment, result))
        elif isinstance(followed.watch, Everything) and followed.watch.temporary and moment.is_running:
            followed.watch = self._watch(process, moment, result)
        return followed

    def _watch(self, process: ProcessKey, moment: Moment, result: Collected) -> Watch:
        """Of a process that cannot be watched now, or not any more, all is told."""
        try:
            return self._method.watch(process.pid, running=moment.is_running)
        except (NotNow, Untrackable) as error:
            result.notes.append(f"all memory of process {process.pid} counts as written: {error}")
            return Everything(temporary=True)

    def _look(self, process: ProcessKey, followed: _Followed, moment: Moment, result: Collected) -> _Found:
        if moment.is_running or followed.opened is None:
            followed.opened = descriptors.look(process.pid, direct=moment.is_running)
        before = followed.opened
        for _ in range(_TRIES):
            try:
                scan, shared, aio = self._scan(process, followed, before, moment)
                break
            except MemoryReplaced:
                followed.watch.close()
                followed.watch = Everything(temporary=True)
                followed.watch = self._watch(process, moment, result)
            except ProcessGone:
                if not processes.is_alive(process):
                    raise
        else:
            raise ProcessGone(f"process {process.pid} is ending, or calls exec over and over")
        # Files may have been opened just before a read that was in flight, or closed just after it.
        after = descriptors.look(process.pid, direct=True) if moment.is_running else before
        followed.direct_devices |= before.direct_devices | after.direct_devices
        return _Found(scan, shared, aio or before.writes_past_page_tables() or after.writes_past_page_tables())

    def _scan(
        self, process: ProcessKey, followed: _Followed, opened: descriptors.Open, moment: Moment
    ) -> tuple[Scan, dict[ObjectKey, list[Range]], bool]:
        # Without a pause a method that needs one leaves its marks for the next time.
        watch = Everything() if self.needs_pause and moment.is_running else followed.watch
        shared: dict[ObjectKey, list[Range]] = defaultdict(list)
        with Pagemap(process.pid) as source:
            # Also in the last look: registering may have joined mappings since, and CRIU has seen them so.
            known, asked, followed.mapped = followed.layout, followed.mapped, None
            layout = asked if asked and not moment.is_running else _layout(process.pid, known)
            # By path of the mapping as it is now: registering may join it to its neighbour.
            objects = [(area, self._object(process.pid, area, moment)) for area in layout.shared]
            stood_still = moment is Moment.LAST and followed.stands_still and layout is known
            may_be_short = stood_still or moment is Moment.HURRIED
            scan = watch.scan(source, layout.private, followed.populated if may_be_short else None)
            followed.layout = layout
            if layout.aio_rings:
                scan = _join(scan, Everything().scan(source, layout.aio_rings))
            for area, item in objects:
                if item is not None:
                    found = watch.scan_shared(source, area)
                    move = area.offset - area.start
                    shared[item.key].extend(Range(part.start + move, part.end + move) for part in found)
            watch.finish()
        for path in opened.memfds:
            if (item := self._open(path, "", moment)) is not None:
                shared[item.key].extend(())
        return scan, shared, bool(layout.aio_rings)

    def _object(self, pid: int, area: Mapping, moment: Moment) -> SharedObject | None:
        """What a shared mapping is of, None for files of disks and for devices."""
        device = os.makedev(*area.device)
        if device in self._no_memory:
            return None
        if item := self._objects.get(key_of(device, area.inode, area.name)):
            return item
        return self._open(f"/proc/{pid}/map_files/{area.start:x}-{area.end:x}", area.name, moment)

    def _open(self, path: str, name: str, moment: Moment) -> SharedObject | None:
        try:
            status = Path(path).stat()
            if item := self._objects.get(key_of(status.st_dev, status.st_ino, name or str(Path(path).readlink()))):
                return item
            # Not to call the open function of a device's driver.
            if not stat.S_ISREG(status.st_mode):
                return None
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except (FileNotFoundError, ProcessLookupError):
            if not moment.is_running:
                raise
            return None  # unmapped meanwhile, or joined to a neighbour; the next collect finds it
        if not is_memory(descriptor):
            self._no_memory.add(status.st_dev)
            os.close(descriptor)
            return None
        # By our own descriptor: the process may have closed its own.
        item = SharedObject(descriptor, name or str(Path(f"/proc/self/fd/{descriptor}").readlink()))
        if known := self._objects.get(item.key):  # the path has come to lead to another
            item.close()
            return known
        self._objects[item.key] = item
        return item

    def _look_at_objects(self, candidates: dict[ObjectKey, list[Range]], moment: Moment, result: Collected) -> None:
        if moment is not Moment.LAST:
            self._compared.clear()
        for key in [key for key in self._objects if key not in candidates]:
            if moment is Moment.LAST:
                candidates[key] = []  # System V memory that nobody has attached is there all the same
                continue
            self._objects.pop(key).close()
            self._unseen.pop(key, None)
            result.released.append(key)
        for key, ranges in candidates.items():
            item = self._objects[key]
            if moment is Moment.STOPPED:
                self._unseen[key].extend(ranges)
                size_bytes = os.fstat(item.descriptor).st_size
                result.shared.append(SharedChange(key, item.name, size_bytes, [], []))
            elif key in self._compared:
                # CRIU may have put system calls into its code, for the moment of the comparison.
                change = item.look(extents.merge(ranges), at_all=False)
                result.shared.append(SharedChange(key, item.name, item.size_bytes, *change))
            else:
                seen = extents.merge([*self._unseen.pop(key, []), *ranges])
                result.shared.append(self._told(item, item.look(seen, at_all=moment is Moment.LAST)))

    def _told(self, item: SharedObject, change: Change) -> SharedChange:
        written = item.populated() if self._method.tells_all else change.written
        return SharedChange(item.key, item.name, item.size_bytes, written, change.gone)


def _layout(pid: int, known: _Layout) -> _Layout:
    text = mappings.text(pid)
    return known if text == known.text else _Layout.of(text)


def _change(process: ProcessKey, followed: _Followed, found: _Found, moment: Moment) -> ProcessChange:
    scan = found.scan
    gone = extents.subtract(followed.populated, scan.populated)
    followed.populated = scan.populated
    followed.stands_still = moment is Moment.STOPPED
    if not followed.stands_still:
        followed.opened = None
    written = scan.written
    if moment.is_running:
        followed.may_have_missed |= found.direct_io
    elif followed.may_have_missed:
        followed.may_have_missed, written = False, scan.populated
    watched = not (isinstance(followed.watch, Everything) and followed.watch.temporary)
    return ProcessChange(process, written, gone, watched)


def _join(scan: Scan, more: Scan) -> Scan:
    return Scan(extents.merge([*scan.populated, *more.populated]), extents.merge([*scan.written, *more.written]))
