"""Tracks writes by eBPF, without a daemon in the data path.

A program on the tracepoint block_rq_complete (`blockdev.bpf_program`) marks pieces of the device (`blockdev.marks`)
when a write, a discard or a write of zeros has completed. Completion is the right event: the data has landed by then.
A collect clears a mark first and leaves reading what it stands for to afterwards, so that a write in between is
reported again and never lost.

A kernel can leave a program out without counting it: a virtual machine's was found to do so whenever the completion
interrupts a process of its supervisor. So the program adds up the sectors that it sees, and a collect compares them
with the device's own statistics. To have something to answer with, it is on block_rq_issue, too: a request whose
completion was not seen has been marked when it was issued, for this collect or, if it was under way then, for one
before. If neither was seen, everything is dirty.

Cost: two bytes of locked kernel memory for each 64 KiB block of a large device, a byte for each 4 KiB of one of up to
64 GiB, and a look at all of these in each collect: some 3 ms for 1 TiB, and 0.5 us for each range that was written.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

from blockdev.block_device import BLOCK_BYTES, Device, Statistics
from blockdev.blocks import Piece
from blockdev.bpf import RawTracepointProgram
from blockdev.bpf_program import COMPLETE, ISSUE, assemble
from blockdev.errors import BlockError
from blockdev.extents import Range, merge
from blockdev.marks import Marks

# Until counters and statistics are read at a moment without a request in between.
_TRIES = 20
# What is kept of former answers is merged when it has become so long.
_MERGE_AT = 1 << 15


class BpfTracker:
    """See `blockdev.tracker.WriteTracker`. Needs CAP_BPF and CAP_PERFMON, a kernel with BTF, and Linux 5.17."""

    reads_all = False

    def __init__(self, device: Path) -> None:
        self._device = Device(device)
        self._marking: _Marking | None = None

    def start(self) -> None:
        """Raises OSError and BlockError where `probe` says why, too."""
        self._stop()
        self._marking = _Marking(self._device.number, self._device.size_bytes())

    def collect(self, check: Callable[[], None] = lambda: None) -> list[Range]:
        """Where events were missed, or the device has another size than at the start, the answer is all of it."""
        if self._marking is None or self._marking.size_bytes != self._device.size_bytes():
            self.start()
        elif (found := self._marking.take()) is not None:
            return found
        return [Range(0, self._device.size_bytes())]

    def observe(self, pieces: Iterable[Piece]) -> Iterator[Piece]:
        """It does not matter what is read."""
        return iter(pieces)

    def close(self) -> None:
        """Stop tracking."""
        self._stop()
        self._device.close()

    def _stop(self) -> None:
        if self._marking is not None:
            self._marking.close()
            self._marking = None


def probe() -> str | None:
    """None if eBPF tracking works here, else why not: found by loading and attaching the program."""
    try:
        _Marking(0, BLOCK_BYTES).close()
    except (OSError, BlockError) as error:
        return str(error)
    return None


@dataclass(frozen=True)
class _Counts:
    """Sectors of write requests: as the programs have seen them, and as the kernel's statistics have them."""

    completed: int
    issued: int
    written: int
    in_flight: int


class _Marking:
    """The programs, and what they have marked on a device of a certain size."""

    def __init__(self, device_number: int, size_bytes: int) -> None:
        self.size_bytes = size_bytes
        self._resources = ExitStack()
        with self._resources as undo:
            self._marks = undo.enter_context(closing(Marks(size_bytes)))
            self._statistics = undo.enter_context(closing(Statistics(device_number))) if device_number else None
            self.programs = {}
            for name in (COMPLETE, ISSUE):
                code = assemble(name, device_number, self._marks.layout)
                self.programs[name] = undo.enter_context(RawTracepointProgram(name, code))
            self._missed = self._misses()
            self._base = self._counts()
            # What may have been under way at the last collect, and be without a mark since; and how long it may get
            # until it is merged. What was issued before the programs were there is anywhere.
            self._pending = [Range(0, size_bytes)] if self._base.in_flight else []
            self._longest = _MERGE_AT
            self._resources = undo.pop_all()

    def take(self) -> list[Range] | None:
        """What was marked since this was called last; None if that is not known."""
        found = self._marks.take()
        # After the marks: what is not under `written` by then is still under way, or was marked too late for this time.
        counts, missed = self._counts(), self._misses()
        base, before = self._base, self._pending
        written = counts.written - base.written
        is_unseen = counts.completed - base.completed < written
        # Requests that were under way at the base were issued before it.
        is_unknown = is_unseen and not base.in_flight and counts.issued - base.issued < written
        if is_unseen or not counts.in_flight:
            self._base = counts
        answer = merge([*found, *before]) if is_unseen else found
        # A request is marked a moment before it is under way, so the last answer is kept in any case.
        self._keep(found, before if counts.in_flight else [])
        is_overflow = self._marks.overflowed()
        if is_unknown or missed != self._missed or is_overflow:
            self._missed = missed
            return None
        return answer

    def close(self) -> None:
        self._resources.close()

    def _keep(self, found: list[Range], before: list[Range]) -> None:
        """Merged now and then only: all of it may be kept for as long as the device is never idle."""
        self._pending = [*before, *found] if before else found
        if len(self._pending) > self._longest:
            self._pending = merge(self._pending)
            self._longest = max(_MERGE_AT, 2 * len(self._pending))

    def _misses(self) -> int:
        return sum(program.missed() for program in self.programs.values())

    def _counts(self) -> _Counts:
        """Of one moment if such a moment can be had; otherwise nothing is in `written` that is not in the others, and
        something is under way."""
        if self._statistics is None:
            return _Counts(0, 0, 0, 0)
        for _ in range(_TRIES):
            before = self._marks.counts()
            # Twice, so that what is no longer under way is under `written`.
            _, in_flight = self._statistics.read()
            written, still_in_flight = self._statistics.read()
            completed, issued = self._marks.counts()
            if before == (completed, issued):
                return _Counts(completed, issued, written, max(in_flight, still_in_flight))
        return _Counts(completed, issued, written, max(1, in_flight, still_in_flight))
