"""Which blocks of a volume were written since the last look, without a daemon in the data path.

An eBPF program on `block:block_rq_complete` marks a byte per block of the loop device when a write, a discard or a
write of zeros has completed. Completion is the right event: the data has landed by then. A collect clears a byte
first and leaves reading the block to afterwards, so that a write in between is reported again and never lost.

A long request, such as a discard by fstrim, marks one byte per region of 1024 blocks for the regions that it covers
wholly, so that the program's loops stay short enough for the verifier and the event cheap; its ends it marks by blocks.
"""

import errno
import os
from pathlib import Path
from typing import Protocol

from blockdev import bpf
from blockdev.bpf import Assembler, ByteMap, TracepointProgram
from blockdev.errors import BlockError
from blockdev.extents import Range, merge

BLOCK_BYTES = 65536
TRACEPOINT = "block/block_rq_complete"
# Of locked kernel memory. A device of more than 4 TiB has larger blocks instead of more of them.
MAX_MARKS = 64 << 20

_SECTOR_SHIFT = 9
_REGION_SHIFT = 10
_REGION_BLOCKS = 1 << _REGION_SHIFT
# A request is shorter than 4 GiB (struct request counts its bytes in 32 bits): 64 regions at the most. More would set
# the overflow byte.
_MAX_REGIONS = 128
# Marks are copied out in parts of this before they are searched: they fit the processor's cache.
_SCAN_BYTES = 1 << 18


class WriteTracker(Protocol):
    """Reports what was written. After `close` it is of no use."""

    def collect(self) -> list[Range]:
        """Ranges written or discarded since the last collect: whole blocks within the device, merged, in order."""

    def close(self) -> None:
        """Stop tracking."""


class BpfTracker:
    """Tracks one loop device by eBPF. Needs CAP_BPF and CAP_PERFMON, tracefs, and Linux 5.12."""

    def __init__(self, device: Path) -> None:
        number = device.stat().st_rdev
        sectors = int(Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}/size").read_text())
        self._size_bytes = sectors << _SECTOR_SHIFT
        self.block_bytes, self._layout, self._map = _marks(self._size_bytes)
        try:
            self._program = TracepointProgram(TRACEPOINT, _program(number, self._map, self._layout))
            self._missed = self._program.missed()
        except BaseException:
            self._map.close()
            raise

    def collect(self) -> list[Range]:
        """See WriteTracker. Where events were missed the answer is the whole device."""
        missed, marks, layout = self._program.missed(), self._map.bytes, self._layout
        if missed != self._missed or marks[layout.overflow]:
            self._missed = missed
            marks[: layout.length] = bytes(layout.length)
            return [Range(0, self._size_bytes)]
        regions = self._take(layout.blocks, layout.overflow, self.block_bytes << _REGION_SHIFT)
        blocks = self._take(0, layout.blocks, self.block_bytes)
        return merge([*regions, *blocks])

    def close(self) -> None:
        """Stop tracking."""
        self._program.close()
        self._map.close()

    def _take(self, first: int, end: int, bytes_per_mark: int) -> list[Range]:
        """Clear the marks from `first` up to `end`, and say what they stand for."""
        marks, size_bytes, found = self._map.bytes, self._size_bytes, []
        for part in range(first, end, _SCAN_BYTES):
            seen = marks[part : min(part + _SCAN_BYTES, end)]
            at = seen.find(1)
            while at >= 0:
                stop = seen.find(0, at)
                if stop < 0:
                    stop = len(seen)
                marks[part + at : part + stop] = bytes(stop - at)
                begin = (part + at - first) * bytes_per_mark
                found.append(Range(begin, min(begin + (stop - at) * bytes_per_mark, size_bytes)))
                at = seen.find(1, stop)
        return found


class _Layout:
    """Where the marks are: a byte per block, a byte per region, the overflow byte."""

    def __init__(self, size_bytes: int, block_bytes: int) -> None:
        self.block_shift = block_bytes.bit_length() - 1 - _SECTOR_SHIFT
        self.blocks = -(-size_bytes // block_bytes)
        self.regions = -(-self.blocks // _REGION_BLOCKS)
        self.overflow = self.blocks + self.regions
        self.length = self.overflow + 1


def _marks(size_bytes: int) -> tuple[int, _Layout, ByteMap]:
    """A map with room for a device of that size, with the smallest blocks that the kernel has one for."""
    block_bytes = BLOCK_BYTES
    while True:
        layout = _Layout(size_bytes, block_bytes)
        if layout.blocks <= MAX_MARKS:
            try:
                return block_bytes, layout, ByteMap(layout.length)
            except OSError as error:
                if error.errno != errno.E2BIG or layout.blocks <= 1:
                    raise
        block_bytes *= 2


def probe() -> str | None:
    """None if eBPF tracking works here, else why not: found by loading the program."""
    try:
        layout = _Layout(BLOCK_BYTES, BLOCK_BYTES)
        marks = ByteMap(layout.length)
        try:
            TracepointProgram(TRACEPOINT, _program(0, marks, layout)).close()
        finally:
            marks.close()
    except (OSError, KeyError, BlockError) as error:
        return str(error)
    return None


# Registers of the program: 1 the event, 3 and 4 first and end of what is marked, 5 to 9 for the moment.
def _program(device: int, marks: ByteMap, layout: _Layout) -> bytes:
    """In C:

    if (dev != device || is_read || !nr_sector) return;
    if (end - first <= 1024) mark blocks from first to end;
    else mark blocks from first to a whole region, then whole regions, then blocks up to end;

    Each loop computes its bounds anew from the event: what the verifier knows of a loop's end is then forgotten
    before the next one, and it need not follow every way through all of them.
    """
    field = bpf.fields(TRACEPOINT)
    a = Assembler()
    a.emit(bpf.LOAD32, 2, 1, field["dev"])
    # dev_t inside the kernel (MKDEV), which is what the event carries.
    a.emit(bpf.JUMP_NOT_EQUAL_IMMEDIATE, 2, value=os.major(device) << 20 | os.minor(device), to="out")
    a.emit(bpf.LOAD8, 2, 1, field["rwbs"])
    a.emit(bpf.JUMP_EQUAL_IMMEDIATE, 2, value=ord("R"), to="out")
    a.emit(bpf.LOAD32, 2, 1, field["nr_sector"])
    a.emit(bpf.JUMP_EQUAL_IMMEDIATE, 2, value=0, to="out")

    _bounds(a, field, layout)
    a.emit(bpf.SET, 6, 4)
    a.emit(bpf.SUBTRACT, 6, 3)
    a.emit(bpf.JUMP_AT_MOST_IMMEDIATE, 6, value=_REGION_BLOCKS, to="head")
    a.emit(bpf.SET, 4, 3)
    _to_region(a, 4, round_up=True)
    a.emit(bpf.SHIFT_LEFT_IMMEDIATE, 4, value=_REGION_SHIFT)
    a.label("head")
    _mark(a, marks, layout, 0, layout.blocks, _REGION_BLOCKS, to="regions")

    a.label("regions")
    _bounds(a, field, layout)
    a.emit(bpf.SET, 6, 4)
    a.emit(bpf.SUBTRACT, 6, 3)
    a.emit(bpf.JUMP_AT_MOST_IMMEDIATE, 6, value=_REGION_BLOCKS, to="out")
    _to_region(a, 3, round_up=True)
    _to_region(a, 4, round_up=False)
    _mark(a, marks, layout, layout.blocks, layout.regions, _MAX_REGIONS, to="tail")

    a.label("tail")
    _bounds(a, field, layout)
    a.emit(bpf.SET, 3, 4)
    _to_region(a, 3, round_up=False)
    a.emit(bpf.SHIFT_LEFT_IMMEDIATE, 3, value=_REGION_SHIFT)
    _mark(a, marks, layout, 0, layout.blocks, _REGION_BLOCKS, to="out")

    a.label("out")
    a.emit(bpf.SET_IMMEDIATE, 0)
    a.emit(bpf.EXIT)
    return a.code()


def _bounds(a: Assembler, field: dict[str, int], layout: _Layout) -> None:
    """Registers 3 and 4: the first block of the request, and the one after its last."""
    a.emit(bpf.LOAD64, 3, 1, field["sector"])
    a.emit(bpf.LOAD32, 4, 1, field["nr_sector"])
    a.emit(bpf.ADD, 4, 3)
    a.emit(bpf.ADD_IMMEDIATE, 4, value=(1 << layout.block_shift) - 1)
    a.emit(bpf.SHIFT_RIGHT_IMMEDIATE, 3, value=layout.block_shift)
    a.emit(bpf.SHIFT_RIGHT_IMMEDIATE, 4, value=layout.block_shift)


def _to_region(a: Assembler, register: int, *, round_up: bool) -> None:
    """A block's number to its region's, or with `round_up` to that of the first region from there."""
    if round_up:
        a.emit(bpf.ADD_IMMEDIATE, register, value=_REGION_BLOCKS - 1)
    a.emit(bpf.SHIFT_RIGHT_IMMEDIATE, register, value=_REGION_SHIFT)


def _mark(a: Assembler, marks: ByteMap, layout: _Layout, base: int, count: int, longest: int, *, to: str) -> None:
    """Set the bytes from register 3 up to register 4 of the `count` bytes at `base`, and go on at `to`.

    If there are more than `longest` of them, set the overflow byte and end.
    """
    a.map_value(5, marks.descriptor, base)
    a.emit(bpf.SET_IMMEDIATE, 7)
    loop = a.here()
    a.emit(bpf.JUMP_AT_LEAST, 3, 4, to=to)
    a.emit(bpf.JUMP_AT_LEAST_IMMEDIATE, 3, value=count, to=to)
    a.emit(bpf.SET, 8, 5)
    a.emit(bpf.ADD, 8, 3)
    a.emit(bpf.STORE8_IMMEDIATE, 8, value=1)
    a.emit(bpf.ADD_IMMEDIATE, 3, value=1)
    a.emit(bpf.ADD_IMMEDIATE, 7, value=1)
    # One turn more than there are bytes to set: it finds that all is done.
    a.emit(bpf.JUMP_BELOW_IMMEDIATE, 7, offset=loop - a.here() - 1, value=longest + 1)
    a.map_value(5, marks.descriptor, layout.overflow)
    a.emit(bpf.STORE8_IMMEDIATE, 5, value=1)
    a.emit(bpf.SET_IMMEDIATE, 0)
    a.emit(bpf.EXIT)
