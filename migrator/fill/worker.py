"""The process that answers page faults and fills. It may die at any time: the keeper then starts another."""

import ctypes
import gc
import mmap
import os
import select
import socket
import time
from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path

from blockdev import extents
from migrator.fill import messages, missing, userfault
from migrator.fill import store as page_store
from migrator.fill.images import lazy_segments
from migrator.fill.journal import Change, Journal
from migrator.fill.messages import Kind, Packet
from migrator.fill.missing import Marks, Pipes
from migrator.fill.spaces import Segment, Space
from migrator.fill.store import PAGE_BYTES
from migrator.fill.userfault import Event, Message, Outcome

# A fault waits for at most one of these.
_CHUNK_BYTES = 1 << 20
# What is filled next around a page that was asked for.
_AROUND_BYTES = 64 << 10
_PATIENCE_S = 10.0
# As far as marks of missing pages are looked at in one go.
_AHEAD_BYTES = 64 << 20
_ZERO_PAGE = bytes(PAGE_BYTES)
# After the restore only faults are answered for so long: until the tasks run, others need the processors.
_GRACE_S = 0.02
# Without anything to map, nothing tells that a process has ended.
_IDLE_S = 0.2
# Of user space: all that a userfaultfd may have waiters in.
_LOWEST, _HIGHEST = 1 << 16, {"x86_64": (1 << 47) - PAGE_BYTES, "aarch64": 1 << 48}


class LostChild(Exception):
    """The userfaultfd of a forked child died with the worker that had just read of it."""


class Worker:
    """One incarnation, made in the keeper and run in a process forked from it.

    `tasks` are the spaces known so far, by number: the pid whose images say what is left, None for a child that was
    forked since the restore. `descriptors` are those which are not closed.
    """

    def __init__(
        self, images: Path, store: Path, journal: Journal, keeper: socket.socket,
        tasks: Mapping[int, int | None], descriptors: Mapping[int, int], *, restored: bool,
    ) -> None:  # fmt: skip
        self._images = images
        self._store = store
        self._journal = journal
        self._keeper: socket.socket | None = keeper
        self._restored = restored
        self._spaces: dict[int, Space] = {}
        self._descriptors: dict[int, int] = {}
        self._numbers: dict[int, int] = {}
        self._files: dict[int, int | None] = {}
        self._sharers: dict[int, int] = {}
        # Of post-copy: what is missing by owner, and who waits for it, by space and address.
        self._marks: dict[int, Marks] = {}
        self._pipes: Pipes | None = None
        self._awaited: set[tuple[int, int]] = set()
        self._starved = False
        self._epoll = select.epoll()
        self._epoll.register(keeper.fileno(), select.EPOLLIN)
        self._postponed: list[tuple[int, int]] = []
        self._wanted: deque[tuple[int, int]] = deque(maxlen=256)
        self._used: list[tuple[int, int, int]] = []
        self._changing = False
        self._short_since: float | None = None
        # When it begins to fill, by giving back what is not left to it.
        self._fills_from = 0.0
        self._begins = False
        self._memory = mmap.mmap(-1, _CHUNK_BYTES)
        self._buffer = memoryview(self._memory)
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        self._recover(tasks, descriptors)

    def run(self) -> None:
        """Returns when everything is filled. Raises LostChild, and OSError for what the kernel should not answer."""
        gc.disable()
        while not (self._restored and not self._spaces):
            found = self._epoll.poll(self._may_wait_s())
            for descriptor, _ in found:
                if descriptor in self._numbers:
                    self._answer(self._numbers[descriptor])
                elif self._pipes is not None and descriptor == self._pipes.news:
                    self._answer_awaited(again=self._pipes.hear())
                elif self._keeper is not None:  # unless its end was seen since
                    self._listen()
            if self._starved and not found:
                # Who brings pages may have died between the last of them and the news.
                self._answer_awaited()
                self._close_ended()
            self._starved = False
            self._changing = False
            self._answer_postponed()
            if self._restored and time.monotonic() >= self._fills_from:
                self._fill_some()

    def _may_wait_s(self) -> float | None:
        if self._postponed:
            return 0
        if self._changing:
            return 0.001
        if self._starved:
            return _IDLE_S
        return max(0, self._fills_from - time.monotonic()) if self._restored else None

    # What the keeper says

    def _listen(self) -> Packet | None:
        assert self._keeper is not None
        packet = messages.receive(self._keeper)
        if packet is None:
            # Without its keeper it goes on: nothing is lost as long as one of them lives. All that can come has come.
            self._epoll.unregister(self._keeper.fileno())
            self._keeper = None
            self._restored = True
        elif packet.kind == Kind.TASK and packet.descriptor is not None:
            self._add(packet.space, packet.descriptor, Space(packet.number, lazy_segments(self._images, packet.number)))
            self._next = packet.space + 1
        elif packet.kind == Kind.RESTORED:
            self._restored = self._begins = True
            self._fills_from = time.monotonic() + _GRACE_S
        return packet

    def _tell(self, packet: Packet) -> bool:
        return self._keeper is not None and messages.send(self._keeper, packet)

    def _add(self, number: int, descriptor: int, space: Space) -> None:
        self._spaces[number] = space
        self._descriptors[number] = descriptor
        self._numbers[descriptor] = number
        owner = space.owner
        if owner not in self._files:
            self._find_marks(owner)
            # What is missing comes into it.
            create = os.O_CREAT if owner in self._marks else 0
            try:
                path = page_store.path_of(self._store, owner)
                self._files[owner] = os.open(path, os.O_RDWR | os.O_CLOEXEC | create, 0o600)
            except FileNotFoundError:
                self._files[owner] = None
        self._sharers[owner] = self._sharers.get(owner, 0) + 1
        self._epoll.register(descriptor, select.EPOLLIN)

    def _find_marks(self, owner: int) -> None:
        marks = Marks.open_if_there(missing.path_of(self._store, owner))
        if marks is None:
            return
        self._marks[owner] = marks
        if self._pipes is None:
            self._pipes = Pipes(self._store)
            self._epoll.register(self._pipes.news, select.EPOLLIN)

    def _close(self, number: int) -> None:
        """Nothing is left to do for a space. Its last descriptor frees its threads if they wait for a page of zeros."""
        space = self._spaces.pop(number)
        descriptor = self._descriptors.pop(number)
        del self._numbers[descriptor]
        self._epoll.unregister(descriptor)
        self._tell(Packet(Kind.CLOSED, number))
        os.close(descriptor)
        self._sharers[space.owner] -= 1
        if not self._sharers[space.owner]:
            file = self._files.pop(space.owner)
            if file is not None:
                # CRIU's images have a link to it, too.
                os.ftruncate(file, 0)
                os.close(file)
                page_store.path_of(self._store, space.owner).unlink(missing_ok=True)
            if space.owner in self._marks:
                self._marks.pop(space.owner).close()
                missing.path_of(self._store, space.owner).unlink(missing_ok=True)

    # What the kernel says

    def _answer(self, number: int) -> None:
        faults = []
        for index, message in enumerate(self._journal.read(self._descriptors[number], number)):
            if message.event == Event.FAULT:
                faults.append(message.second & -PAGE_BYTES)
            else:
                self._change(index, number, message)
        self._journal.settled()
        for address in faults:
            self._fault(number, address)
        self._answer_awaited()  # what was missing may have been unmapped

    def _change(self, index: int, number: int, message: Message) -> None:
        child = 0
        if message.event == Event.FORK:
            child = self._next
            packet = Packet(Kind.FORKED, child, 0, message.first)
            if self._tell(packet):
                while (answer := self._listen()) is not None and answer.kind != Kind.TAKEN:
                    pass
        self._journal.record(index, Change(number, message, child))
        forked = _apply(self._spaces[number], message)
        if forked is not None:
            self._next += 1
            self._add(child, message.first, forked)

    def _fault(self, number: int, address: int) -> None:
        space = self._spaces.get(number)
        if space is None:
            return
        segment = space.find(address)
        if segment is None:
            outcome = self._zero(number, space, address)
        elif self._first_missing(space.owner, segment.source, PAGE_BYTES) is not None:
            assert self._pipes is not None
            self._awaited.add((number, address))
            self._pipes.want(space.owner, segment.source)
            return
        else:
            self._read(space.owner, segment.source, PAGE_BYTES)
            _, outcome = userfault.copy(self._descriptors[number], address, self._address, PAGE_BYTES)
            if outcome in (Outcome.DONE, Outcome.PRESENT):
                space.remove(address, address + PAGE_BYTES)
                self._used.append((space.owner, segment.source, segment.source + PAGE_BYTES))
                self._wanted.append((number, address & -_AROUND_BYTES))
        match outcome:
            case Outcome.PRESENT | Outcome.UNMAPPED:
                userfault.wake(self._descriptors[number], address, PAGE_BYTES)
            case Outcome.CHANGING:
                self._postponed.append((number, address))
            case Outcome.NO_MEMORY:
                self._be_patient()
                self._postponed.append((number, address))
            case Outcome.GONE:
                self._close(number)

    def _zero(self, number: int, space: Space, address: int) -> Outcome:
        """Where one page of zeros is asked for, others follow: memory is being taken into use."""
        end = (address & -_AROUND_BYTES) + _AROUND_BYTES
        for segment in space.segments_between(address, end):
            end = segment.start
            break
        _, outcome = userfault.zero(self._descriptors[number], address, end - address)
        if outcome == Outcome.UNMAPPED:
            _, outcome = userfault.zero(self._descriptors[number], address, PAGE_BYTES)
        return outcome

    def _answer_postponed(self) -> None:
        if self._postponed:
            postponed, self._postponed = self._postponed, []
            for number, address in postponed:
                self._fault(number, address)

    # What is missing

    def _first_missing(self, owner: int, source: int, length: int) -> int | None:
        marks = self._marks.get(owner)
        return None if marks is None else marks.first(source, source + length)

    def _answer_awaited(self, *, again: bool = False) -> None:
        """Those whose page is not missing any more. With `again` all the others are asked for once more."""
        for number, address in list(self._awaited):
            if again or not self._is_missing(number, address):
                self._awaited.discard((number, address))
                self._fault(number, address)

    def _is_missing(self, number: int, address: int) -> bool:
        space = self._spaces.get(number)
        segment = None if space is None else space.find(address)
        if space is None or segment is None:
            return False
        return self._first_missing(space.owner, segment.source, PAGE_BYTES) is not None

    def _close_ended(self) -> None:
        for number, space in list(self._spaces.items()):
            if space and userfault.is_gone(self._descriptors[number], space.first.start):
                self._close(number)

    # Filling

    def _fill_some(self) -> None:
        if self._begins:
            self._begins = False
            for owner in self._sharers:
                self._give_back_the_rest(owner)
        for owner, start, end in self._used:
            self._give_back(owner, start, end)
        self._used.clear()
        while self._wanted:
            number, start = self._wanted.pop()
            space = self._spaces.get(number)
            if space is not None and (left := space.segments_between(start, start + _AROUND_BYTES)):
                for segment in left:
                    self._fill(number, segment)
                return
        for number, space in self._spaces.items():
            if not space:
                self._close(number)
                return
            start, end, source = space.first
            # Not page by page as they come, which would cut what is left into as many segments.
            if self._first_missing(space.owner, source, min(end - start, _CHUNK_BYTES)) is None:
                self._fill(number, space.first)
                return
        self._starved = bool(self._spaces)

    def _fill(self, number: int, segment: Segment) -> None:
        """Map what the store has first of a segment."""
        space = self._spaces.get(number)
        if space is None:
            return
        start, end, source = segment
        if space.owner in self._marks:
            length = min(end - start, _AHEAD_BYTES)
            first = self._first_missing(space.owner, source, length)
            end = start + (length if first is None else first - source)
            if start == end:
                return
        file = self._files[space.owner]
        first = None if file is None else extents.first_data(file, source, source + end - start)
        if first is None:
            space.remove(start, end)
            return
        if first > source:
            space.remove(start, start + first - source)
            start, source = start + first - source, first
        length = min(end - start, _CHUNK_BYTES)
        self._read(space.owner, source, length)
        descriptor, at, outcome = self._descriptors[number], 0, Outcome.DONE
        for begin, stop in _with_data(self._buffer[:length]):
            done, outcome = self._map(descriptor, start + begin, self._address + begin, stop - begin)
            at = begin + done if done else at
            if begin + done < stop:
                break
        else:
            at = length
        if at:
            self._short_since = None
            space.remove(start, start + at)
            self._give_back(space.owner, source, source + at)
        match outcome:
            case Outcome.CHANGING:
                self._changing = True
            case Outcome.NO_MEMORY:
                self._be_patient()
            case Outcome.GONE:
                self._close(number)

    def _map(self, descriptor: int, address: int, source: int, length: int) -> tuple[int, Outcome]:
        """Bytes that need nothing more, and why not all of them."""
        done, outcome = userfault.copy(descriptor, address, source, length)
        while outcome == Outcome.UNMAPPED and length > PAGE_BYTES:
            # Only within one mapping: one that was split since is found by halving.
            length = max(PAGE_BYTES, length // 2 & -PAGE_BYTES)
            done, outcome = userfault.copy(descriptor, address, source, length)
        while outcome == Outcome.PRESENT and done < length:
            done += PAGE_BYTES
            if done < length:
                more, outcome = userfault.copy(descriptor, address + done, source + done, length - done)
                done += more
        return PAGE_BYTES if outcome == Outcome.UNMAPPED and not done else done, outcome

    def _be_patient(self) -> None:
        """The container's memory limit, or the host's: others may give some back. Raises OSError when it lasts."""
        now = time.monotonic()
        if self._short_since is None:
            self._short_since = now
        if now - self._short_since > _PATIENCE_S:
            raise MemoryError(f"no memory for the container's pages for {_PATIENCE_S:.0f} s")
        time.sleep(0.002)

    # The store

    def _read(self, owner: int, source: int, length: int) -> None:
        file = self._files[owner]
        read = 0 if file is None else os.preadv(file, [self._buffer[:length]], source)
        if read < length:
            self._buffer[read:length] = bytes(length - read)

    def _give_back(self, owner: int, start: int, end: int) -> None:
        file = self._files.get(owner)
        if file is not None and self._sharers[owner] == 1:
            page_store.give_back(file, start, end)

    def _give_back_the_rest(self, owner: int) -> None:
        """What is in the images, and what was thrown away in the end."""
        at = 0
        for segment in sorted(lazy_segments(self._images, owner), key=lambda segment: segment.source):
            if segment.source > at:
                self._give_back(owner, at, segment.source)
            at = segment.source + segment.end - segment.start
        self._give_back(owner, at, (1 << 63) - PAGE_BYTES)

    # After the death of another

    def _recover(self, tasks: Mapping[int, int | None], descriptors: Mapping[int, int]) -> None:
        """From the images and the journal to what is left, with all that was ever left in it: see the journal."""
        spaces = {
            number: Space(pid, lazy_segments(self._images, pid)) for number, pid in tasks.items() if pid is not None
        }
        for change in self._journal.changes():
            child = _apply(spaces[change.space], change.message)
            if child is not None:
                spaces[change.child] = child
        reader, unsettled = self._journal.unsettled()
        for index, message in unsettled:
            if message.event == Event.FORK and len(spaces) not in tasks:
                raise LostChild
            self._journal.record(index, Change(reader, message, len(spaces)))
            child = _apply(spaces[reader], message)
            if child is not None:
                spaces[len(spaces)] = child
        self._journal.settled()
        self._next = len(spaces)
        for number, descriptor in descriptors.items():
            self._add(number, descriptor, spaces[number])
            userfault.wake(descriptor, _LOWEST, _HIGHEST[os.uname().machine] - _LOWEST)


def _with_data(data: memoryview) -> Iterator[tuple[int, int]]:
    """Where whole pages of it are not all zeros, those in a row together."""
    firsts = data.cast("Q")[:: PAGE_BYTES // 8].tolist()
    if all(firsts):
        yield 0, len(data)
        return
    begin = None
    for number, first in enumerate(firsts):
        at = number * PAGE_BYTES
        if first or bytes(data[at : at + PAGE_BYTES]) != _ZERO_PAGE:
            begin = at if begin is None else begin
        elif begin is not None:
            yield begin, at
            begin = None
    if begin is not None:
        yield begin, len(data)


def _apply(space: Space, message: Message) -> Space | None:
    """Gives the space of a forked child."""
    match message.event:
        case Event.FORK:
            return space.forked()
        case Event.REMAP:
            space.move(message.first, message.second, message.third)
        case Event.REMOVE | Event.UNMAP:
            space.remove(message.first, message.second)
    return None
