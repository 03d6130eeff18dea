"""The eBPF program that marks what a request changes, for one device and one tracepoint, as instructions.

In C, with the maps of `blockdev.marks`, where a unit is a sixteenth of a block and a region is 1024 blocks:

    if (rq->q->disk is another || !op_is_write(rq) || nr_bytes < 512) return;
    add its sectors to this processor's counter of the tracepoint;
    if (last is beyond the device) goto overflow;
    if (it is short, in one region, and that has a page) { mark units from `first` to `last` in the page; return; }
    mark blocks of the first region, from `first` to `last` or its end;
    mark the regions between the first and the last one as a whole;
    mark blocks of the last region up to `last`, if it is another one;

A counter is of one processor and not atomic: the kernel does not let a program of this type run within itself there,
and counts that as a miss.
"""

import os
from dataclasses import dataclass

from blockdev import bpf, btf
from blockdev.bpf import Assembler

COMPLETE, ISSUE = "block_rq_complete", "block_rq_issue"

SECTOR_SHIFT = 9
UNIT_SHIFT = 4  # units in a block
REGION_SHIFT = 10  # blocks in a region
REGION_BLOCKS = 1 << REGION_SHIFT
PAGE_UNITS = REGION_BLOCKS << UNIT_SHIFT
# Of a processor's counter: a line of the cache, so that no other processor waits for it.
COUNTER_BYTES = 64

# A longer request is marked by blocks: at its two ends that is little more than what it has changed.
_MAX_UNITS = 256
# A request is shorter than 4 GiB (struct request counts its bytes in 32 bits): 64 regions at the most. More would set
# the overflow byte.
_MAX_REGIONS = 128
# Bit 0 of a request's operation says that it changes the device (op_is_write of linux/blk_types.h).
_WRITES = 1


@dataclass(frozen=True)
class Layout:
    """The descriptors of the maps, and what they are made for."""

    blocks: int
    whole: int
    pages: int
    table: int
    counters: int
    block_bytes: int
    regions: int
    processors: int


# Registers: 6 and 7 the first and the last unit or block of the request, 8 and 9 their regions, 0 to 5 for the moment.
def assemble(tracepoint: str, device_number: int, layout: Layout) -> bytes:
    """See above."""
    a, regions = Assembler(), layout.regions
    _look(a, tracepoint, device_number)
    _count(a, layout, 0 if tracepoint == COMPLETE else layout.processors * COUNTER_BYTES)
    a.emit(bpf.ADD, 7, 6)
    a.emit(bpf.ADD_IMMEDIATE, 7, value=-1)
    unit_shift = layout.block_bytes.bit_length() - 1 - SECTOR_SHIFT - UNIT_SHIFT
    a.emit(bpf.SHIFT_RIGHT_IMMEDIATE, 6, value=unit_shift)
    a.emit(bpf.SHIFT_RIGHT_IMMEDIATE, 7, value=unit_shift)
    for region, unit in ((8, 6), (9, 7)):
        a.emit(bpf.SET, region, unit)
        a.emit(bpf.SHIFT_RIGHT_IMMEDIATE, region, value=REGION_SHIFT + UNIT_SHIFT)
        a.emit(bpf.JUMP_AT_LEAST_IMMEDIATE, region, value=regions, to="overflow")
    a.emit(bpf.JUMP_ABOVE, 8, 9, to="overflow")
    _mark_units(a, layout)
    _mark_blocks_and_regions(a, layout)
    a.label("overflow")
    a.map_value(1, layout.whole, regions)
    a.emit(bpf.STORE8_IMMEDIATE, 1, value=1)
    a.label("out")
    a.emit(bpf.SET_IMMEDIATE, 0)
    a.emit(bpf.EXIT)
    return a.code()


def _look(a: Assembler, tracepoint: str, device_number: int) -> None:
    """Registers 6 and 7: the first sector that this request changes and how many; `out` if it is none of ours."""
    types = btf.kernel()
    a.emit(bpf.LOAD64, 2, 1, 0)
    a.emit(bpf.LOAD64, 3, 2, types.offset("request", "q"))
    # Linux 5.17; a queue that lost its disk reads as 0 through a null pointer.
    a.emit(bpf.LOAD64, 3, 3, types.offset("request_queue", "disk"))
    # The minor number first: that is where most of the others differ.
    a.emit(bpf.LOAD32, 4, 3, types.offset("gendisk", "first_minor"))
    a.emit(bpf.JUMP_NOT_EQUAL32_IMMEDIATE, 4, value=os.minor(device_number), to="out")
    a.emit(bpf.LOAD32, 4, 3, types.offset("gendisk", "major"))
    a.emit(bpf.JUMP_NOT_EQUAL32_IMMEDIATE, 4, value=os.major(device_number), to="out")
    a.emit(bpf.LOAD32, 4, 2, types.offset("request", "cmd_flags"))
    a.emit(bpf.AND_IMMEDIATE, 4, value=_WRITES)
    a.emit(bpf.JUMP_EQUAL_IMMEDIATE, 4, value=0, to="out")
    if tracepoint == COMPLETE:
        a.emit(bpf.LOAD64, 7, 1, 16)  # its third argument
    else:
        a.emit(bpf.LOAD32, 7, 2, types.offset("request", "__data_len"))
    a.emit(bpf.SET32, 7, 7)
    a.emit(bpf.SHIFT_RIGHT_IMMEDIATE, 7, value=SECTOR_SHIFT)
    a.emit(bpf.JUMP_EQUAL_IMMEDIATE, 7, value=0, to="out")
    a.emit(bpf.LOAD64, 6, 2, types.offset("request", "__sector"))


def _count(a: Assembler, layout: Layout, offset: int) -> None:
    """Add register 7 to the counter of this processor, of which the first one is there."""
    a.emit(bpf.CALL, value=bpf.PROCESSOR)
    a.emit(bpf.JUMP_AT_LEAST_IMMEDIATE, 0, value=layout.processors, to="overflow")
    a.emit(bpf.SHIFT_LEFT_IMMEDIATE, 0, value=COUNTER_BYTES.bit_length() - 1)
    a.map_value(1, layout.counters, offset)
    a.emit(bpf.ADD, 1, 0)
    a.emit(bpf.LOAD64, 2, 1, 0)
    a.emit(bpf.ADD, 2, 7)
    a.emit(bpf.STORE64, 1, 2, 0)


def _mark_units(a: Assembler, layout: Layout) -> None:
    """All of a short request, and then `out`; goes on where its region has no page, or it has more than one."""
    a.emit(bpf.JUMP_NOT_EQUAL, 8, 9, to="blocks")
    a.emit(bpf.SET, 1, 7)
    a.emit(bpf.SUBTRACT, 1, 6)
    a.emit(bpf.JUMP_AT_LEAST_IMMEDIATE, 1, value=_MAX_UNITS, to="blocks")
    a.map_value(1, layout.table)
    a.emit(bpf.SET, 2, 8)
    a.emit(bpf.SHIFT_LEFT_IMMEDIATE, 2, value=2)
    a.emit(bpf.ADD, 1, 2)
    a.emit(bpf.LOAD32, 1, 1, 0)
    a.emit(bpf.JUMP_EQUAL_IMMEDIATE, 1, value=0, to="blocks")
    a.emit(bpf.ADD_IMMEDIATE, 1, value=-1)
    _find(a, layout.pages, 1)
    for at, unit in ((1, 6), (2, 7)):
        a.emit(bpf.SET, at, unit)
        a.emit(bpf.AND_IMMEDIATE, at, value=PAGE_UNITS - 1)
    a.emit(bpf.SET_IMMEDIATE, 4)
    a.label("units")
    # The verifier wants to see both ends of the loop in numbers.
    a.emit(bpf.JUMP_AT_LEAST_IMMEDIATE, 1, value=PAGE_UNITS, to="overflow")
    a.emit(bpf.SET, 3, 0)
    a.emit(bpf.ADD, 3, 1)
    a.emit(bpf.STORE8_IMMEDIATE, 3, value=1)
    a.emit(bpf.JUMP_AT_LEAST, 1, 2, to="out")
    a.emit(bpf.ADD_IMMEDIATE, 1, value=1)
    a.emit(bpf.ADD_IMMEDIATE, 4, value=1)
    a.emit(bpf.JUMP_BELOW_IMMEDIATE, 4, value=_MAX_UNITS, to="units")
    a.emit(bpf.JUMP, to="overflow")


def _mark_blocks_and_regions(a: Assembler, layout: Layout) -> None:
    """All of any request, and then `out`."""
    a.label("blocks")
    a.emit(bpf.SHIFT_RIGHT_IMMEDIATE, 6, value=UNIT_SHIFT)
    a.emit(bpf.SHIFT_RIGHT_IMMEDIATE, 7, value=UNIT_SHIFT)
    _find(a, layout.blocks, 8)
    a.emit(bpf.SET, 1, 6)
    a.emit(bpf.AND_IMMEDIATE, 1, value=REGION_BLOCKS - 1)
    a.emit(bpf.SET_IMMEDIATE, 2, value=REGION_BLOCKS)
    a.emit(bpf.JUMP_NOT_EQUAL, 8, 9, to="head")
    _end_in_region(a)
    a.label("head")
    _mark_blocks(a)
    a.emit(bpf.JUMP_EQUAL, 8, 9, to="out")

    a.map_value(1, layout.whole)
    a.emit(bpf.SET_IMMEDIATE, 2)
    a.label("regions")
    a.emit(bpf.ADD_IMMEDIATE, 8, value=1)
    a.emit(bpf.JUMP_AT_LEAST, 8, 9, to="tail")
    a.emit(bpf.JUMP_AT_LEAST_IMMEDIATE, 8, value=layout.regions, to="overflow")
    a.emit(bpf.SET, 3, 1)
    a.emit(bpf.ADD, 3, 8)
    a.emit(bpf.STORE8_IMMEDIATE, 3, value=1)
    a.emit(bpf.ADD_IMMEDIATE, 2, value=1)
    a.emit(bpf.JUMP_BELOW_IMMEDIATE, 2, value=_MAX_REGIONS, to="regions")
    a.emit(bpf.JUMP, to="overflow")

    a.label("tail")
    _find(a, layout.blocks, 9)
    a.emit(bpf.SET_IMMEDIATE, 1)
    _end_in_region(a)
    _mark_blocks(a)
    a.emit(bpf.JUMP, to="out")


def _find(a: Assembler, map_descriptor: int, number: int) -> None:
    """Register 0: the value of a map whose number is in that register."""
    a.emit(bpf.STORE32, bpf.FRAME, number, -4)
    a.map(1, map_descriptor)
    a.emit(bpf.SET, 2, bpf.FRAME)
    a.emit(bpf.ADD_IMMEDIATE, 2, value=-4)
    a.emit(bpf.CALL, value=bpf.LOOKUP)
    a.emit(bpf.JUMP_EQUAL_IMMEDIATE, 0, value=0, to="overflow")


def _end_in_region(a: Assembler) -> None:
    """Register 2: the end of what is marked in the last region."""
    a.emit(bpf.SET, 2, 7)
    a.emit(bpf.AND_IMMEDIATE, 2, value=REGION_BLOCKS - 1)
    a.emit(bpf.ADD_IMMEDIATE, 2, value=1)


def _mark_blocks(a: Assembler) -> None:
    """Mark from register 1 up to register 2, which is more, in the region at register 0."""
    # What register 2 may be the verifier forgets when it compares two registers (Linux 6.1 does, 6.12 does not).
    a.emit(bpf.JUMP_AT_LEAST_IMMEDIATE, 1, value=REGION_BLOCKS, offset=5)
    a.emit(bpf.SET, 3, 0)
    a.emit(bpf.ADD, 3, 1)
    a.emit(bpf.STORE8_IMMEDIATE, 3, value=1)
    a.emit(bpf.ADD_IMMEDIATE, 1, value=1)
    a.emit(bpf.JUMP_BELOW, 1, 2, offset=-6)
