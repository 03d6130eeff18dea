"""Tracks writes by eBPF, without a daemon in the data path.

A program on the tracepoint block_rq_complete marks a byte per block of the device when a write, a discard or a write of
zeros has completed. Completion is the right event: the data has landed by then. A collect clears a byte first and
leaves reading the block to afterwards, so that a write in between is reported again and never lost.

A kernel can leave a program out without counting it: a virtual machine's was found to do so whenever the completion
interrupts a process of its supervisor. So the program adds up the sectors that it sees, and a collect compares them
with the device's own statistics. To have something to answer with, it is on block_rq_issue, too: a request whose
completion was not seen has been marked when it was issued, for this collect or, if it was under way then, for one
before. If neither was seen, everything is dirty.

A long request, such as a discard by fstrim, marks one byte per region of 1024 blocks for the regions between its first
and its last one, so that the program's loops stay short enough for the verifier and the event cheap.

Cost: a byte of locked kernel memory per block (16 MiB for 1 TiB), and a look at all of these in each collect.
"""

import os
import struct
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

from blockdev import bpf, btf
from blockdev.block_device import BLOCK_BYTES, Device, Statistics
from blockdev.blocks import Piece
from blockdev.bpf import Assembler, ByteMap, RawTracepointProgram
from blockdev.errors import BlockError
from blockdev.extents import Range, merge

COMPLETE, ISSUE = "block_rq_complete", "block_rq_issue"
# A device of more than 16 TiB has larger blocks instead of more of them.
MAX_BLOCKS = 1 << 28

_SECTOR_SHIFT = 9
_REGION_SHIFT = 10
_REGION_BLOCKS = 1 << _REGION_SHIFT
# A request is shorter than 4 GiB (struct request counts its bytes in 32 bits): 64 regions at the most. More would set
# the overflow byte.
_MAX_REGIONS = 128
# Marks are copied out in parts of this before they are searched: they fit the processor's cache.
_SCAN_BYTES = 1 << 18
_ZEROS = bytes(_SCAN_BYTES)
# Of the counters, u64 each: sectors of completed and of issued requests.
_COUNTERS = struct.Struct("=QQ")
_COUNTER_AT = {COMPLETE: 0, ISSUE: 8}
# Until counters and statistics are read at a moment without a request in between.
_TRIES = 100
# Bit 0 of a request's operation says that it changes the device (op_is_write of linux/blk_types.h).
_WRITES = 1


class BpfTracker:
    """See `blockdev.tracker.WriteTracker`. Needs CAP_BPF and CAP_PERFMON, a kernel with BTF, and Linux 5.17."""

    def __init__(self, device: Path) -> None:
        self._device = Device(device)
        self._marking: _Marking | None = None

    def start(self) -> None:
        """Raises OSError and BlockError where `probe` says why, too."""
        self._stop()
        self._marking = _Marking(self._device.number, self._device.size_bytes())

    def collect(self) -> list[Range]:
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
    """Programs and marks for a device of a certain size: a byte per block, a byte per region, the overflow byte."""

    def __init__(self, device_number: int, size_bytes: int) -> None:
        self.size_bytes = size_bytes
        self._block_bytes = BLOCK_BYTES
        while size_bytes > MAX_BLOCKS * self._block_bytes:
            self._block_bytes *= 2
        self._regions = max(1, -(-size_bytes // (self._block_bytes << _REGION_SHIFT)))
        shift = self._block_bytes.bit_length() - 1 - _SECTOR_SHIFT
        self._resources = ExitStack()
        with self._resources as undo:
            # Many values, because a single one may not be longer than 4 MiB on older kernels.
            self._blocks = undo.enter_context(closing(ByteMap(_REGION_BLOCKS, self._regions)))
            self._whole = undo.enter_context(closing(ByteMap(self._regions + 1)))
            self._counters = undo.enter_context(closing(ByteMap(_COUNTERS.size)))
            self._statistics = undo.enter_context(closing(Statistics(device_number))) if device_number else None
            maps = (self._blocks.descriptor, self._whole.descriptor, self._counters.descriptor)
            self.programs = {}
            for name in (COMPLETE, ISSUE):
                code = _program(name, device_number, shift, self._regions, *maps)
                self.programs[name] = undo.enter_context(RawTracepointProgram(name, code))
            self._missed = self._misses()
            self._base = self._counts()
            # What may have been under way at the last collect, and be without a mark since.
            self._pending: list[Range] = []
            self._resources = undo.pop_all()

    def take(self) -> list[Range] | None:
        """What was marked since this was called last; None if that is not known."""
        regions = self._clear(self._whole, self._regions, self._block_bytes << _REGION_SHIFT)
        blocks = self._clear(self._blocks, len(self._blocks.bytes), self._block_bytes)
        found = merge([*regions, *blocks]) if regions else blocks
        # After the marks: what is not under `written` by then is still under way, or was marked too late for this time.
        counts, missed = self._counts(), self._misses()
        base, before = self._base, self._pending
        written = counts.written - base.written
        is_unseen = counts.completed - base.completed < written
        # Requests that were under way at the base were issued before it.
        is_unknown = is_unseen and not base.in_flight and counts.issued - base.issued < written
        if is_unseen or not counts.in_flight:
            self._base = counts
        # A request is marked a moment before it is under way, so the last answer is kept in any case.
        self._pending = merge([*found, *before]) if before and counts.in_flight else found
        if is_unknown or missed != self._missed or self._whole.bytes[self._regions]:
            self._missed, self._whole.bytes[self._regions] = missed, 0
            return None
        return merge([*found, *before]) if is_unseen else found

    def close(self) -> None:
        self._resources.close()

    def _misses(self) -> int:
        return sum(program.missed() for program in self.programs.values())

    def _counts(self) -> _Counts:
        """Of one moment if such a moment can be had; otherwise nothing is in `written` that is not in the others."""
        if self._statistics is None:
            return _Counts(0, 0, 0, 0)
        for _ in range(_TRIES):
            before = _COUNTERS.unpack_from(self._counters.bytes)
            # Twice, so that what is no longer under way is under `written`.
            _, in_flight = self._statistics.read()
            written, still_in_flight = self._statistics.read()
            completed, issued = _COUNTERS.unpack_from(self._counters.bytes)
            if before == (completed, issued):
                break
        return _Counts(completed, issued, written, max(in_flight, still_in_flight))

    def _clear(self, marks: ByteMap, count: int, bytes_per_mark: int) -> list[Range]:
        """Clear the first `count` marks, and say what they stand for."""
        view, size_bytes = marks.bytes, self.size_bytes
        found: list[Range] = []
        for part in range(0, count, _SCAN_BYTES):
            seen = view[part : min(part + _SCAN_BYTES, count)]
            at = seen.find(1)
            while at >= 0:
                stop = seen.find(0, at)
                if stop < 0:
                    stop = len(seen)
                view[part + at : part + stop] = _ZEROS[: stop - at]
                begin, end = (part + at) * bytes_per_mark, min((part + stop) * bytes_per_mark, size_bytes)
                if found and found[-1][1] == begin:
                    found[-1] = Range(found[-1][0], end)
                else:
                    found.append(Range(begin, end))
                at = seen.find(1, stop)
        return found


# Registers: 6 and 7 the first and the last block of the request, 8 and 9 their regions, 0 to 5 for the moment.
def _program(
    tracepoint: str, device_number: int, block_shift: int, regions: int, blocks_map: int, whole_map: int, counters: int
) -> bytes:
    """In C, where `blocks` and `whole` are the two maps, of which the latter has the overflow byte at its end:

    if (rq->q->disk is another || !op_is_write(rq) || nr_bytes < 512) return;
    add its sectors to the tracepoint's counter;
    if (last is beyond the device) goto overflow;
    mark blocks of the first region, from `first` to `last` or its end;
    mark the regions between the first and the last one as a whole;
    mark blocks of the last region up to `last`, if it is another one;
    """
    types = btf.kernel()
    a = Assembler()
    a.emit(bpf.LOAD64, 2, 1, 0)
    a.emit(bpf.LOAD64, 3, 2, types.offset("request", "q"))
    # Linux 5.17; a queue that lost its disk reads as 0 through a null pointer.
    a.emit(bpf.LOAD64, 3, 3, types.offset("request_queue", "disk"))
    a.emit(bpf.LOAD32, 4, 3, types.offset("gendisk", "major"))
    a.emit(bpf.JUMP_NOT_EQUAL32_IMMEDIATE, 4, value=os.major(device_number), to="out")
    a.emit(bpf.LOAD32, 4, 3, types.offset("gendisk", "first_minor"))
    a.emit(bpf.JUMP_NOT_EQUAL32_IMMEDIATE, 4, value=os.minor(device_number), to="out")
    a.emit(bpf.LOAD32, 4, 2, types.offset("request", "cmd_flags"))
    a.emit(bpf.AND_IMMEDIATE, 4, value=_WRITES)
    a.emit(bpf.JUMP_EQUAL_IMMEDIATE, 4, value=0, to="out")
    if tracepoint == COMPLETE:
        a.emit(bpf.LOAD64, 7, 1, 16)  # its third argument
    else:
        a.emit(bpf.LOAD32, 7, 2, types.offset("request", "__data_len"))
    a.emit(bpf.SET32, 7, 7)
    a.emit(bpf.SHIFT_RIGHT_IMMEDIATE, 7, value=_SECTOR_SHIFT)
    a.emit(bpf.JUMP_EQUAL_IMMEDIATE, 7, value=0, to="out")
    a.emit(bpf.LOAD64, 6, 2, types.offset("request", "__sector"))
    a.map_value(1, counters, _COUNTER_AT[tracepoint])
    a.emit(bpf.ATOMIC_ADD64, 1, 7)
    a.emit(bpf.ADD, 7, 6)
    a.emit(bpf.ADD_IMMEDIATE, 7, value=-1)
    a.emit(bpf.SHIFT_RIGHT_IMMEDIATE, 6, value=block_shift)
    a.emit(bpf.SHIFT_RIGHT_IMMEDIATE, 7, value=block_shift)
    a.emit(bpf.SET, 8, 6)
    a.emit(bpf.SHIFT_RIGHT_IMMEDIATE, 8, value=_REGION_SHIFT)
    a.emit(bpf.SET, 9, 7)
    a.emit(bpf.SHIFT_RIGHT_IMMEDIATE, 9, value=_REGION_SHIFT)
    a.emit(bpf.JUMP_AT_LEAST_IMMEDIATE, 9, value=regions, to="overflow")
    a.emit(bpf.JUMP_ABOVE, 8, 9, to="overflow")

    _find_region(a, blocks_map, 8)
    a.emit(bpf.SET, 1, 6)
    a.emit(bpf.AND_IMMEDIATE, 1, value=_REGION_BLOCKS - 1)
    a.emit(bpf.SET_IMMEDIATE, 2, value=_REGION_BLOCKS)
    a.emit(bpf.JUMP_NOT_EQUAL, 8, 9, to="head")
    _end_in_region(a)
    a.label("head")
    _mark_blocks(a)
    a.emit(bpf.JUMP_EQUAL, 8, 9, to="out")

    a.map_value(1, whole_map)
    a.emit(bpf.SET_IMMEDIATE, 2)
    a.label("regions")
    a.emit(bpf.ADD_IMMEDIATE, 8, value=1)
    a.emit(bpf.JUMP_AT_LEAST, 8, 9, to="tail")
    a.emit(bpf.JUMP_AT_LEAST_IMMEDIATE, 8, value=regions, to="overflow")
    a.emit(bpf.SET, 3, 1)
    a.emit(bpf.ADD, 3, 8)
    a.emit(bpf.STORE8_IMMEDIATE, 3, value=1)
    a.emit(bpf.ADD_IMMEDIATE, 2, value=1)
    a.emit(bpf.JUMP_BELOW_IMMEDIATE, 2, value=_MAX_REGIONS, to="regions")
    a.emit(bpf.JUMP, to="overflow")

    a.label("tail")
    _find_region(a, blocks_map, 9)
    a.emit(bpf.SET_IMMEDIATE, 1)
    _end_in_region(a)
    _mark_blocks(a)
    a.emit(bpf.JUMP, to="out")

    a.label("overflow")
    a.map_value(1, whole_map, regions)
    a.emit(bpf.STORE8_IMMEDIATE, 1, value=1)
    a.label("out")
    a.emit(bpf.SET_IMMEDIATE, 0)
    a.emit(bpf.EXIT)
    return a.code()


def _find_region(a: Assembler, blocks_map: int, region: int) -> None:
    """Register 0: the marks of the region whose number is in that register."""
    a.emit(bpf.STORE32, bpf.FRAME, region, -4)
    a.map(1, blocks_map)
    a.emit(bpf.SET, 2, bpf.FRAME)
    a.emit(bpf.ADD_IMMEDIATE, 2, value=-4)
    a.emit(bpf.CALL, value=bpf.LOOKUP)
    a.emit(bpf.JUMP_EQUAL_IMMEDIATE, 0, value=0, to="overflow")


def _end_in_region(a: Assembler) -> None:
    """Register 2: the end of what is marked in the last region."""
    a.emit(bpf.SET, 2, 7)
    a.emit(bpf.AND_IMMEDIATE, 2, value=_REGION_BLOCKS - 1)
    a.emit(bpf.ADD_IMMEDIATE, 2, value=1)


def _mark_blocks(a: Assembler) -> None:
    """Mark from register 1 up to register 2, which is more, in the region at register 0."""
    # What register 2 may be the verifier forgets when it compares two registers (Linux 6.1 does, 6.12 does not).
    a.emit(bpf.JUMP_AT_LEAST_IMMEDIATE, 1, value=_REGION_BLOCKS, offset=5)
    a.emit(bpf.SET, 3, 0)
    a.emit(bpf.ADD, 3, 1)
    a.emit(bpf.STORE8_IMMEDIATE, 3, value=1)
    a.emit(bpf.ADD_IMMEDIATE, 1, value=1)
    a.emit(bpf.JUMP_BELOW, 1, 2, offset=-6)
