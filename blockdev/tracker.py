"""Which blocks of a volume were written since the last look, without a daemon in the data path.

An eBPF program on `block:block_rq_complete` marks a byte per 64 KiB block of the loop device when a write, a discard or
a write of zeros has completed. Completion is the right event: the data has landed by then. A collect clears a byte
first and leaves reading the block to afterwards, so that a write in between is reported again and never lost.
"""

import os
from pathlib import Path
from typing import Protocol

from blockdev import bpf
from blockdev.bpf import Assembler, ByteMap, TracepointProgram
from blockdev.extents import Range, merge

BLOCK_BYTES = 65536
TRACEPOINT = "block/block_rq_complete"

_SECTOR_SHIFT = 9
_BLOCK_SHIFT = 16 - _SECTOR_SHIFT
# The verifier wants a bound: a longer span (a discard of more than 64 MiB) sets the overflow byte.
_MAX_SPAN_BLOCKS = 1024


class WriteTracker(Protocol):
    """Reports what was written. After `close` it is of no use."""

    def collect(self) -> list[Range]:
        """Ranges written since the last collect, whole 64 KiB blocks within the device, merged and in order."""

    def close(self) -> None:
        """Stop tracking."""


class BpfTracker:
    """Tracks one loop device by eBPF. Needs CAP_BPF and CAP_PERFMON, tracefs, and Linux 5.12."""

    def __init__(self, device: Path) -> None:
        number = os.stat(device).st_rdev
        sectors = int(Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}/size").read_text())
        self._size_bytes = sectors << _SECTOR_SHIFT
        self._blocks = -(-self._size_bytes // BLOCK_BYTES)
        self._map = ByteMap(self._blocks + 1)
        try:
            self._program = TracepointProgram(TRACEPOINT, _program(number, self._map, self._blocks))
        except BaseException:
            self._map.close()
            raise
        self._missed = self._program.missed()

    def collect(self) -> list[Range]:
        """See WriteTracker. Events that were missed, or too long to mark, are answered with the whole device."""
        missed, marks = self._program.missed(), self._map.bytes
        if missed != self._missed or marks[self._blocks]:
            self._missed = missed
            marks[: self._blocks + 1] = bytes(self._blocks + 1)
            return [Range(0, self._size_bytes)]
        found = []
        at = marks.find(b"\1", 0, self._blocks)
        while at >= 0:
            end = at
            while end < self._blocks and marks[end]:
                marks[end] = 0
                end += 1
            found.append(Range(at * BLOCK_BYTES, min(end * BLOCK_BYTES, self._size_bytes)))
            at = marks.find(b"\1", end, self._blocks)
        return merge(found)

    def close(self) -> None:
        """Stop tracking."""
        self._program.close()
        self._map.close()


def probe() -> str | None:
    """None if eBPF tracking works here, else why not: found by loading the program."""
    try:
        marks = ByteMap(2)
        try:
            TracepointProgram(TRACEPOINT, _program(0, marks, 1)).close()
        finally:
            marks.close()
    except (OSError, KeyError) as error:
        return str(error)
    return None


def _program(device: int, marks: ByteMap, blocks: int) -> bytes:
    """In C: if (dev == device && is_write) for (b = first; b < end && b < blocks; b++) marks[b] = 1."""
    field = bpf.fields(TRACEPOINT)
    # dev_t inside the kernel (MKDEV), which is what the event carries.
    kernel_device = os.major(device) << 20 | os.minor(device)
    a = Assembler()
    a.emit(bpf.LOAD32, 2, 1, field["dev"])
    a.emit(bpf.JUMP_NOT_EQUAL_IMMEDIATE, 2, value=kernel_device, to="out")
    a.emit(bpf.LOAD8, 2, 1, field["rwbs"])
    a.emit(bpf.JUMP_EQUAL_IMMEDIATE, 2, value=ord("R"), to="out")
    a.emit(bpf.LOAD64, 3, 1, field["sector"])
    a.emit(bpf.LOAD32, 4, 1, field["nr_sector"])
    a.emit(bpf.JUMP_EQUAL_IMMEDIATE, 4, value=0, to="out")
    a.emit(bpf.ADD, 4, 3)
    a.emit(bpf.ADD_IMMEDIATE, 4, value=(1 << _BLOCK_SHIFT) - 1)
    a.emit(bpf.SHIFT_RIGHT_IMMEDIATE, 3, value=_BLOCK_SHIFT)
    a.emit(bpf.SHIFT_RIGHT_IMMEDIATE, 4, value=_BLOCK_SHIFT)
    a.map_value(5, marks.descriptor)
    a.emit(bpf.SET_IMMEDIATE, 7)
    a.label("loop")
    loop_length = 7
    a.emit(bpf.JUMP_AT_LEAST, 3, 4, to="out")
    a.emit(bpf.JUMP_AT_LEAST_IMMEDIATE, 3, value=blocks, to="out")
    a.emit(bpf.SET, 8, 5)
    a.emit(bpf.ADD, 8, 3)
    a.emit(bpf.STORE8_IMMEDIATE, 8, value=1)
    a.emit(bpf.ADD_IMMEDIATE, 3, value=1)
    a.emit(bpf.ADD_IMMEDIATE, 7, value=1)
    a.emit(bpf.JUMP_BELOW_IMMEDIATE, 7, offset=-loop_length - 1, value=_MAX_SPAN_BLOCKS)
    a.emit(bpf.ADD_IMMEDIATE, 5, value=blocks)
    a.emit(bpf.STORE8_IMMEDIATE, 5, value=1)
    a.label("out")
    a.emit(bpf.SET_IMMEDIATE, 0)
    a.emit(bpf.EXIT)
    return a.code()
